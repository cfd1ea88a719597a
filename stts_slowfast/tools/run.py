"""``stts run``: trains and tests by SlowFast config files, in SlowFast or without it."""

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
        "--engine", choices=ENGINES, help="slowfast where it is found, else standalone"
    )
    parser.add_argument("--num_shards", type=int, default=1, help="machines that share the job")
    parser.add_argument("--shard_id", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument(
        "--init_method", default="tcp://localhost:9999", help="tcp://host:port of shard 0"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="to start on this machine, NUM_GPUS by default (standalone; torchrun and srun say so)",
    )
    parser.add_argument(
        "--strict-resume",
        action="store_true",
        help="stop at a last checkpoint that is damaged, instead of using the one before",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int | None:
    """Runs each config file in turn, as ``TRAIN.ENABLE`` and ``TEST.ENABLE`` ask."""
    engine, why = choose_engine(args.engine)
    print(f"engine: {engine} ({why})", flush=True)
    if engine == "slowfast":
        for name in ("processes", "strict_resume"):
            if getattr(args, name):
                word = name.replace("_", "-")
                raise ValueError(f"--{word} is for the standalone runner: add --engine standalone")
        return launch.run(_slowfast_arguments(args))

    from stts_slowfast.standalone.config import load_config

    # All files are read before the first one runs, so that a typo in the last shows at once.
    configs = [load_config(path, args.opts) for path in args.cfg]
    from stts_slowfast.config import check_testing
    from stts_slowfast.standalone import engine as runner
    from stts_slowfast.standalone.data import ClipDataset

    for cfg in configs:
        if cfg.TEST.ENABLE and cfg.STTS.ENABLE:
            check_testing(cfg.STTS)
        if cfg.TRAIN.ENABLE and cfg.TEST.ENABLE:
            ClipDataset(cfg, "test")  # a list that is missing shows now, not after the training
    for cfg in configs:
        cfg.NUM_SHARDS, cfg.SHARD_ID = args.num_shards, args.shard_id
        for enabled, job in ((cfg.TRAIN.ENABLE, runner.train), (cfg.TEST.ENABLE, runner.test)):
            if enabled:
                job(cfg, args.init_method, args.processes, strict_resume=args.strict_resume)
    return 0


def choose_engine(asked: str | None) -> tuple[str, str]:
    """``(engine, why)``: the one asked for, else SlowFast where its launcher is, else our own.

    Raises:
        FileNotFoundError: where ``SLOWFAST_ROOT`` names a folder without launcher.
    """
    if asked:
        return asked, "--engine asks for it"
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
        return cfg  # its own launcher says what is missing
