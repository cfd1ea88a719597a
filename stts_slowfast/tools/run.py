"""``stts run``: trains and tests by SlowFast config files, inside SlowFast or standalone."""

import argparse

from stts_slowfast.configfiles.files import find_config
from stts_slowfast.pyslowfast import launch
from stts_slowfast.tools.cli import add_opts

ENGINES = ("slowfast", "standalone")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of SlowFast's ``tools/run_net.py``, and ``--engine``."""
    parser.add_argument(
        "--cfg", nargs="+", required=True, metavar="FILE", help="config files, or names of ours"
    )
    parser.add_argument(
        "--engine", choices=ENGINES, help="default: slowfast if it is found, else standalone"
    )
    parser.add_argument("--num_shards", type=int, default=1, help="number of machines")
    parser.add_argument("--shard_id", type=int, default=0, help="rank of this machine, from 0")
    parser.add_argument(
        "--init_method", default="tcp://localhost:9999", help="tcp://host:port of shard 0"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes to start on this machine (default: NUM_GPUS); standalone engine only",
    )
    parser.add_argument(
        "--strict-resume",
        action="store_true",
        help="stop if the last checkpoint is damaged, instead of resuming from the one before",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Trains and tests by each config file in turn, if its TRAIN.ENABLE and TEST.ENABLE ask.

    Raises:
        ValueError, FileNotFoundError: for options, a config, data or a checkpoint that are wrong.
    """
    engine, reason = choose_engine(args.engine)
    print(f"engine: {engine} ({reason})", flush=True)
    if engine == "slowfast":
        for name in ("processes", "strict_resume"):
            if getattr(args, name):
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for the standalone runner: add --engine standalone"
                )
        launch.run(_slowfast_arguments(args))
        return 0

    from stts_slowfast.standalone.config import load_config

    # All files are read before the first one runs, so that a typo in the last fails at once.
    configs = [load_config(path, args.opts) for path in args.cfg]
    from stts_slowfast.config import check_testing
    from stts_slowfast.standalone import engine as runner
    from stts_slowfast.standalone.data import ClipDataset

    for cfg in configs:
        if cfg.TEST.ENABLE and cfg.STTS.ENABLE:
            check_testing(cfg.STTS)
        if cfg.TRAIN.ENABLE and cfg.TEST.ENABLE:
            ClipDataset(cfg, "test")  # a missing list fails now, not after the training
    for cfg in configs:
        cfg.NUM_SHARDS, cfg.SHARD_ID = args.num_shards, args.shard_id
        for enabled, job in ((cfg.TRAIN.ENABLE, runner.train), (cfg.TEST.ENABLE, runner.test)):
            if enabled:
                job(cfg, args.init_method, args.processes, strict_resume=args.strict_resume)
    return 0


def choose_engine(requested: str | None) -> tuple[str, str]:
    """``(engine, reason)``: the one requested, else SlowFast if it is found, else standalone.

    Raises:
        FileNotFoundError: if ``SLOWFAST_ROOT`` names a folder without launcher.
    """
    if requested:
        return requested, "--engine asks for it"
    launcher = launch.find_launcher()
    if launcher:
        return "slowfast", f"found {launcher}; --engine standalone does without"
    return "standalone", "found no checkout of SlowFast; SLOWFAST_ROOT can name one"


def _slowfast_arguments(args: argparse.Namespace) -> list[str]:
    words = ["--shard_id", str(args.shard_id), "--num_shards", str(args.num_shards)]
    words += ["--init_method", args.init_method, "--cfg", *map(_for_slowfast, args.cfg)]
    return [*words, "--opts", *args.opts] if args.opts else words


def _for_slowfast(cfg: str) -> str:
    try:
        return find_config(cfg)
    except FileNotFoundError:
        return cfg  # its own launcher raises the error
