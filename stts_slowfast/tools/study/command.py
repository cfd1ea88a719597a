"""``stts study``: does selection win on your model and videos? Budgets x scorers, one table.

Every row is one line of OUT/study.csv and one file in OUT/rows: a study that was stopped goes on
where it was, and rows can be added to it.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
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
from stts_slowfast.tools.study.evaluate import CACHE_BYTES, TestClips, evaluate, find_truth
from stts_slowfast.tools.study.results import ENDINGS, SCORERS, table, write_json, write_results
from stts_slowfast.video import cache_frames

SHARES = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class StudyRow:
    """A way to select.

    Attributes:
        time, space: shares of frames and of a frame's tokens that are left in the end; None where
            nothing is selected there.
        scorer: of both; "all" keeps all tokens.
        trained: fine-tuned by the recipe, or the checkpoint as it is.
        seed: of what is random, in training or in testing.
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
        "--checkpoint", metavar="FILE", help="weights; TEST.CHECKPOINT_FILE_PATH else"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    kept = {"type": float, "nargs": "*", "default": SHARES, "metavar": "SHARE"}
    parser.add_argument("--time", **kept, help="budgets: shares of frames")
    parser.add_argument("--space", **kept, help="shares of each frame's tokens")
    both = [f"{share}x{share}" for share in SHARES]
    parser.add_argument(
        "--both", nargs="*", default=both, metavar="TIMExSPACE", help="shares of both at once"
    )
    parser.add_argument("--scorers", nargs="+", default=SCORERS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="for rows in which chance has a part")
    parser.add_argument("--train", action="store_true", help="fine-tune a row of each kind, too")
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys and values for --train alone, such as SOLVER.MAX_EPOCH 10",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Measures the rows that are not there yet, and writes table and plot.

    Raises:
        ValueError: for a budget, scorer, config or checkpoint that cannot be used.
    """
    cfg = load_config(args.cfg, args.opts)
    cfg.OUTPUT_DIR = args.out  # of the list of videos that cannot be read
    recipe = load_config(args.cfg, [*args.opts, *args.recipe])
    path = find_checkpoint(cfg, args.checkpoint)
    rows = plan_rows(cfg, args)
    rows = [row for row in rows if row.trained or has_scorer_weights(cfg, row, path)]
    os.makedirs(os.path.join(args.out, "rows"), exist_ok=True)
    results = run_rows(cfg, recipe, path, rows, args.out)
    write_results(args.out, results)
    print(table(results))
    if lost := max(row["unreadable"] for row in results):
        print(f"{lost} of the test videos cannot be read, and count as wrong in all rows")
    print(f"wrote {', '.join(os.path.join(args.out, f'study.{end}') for end in ENDINGS)}")
    return 0


def find_checkpoint(cfg, named: str | None) -> str:
    """The file whose weights are studied, or the folder that the config's model is made from.

    Raises:
        FileNotFoundError: where it is not there.
        ValueError: where none is named, or a folder that the model is not made from.
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
            f"checkpoint {path} is a folder: name a file in it or, where save_pretrained wrote it, "
            f"set MODEL.MODEL_NAME hf:{path}"
        )
    return path


# ---- rows -----------------------------------------------------------------------------------


def plan_rows(cfg, args: argparse.Namespace) -> list[StudyRow]:
    """The rows that are asked for, each checked against the model.

    Raises:
        ValueError: naming the budget or scorer that cannot be.
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
    return [row for one in rows for row in expand_seeds(one, args.seeds)]


def expand_seeds(row: StudyRow, seeds: int) -> Iterable[StudyRow]:
    """A row for each seed where chance has a part in it."""
    chance = row.trained or row.scorer == "random"
    return [replace(row, seed=seed) for seed in range(seeds if chance else 1)]


def row_config(cfg, row: StudyRow):
    """The config of a row. Where several blocks select, each keeps the same share."""
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
    """Whether a checkpoint has the weights of a row's scorers; where not, says so."""
    if row.scorer != "learned":
        return True
    missing = load(row_config(cfg, row), path)[1]
    if missing:
        print(f"left out: {row.name}, {path} has no weights of {missing[0]}", file=sys.stderr)
    return not missing


def load(cfg, path: str) -> tuple[nn.Module, list[str]]:
    """A row's model with a checkpoint of either engine, and its scorers' parameters that the
    checkpoint lacks.

    Raises:
        ValueError: where it is of another backbone.
    """
    model = build_model(cfg)
    checkpoint = pretrained_state(model, path) if os.path.isdir(path) else read_checkpoint(path)
    validate_checkpoint(model, checkpoint, cfg, "finetune", path)  # which lets other heads pass
    loaded = load_weights(model, checkpoint, strict=False)
    lost = [name for name in loaded.missing if not name.startswith("stts.")]
    if lost or loaded.mismatched:
        raise ValueError(f"{path} is not of this config's model: {loaded}")
    return model, list(loaded.missing)


# ---- running them ---------------------------------------------------------------------------


def run_rows(cfg, recipe, path: str, rows: Sequence[StudyRow], out: str) -> list[dict]:
    """The results of all rows; those that OUT/rows has are not measured again."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    clips = TestClips(cfg)
    if bool((clips.videos.labels == NO_LABEL).any()):
        raise ValueError(
            f"the test list in DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} has videos "
            "without a label: a study compares accuracies, so give every one its class"
        )
    tested = [digest(path), clips.videos.digest(), repr(find_truth(cfg))]
    trained = [ClipDataset(recipe, "train").videos.digest()] if any(r.trained for r in rows) else []
    device = "cuda" if cfg.NUM_GPUS > 0 and torch.cuda.is_available() else "cpu"
    columns = [SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn()]
    progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
    # All rows are trained on the same videos: they are decoded once where they fit.
    size = CACHE_BYTES // max(1, cfg.DATA_LOADER.NUM_WORKERS)
    results = []
    with progress, quiet_logs(), cache_frames(size):
        task = progress.add_task("rows", total=len(rows))
        batches = progress.add_task("batches", total=len(clips))
        for row in rows:
            progress.update(task, description=row.name)
            file = os.path.join(out, "rows", f"{row.name}.json")
            config = row_config(recipe if row.trained else cfg, row)
            key = fingerprint(config, [*tested, *(trained if row.trained else ())])
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
    """Trains a row's model from the checkpoint; goes on with what is there. Returns its weights."""
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
    """Tests a row's model; returns its line of the table and what it keeps."""
    from stts_slowfast.standalone.flops import count_gflops

    model, missing = load(cfg, path)
    if missing:
        raise ValueError(f"{path} has no weights of the scorers of {row.name}")
    size = cfg.DATA.TEST_CROP_SIZE
    gflops = count_gflops(model, torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, size, size))
    torch.manual_seed(cfg.RNG_SEED)
    model.to(device)
    found = evaluate(cfg, model, clips, lambda: progress.advance(task))
    names = {"name": row.name, "dimension": row.dimension}
    return {**names, **asdict(row), "gflops": round(gflops, 5), **found}


def fingerprint(cfg, inputs: Sequence[str]) -> str:
    """Of all that a row's result depends on: its config, but for where things lie, and inputs."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = cfg.TEST.CHECKPOINT_FILE_PATH = cfg.TRAIN.CHECKPOINT_FILE_PATH = ""
    cfg.DATA.PATH_TO_DATA_DIR = cfg.DATA.PATH_PREFIX = ""
    return hashlib.sha256("\n".join([cfg.dump(), *inputs]).encode()).hexdigest()[:16]


def digest(path: str) -> str:
    """SHA-256 of a checkpoint: a file, or a folder's files."""
    files = [path]
    if os.path.isdir(path):
        files = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    found = hashlib.sha256()
    for file in filter(g_pathmgr.isfile, files):
        with g_pathmgr.open(file, "rb") as opened:
            while block := opened.read(2**20):
                found.update(block)
    return found.hexdigest()


def read_row(path: str, key: str) -> dict | None:
    """A row that was measured before, if by the same config, checkpoint and lists."""
    try:
        with open(path) as file:
            result = json.load(file)
    except FileNotFoundError:
        return None
    if result.get("unreadable", 1):  # its videos may have been repaired; once they were not counted
        return None
    return result if result.pop("key") == key else None


class quiet_logs:
    """Keeps a run's lines out of the terminal; they go to its ``stdout.log`` as always."""

    def __enter__(self):
        self.handler = logging.NullHandler()
        logging.getLogger().addHandler(self.handler)

    def __exit__(self, *_):
        logging.getLogger().removeHandler(self.handler)
