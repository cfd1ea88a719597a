"""``stts study``: compares scorers at every budget on your model and videos.

A row is a line of OUT/study.csv and a file in OUT/rows. A study that was stopped resumes with the
first row without a file, and rows can be added to it.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from iopath.common.file_io import g_pathmgr
from torch import nn

from stts_slowfast import backbones, build_model, load_config, load_weights
from stts_slowfast.checkpoints import pretrained_state, read_checkpoint, validate_checkpoint
from stts_slowfast.config import validate_stts
from stts_slowfast.standalone.annotations import NO_LABEL
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.tools.cli import add_opts
from stts_slowfast.tools.output import write_json
from stts_slowfast.tools.study.coverage import find_truth
from stts_slowfast.tools.study.evaluate import CACHE_BYTES, TestClips, evaluate
from stts_slowfast.tools.study.results import ENDINGS, SCORERS, table, write_results
from stts_slowfast.video import cache_frames

SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class StudyRow:
    """A budget and a scorer.

    Attributes:
        time, space: shares of frames and of a frame's tokens after all selectors; None without
            selection in that dimension.
        scorer: of both dimensions; "all" keeps all tokens.
        trained: whether the checkpoint is fine-tuned by the recipe first.
        seed: of training, and of random scores in testing.
    """

    time: float | None
    space: float | None
    scorer: str
    trained: bool = False
    seed: int = 0

    @property
    def dimension(self) -> str:
        selected = [name for name in ("time", "space") if getattr(self, name) is not None]
        return "both" if len(selected) == 2 else "".join(selected) or "none"

    @property
    def name(self) -> str:
        shares = (f"{d}{getattr(self, d):g}-" for d in ("time", "space") if getattr(self, d))
        trained = "-trained" if self.trained else ""
        return f"{''.join(shares)}{self.scorer}{trained}-seed{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts study``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of model and data")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights (default: TEST.CHECKPOINT_FILE_PATH)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    for name, text in (("--time", "frames"), ("--space", "each frame's tokens")):
        parser.add_argument(
            name,
            type=float,
            nargs="*",
            default=SHARES,
            metavar="SHARE",
            help=f"budgets: shares of {text}",
        )
    parser.add_argument(
        "--both",
        nargs="*",
        default=[f"{share}x{share}" for share in SHARES],
        metavar="TIMExSPACE",
        help="budgets: shares of both at once",
    )
    parser.add_argument("--scorers", nargs="+", default=SCORERS, metavar="NAME")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of rows with random scores or fine-tuning"
    )
    parser.add_argument("--train", action="store_true", help="add a fine-tuned row for each row")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys and values for --train alone, such as SOLVER.MAX_EPOCH 10",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Measures the rows that have no file yet, and writes table and plot.

    Raises:
        ValueError: for a budget, scorer, config or checkpoint that cannot be used.
    """
    cfg = load_config(args.cfg, args.opts)
    cfg.OUTPUT_DIR = args.out  # for the list of unreadable videos
    recipe = load_config(args.cfg, [*args.opts, *args.recipe])
    path = find_checkpoint(cfg, args.checkpoint)
    rows = plan_rows(cfg, args)
    rows = [row for row in rows if row.trained or has_scorer_weights(cfg, row, path)]
    os.makedirs(os.path.join(args.out, "rows"), exist_ok=True)
    results = run_rows(cfg, recipe, path, rows, args.out)
    write_results(args.out, results)
    print(table(results))
    if unreadable := max(row["unreadable"] for row in results):
        print(f"{unreadable} of the test videos cannot be read, and count as wrong in all rows")
    print(f"wrote {', '.join(os.path.join(args.out, f'study.{end}') for end in ENDINGS)}")
    return 0


def find_checkpoint(cfg, named: str | None) -> str:
    """The checkpoint to study: a file, or the folder that the config's model is initialized from.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if none is named, or it is another folder.
    """
    path = named or cfg.TEST.CHECKPOINT_FILE_PATH or cfg.TRAIN.CHECKPOINT_FILE_PATH
    folder = backbones.family_of(cfg).init_folder(cfg)
    if not path and not folder:
        raise ValueError("no checkpoint is named: give --checkpoint or TEST.CHECKPOINT_FILE_PATH")
    path = path or folder
    if not g_pathmgr.exists(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if os.path.isdir(path) and not (folder and os.path.samefile(path, folder)):
        raise ValueError(
            f"checkpoint {path} is a folder: name a file in it or, if save_pretrained wrote it, "
            f"set MODEL.MODEL_NAME hf:{path}"
        )
    return path


# ---- rows -----------------------------------------------------------------------------------


def plan_rows(cfg, args: argparse.Namespace) -> list[StudyRow]:
    """The rows that the arguments ask for, each validated against the model.

    Raises:
        ValueError: naming the budget or scorer that is impossible.
    """
    budgets = [(share, None) for share in args.time] + [(None, share) for share in args.space]
    for text in args.both:
        try:
            time, space = map(float, text.split("x"))
        except ValueError:
            raise ValueError(f"--both {text}: give shares such as 0.5x0.25") from None
        budgets.append((time, space))
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}: give 1 at least")
    rows = [StudyRow(None, None, "all")]
    for time, space in budgets:
        rows += [StudyRow(time, space, scorer) for scorer in args.scorers]
    grids = backbones.block_grids(cfg)
    for row in rows[1:]:
        validate_stts(row_config(cfg, row).STTS, len(grids), grids)
    if args.train:
        rows += [replace(row, trained=True) for row in rows]
    return [seeded for row in rows for seeded in expand_seeds(row, args.seeds)]


def expand_seeds(row: StudyRow, seeds: int) -> Iterable[StudyRow]:
    """A row for each seed if it is fine-tuned or has random scores, else the row alone."""
    is_random = row.trained or row.scorer == "random"
    return [replace(row, seed=seed) for seed in range(seeds if is_random else 1)]


def row_config(cfg, row: StudyRow):
    """The config of a row. If several blocks select, each keeps the same share."""
    cfg = cfg.clone()
    cfg.RNG_SEED += row.seed
    cfg.STTS.ENABLE = row.scorer != "all"
    for name in ("time", "space") if cfg.STTS.ENABLE else ():
        node, share = cfg.STTS[name.upper()], getattr(row, name)
        if share is None:
            node.BLOCKS, node.KEEP = [], []
        elif not node.BLOCKS:
            raise ValueError(
                f"a budget for {name} is asked for, but STTS.{name.upper()}.BLOCKS is empty: name "
                f"a block there, or give --{name} without a share and no --both"
            )
        else:
            node.KEEP = [share ** (1 / len(node.BLOCKS))] * len(node.BLOCKS)
            node.SCORER = row.scorer
    return cfg


def has_scorer_weights(cfg, row: StudyRow, path: str) -> bool:
    """Whether a checkpoint has the weights of a row's scorers; if not, prints that."""
    if row.scorer != "learned":
        return True
    missing = load(row_config(cfg, row), path)[1]
    if missing:
        print(f"left out: {row.name}, {path} has no weights of {missing[0]}", file=sys.stderr)
    return not missing


def load(cfg, path: str) -> tuple[nn.Module, list[str]]:
    """A row's model with the weights of a checkpoint, and the names of the scorers' parameters
    that the checkpoint lacks.

    Raises:
        ValueError: if it is of another backbone.
    """
    model = build_model(cfg)
    checkpoint = pretrained_state(model, path) if os.path.isdir(path) else read_checkpoint(path)
    validate_checkpoint(model, checkpoint, cfg, "finetune", path)  # other heads pass
    loaded = load_weights(model, checkpoint, strict=False)
    lost = [name for name in loaded.missing if not name.startswith("stts.")]
    if lost or loaded.mismatched:
        raise ValueError(f"{path} is not of this config's model: {loaded}")
    return model, list(loaded.missing)


# ---- running them ---------------------------------------------------------------------------


def run_rows(cfg, recipe, path: str, rows: Sequence[StudyRow], out: str) -> list[dict]:
    """The results of all rows; rows with a valid file in OUT/rows are not measured again."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    clips = TestClips(cfg)
    if bool((clips.videos.labels == NO_LABEL).any()):
        raise ValueError(
            f"the test list in DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} has videos "
            "without a label: a study compares accuracies, so give every one its class"
        )
    test_inputs = [digest(path), clips.videos.digest(), repr(find_truth(cfg))]
    train_inputs = []
    if any(row.trained for row in rows):
        train_inputs = [ClipDataset(recipe, "train").videos.digest()]
    device = "cuda" if cfg.NUM_GPUS > 0 and torch.cuda.is_available() else "cpu"
    columns = [SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn()]
    progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
    # All rows are trained on the same videos: these are decoded once if they fit in memory.
    size = CACHE_BYTES // max(1, cfg.DATA_LOADER.NUM_WORKERS)
    results = []
    with progress, quiet_logs(), cache_frames(size):
        task = progress.add_task("rows", total=len(rows))
        batches = progress.add_task("batches", total=len(clips))
        for row in rows:
            progress.update(task, description=row.name)
            file = os.path.join(out, "rows", f"{row.name}.json")
            config = row_config(recipe if row.trained else cfg, row)
            key = fingerprint(config, [*test_inputs, *(train_inputs if row.trained else ())])
            result = read_row(file, key)
            if result is None:
                weights = path
                if row.trained:
                    folder = os.path.join(out, "runs", f"{row.name}-{key}")
                    weights = fine_tune(config, path, folder, progress)
                progress.reset(batches)
                result = measure(config, row, weights, clips, device, progress, batches)
                write_json(file, {"key": key, **result})
            results.append(result)
            progress.advance(task)
    return results


def fine_tune(cfg, path: str, folder: str, progress) -> str:
    """Trains a row's model from the checkpoint, or resumes; returns the path of its weights."""
    from stts_slowfast.standalone import engine

    cfg.OUTPUT_DIR, cfg.TRAIN.ENABLE = folder, True
    cfg.TRAIN.CHECKPOINT_FILE_PATH = "" if os.path.isdir(path) else path
    cfg.TRAIN.CHECKPOINT_EPOCH_RESET = True
    progress.stop()  # training has a bar of its own
    try:
        return engine.train(cfg)["checkpoint"]
    finally:
        progress.start()


def measure(cfg, row: StudyRow, path: str, clips: TestClips, device, progress, task) -> dict:
    """Tests a row's model; returns its entry of study.json."""
    from stts_slowfast.standalone.flops import count_gflops

    model, missing = load(cfg, path)
    if missing:
        raise ValueError(f"{path} has no weights of the scorers of {row.name}")
    size = cfg.DATA.TEST_CROP_SIZE
    gflops = count_gflops(model, torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, size, size))
    torch.manual_seed(cfg.RNG_SEED)
    model.to(device)
    result = evaluate(cfg, model, clips, lambda: progress.advance(task))
    names = {"name": row.name, "dimension": row.dimension}
    return {**names, **asdict(row), "gflops": round(gflops, 5), **result}


def fingerprint(cfg, inputs: Sequence[str]) -> str:
    """A hash of all that a row's result depends on: its config without paths, and its inputs."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = cfg.TEST.CHECKPOINT_FILE_PATH = cfg.TRAIN.CHECKPOINT_FILE_PATH = ""
    cfg.DATA.PATH_TO_DATA_DIR = cfg.DATA.PATH_PREFIX = ""
    return hashlib.sha256("\n".join([cfg.dump(), *inputs]).encode()).hexdigest()[:16]


def digest(path: str) -> str:
    """SHA-256 of a checkpoint: a file, or a folder's files."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    sha256 = hashlib.sha256()
    for file in filter(g_pathmgr.isfile, files):
        with g_pathmgr.open(file, "rb") as opened:
            while block := opened.read(2**20):
                sha256.update(block)
    return sha256.hexdigest()


def read_row(path: str, key: str) -> dict | None:
    """A row's result from a file, if config, checkpoint and lists are the same; else None."""
    try:
        with open(path) as file:
            result = json.load(file)
    except FileNotFoundError:
        return None
    if result.get("unreadable", 1):  # those videos may be repaired now; old files lack the key
        return None
    return result if result.pop("key") == key else None


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Keeps a run's log lines out of the terminal; its ``stdout.log`` still has them."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
