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
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch
from iopath.common.file_io import g_pathmgr

from stts_slowfast import load_config
from stts_slowfast.fidelity import OutputRecorder, compare
from stts_slowfast.standalone.annotations import NO_LABEL, VideoList
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.films import find_films, unlabelled
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.cli import add_opts
from stts_slowfast.tools.study.coverage import find_truth
from stts_slowfast.tools.study.evaluate import CACHE_BYTES, Reference, TestClips, evaluate
from stts_slowfast.tools.study.oracle import Oracle
from stts_slowfast.tools.study.results import ENDINGS, SCORERS, table, write_results
from stts_slowfast.tools.study.rows import (
    SHARES,
    StudyRow,
    find_checkpoint,
    has_scorer_weights,
    load_row_model,
    plan_rows,
    row_config,
)
from stts_slowfast.video import cache_frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts study``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of model and data")
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="weights (default: TEST.CHECKPOINT_FILE_PATH)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    for name, text in (
        ("--time", "frames"),
        ("--space", "each frame's tokens, as a window"),
        ("--tokens", "single tokens"),
    ):
        parser.add_argument(
            name,
            type=float,
            nargs="*",
            metavar="SHARE",
            help=f"budgets: shares of {text} (default: {', '.join(map(str, SHARES))}, if the "
            "config names blocks for them)",
        )
    parser.add_argument(
        "--both",
        nargs="*",
        metavar="TIMExSPACE",
        help="budgets: shares of both at once; of frames and single tokens, if the config names "
        "blocks for these and none for windows",
    )
    parser.add_argument(
        "--scorers",
        nargs="+",
        default=SCORERS,
        metavar="NAME",
        help="names of STTS.*.SCORER, or oracle: what the loss's gradient ranks best, with the "
        "labels known (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="of rows with random scores or fine-tuning"
    )
    parser.add_argument("--train", action="store_true", help="add a fine-tuned row for each row")
    parser.add_argument(
        "--fidelity",
        action="store_true",
        help="measure the agreement with all tokens, also on videos without labels",
    )
    parser.add_argument(
        "--films",
        metavar="FOLDER|LIST",
        help="with --fidelity: these videos, instead of the test list",
    )
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="config keys and values for --train only, such as SOLVER.MAX_EPOCH 10",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Measures the rows that have no file yet, and writes table and plot.

    Raises:
        ValueError: for a budget, scorer, config or checkpoint that cannot be used.
    """
    if args.fidelity and args.train:
        raise ValueError(
            "--fidelity compares the checkpoint with itself on all tokens, --train trains others: "
            "leave one out"
        )
    if args.fidelity and "oracle" in args.scorers:
        raise ValueError("--scorers oracle reads labels, --fidelity does without: leave one out")
    if args.films and not args.fidelity:
        raise ValueError("--films are videos without labels: add --fidelity")
    cfg = load_config(args.cfg, args.opts)
    if args.fidelity and cfg.TEST.COMPILE:
        raise ValueError(
            f"TEST.COMPILE is {cfg.TEST.COMPILE!r}, and --fidelity reads features inside it: "
            'set TEST.COMPILE ""'
        )
    cfg.OUTPUT_DIR = args.out  # for the list of unreadable videos
    recipe = load_config(args.cfg, [*args.opts, *args.recipe])
    path = find_checkpoint(cfg, args.checkpoint)
    rows = plan_rows(cfg, args)
    rows = [row for row in rows if row.trained or has_scorer_weights(cfg, row, path)]
    films = unlabelled(find_films(cfg, args.films)) if args.films else None
    os.makedirs(os.path.join(args.out, "rows"), exist_ok=True)
    results = run_rows(cfg, recipe, path, rows, args.out, args.fidelity, films)
    write_results(args.out, results)
    print(table(results))
    if unreadable := max(row["unreadable"] for row in results):
        print(f"{unreadable} of the test videos cannot be read, and count as wrong in all rows")
    print(f"wrote {', '.join(os.path.join(args.out, f'study.{end}') for end in ENDINGS)}")
    return 0


def run_rows(
    cfg,
    recipe,
    path: str,
    rows: Sequence[StudyRow],
    out: str,
    fidelity: bool = False,
    films: VideoList | None = None,
) -> list[dict]:
    """The results of all rows; rows with a valid file in OUT/rows are not measured again.

    Args:
        cfg, recipe: of rows of the checkpoint unchanged, and of rows that are fine-tuned.
        path: the checkpoint.
        rows, out: the rows, and the folder to write to.
        fidelity: whether to compare with the outputs of all tokens.
        films: videos instead of the test list.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

    clips = TestClips(cfg, films)
    if not fidelity and bool((clips.videos.labels == NO_LABEL).any()):
        raise ValueError(
            f"the test list in DATA.PATH_TO_DATA_DIR {cfg.DATA.PATH_TO_DATA_DIR!r} has videos "
            "without a label: a study compares accuracies, so give every one its class, or add "
            "--fidelity, which needs no labels"
        )
    test_inputs = [digest(path), clips.videos.digest(), repr(find_truth(cfg))]
    reference = None
    if fidelity:
        test_inputs.append("fidelity")
        reference = Reference(cfg, path, clips)
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
                result = measure(config, row, weights, clips, device, progress, batches, reference)
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


def measure(
    cfg,
    row: StudyRow,
    path: str,
    clips: TestClips,
    device: str,
    progress,
    task,
    reference: Reference | None = None,
) -> dict:
    """Tests a row's model, and compares it with the reference; returns its entry of study.json."""
    from stts_slowfast.standalone.flops import count_gflops

    model, missing = load_row_model(cfg, path)
    if missing:
        raise ValueError(f"{path} has no weights of the scorers of {row.name}")
    size = cfg.DATA.TEST_CROP_SIZE
    gflops = count_gflops(model, torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, size, size))
    torch.manual_seed(cfg.RNG_SEED)
    model.to(device)
    oracle = Oracle(model) if row.scorer == "oracle" else None
    with OutputRecorder(model, classes=True) if reference else contextlib.nullcontext() as recorder:
        result = evaluate(cfg, model, clips, lambda: progress.advance(task), oracle)
    if recorder:
        found = clips.only_readable(recorder.outputs())
        if row.scorer == "all":
            reference.found = found
        result |= compare(reference.outputs(device), found)
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
