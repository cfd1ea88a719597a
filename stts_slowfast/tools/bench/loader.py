"""``stts bench --data`` and ``--end-to-end``: only the loaders, and tests from files to scores."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import nn

from stts_slowfast.evaluation import evaluating, matmul_precision
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench import checks
from stts_slowfast.tools.bench.spec import BenchSpec, build_all, map_rows, read_config
from stts_slowfast.tools.markdown import format_cell, markdown_table

SPLITS = ("train", "test")
DATA_COLUMNS = ("row", "split", "workers", "clips", "videos / s", "clips / s", "core-ms / clip")
TEST_COLUMNS = ("row", "workers", "videos", "seconds", "videos / s", "waiting s", "computing s")


def run(rows: Sequence[BenchSpec], args: argparse.Namespace) -> int:
    """Measures loaders or tests; prints the table and writes --json after each measurement, and
    draws --plot.

    Raises:
        ValueError: naming every row whose data or model cannot be read or built.
    """
    columns, measure = TEST_COLUMNS, measure_tests
    if args.data:
        columns, measure = DATA_COLUMNS, measure_loaders
    measured = []
    for result in measure(rows, args):
        measured.append(result)
        cells = [format_cell(result[column]) for column in columns]
        lines = markdown_table(columns, [cells]).splitlines()
        print(*lines[0 if len(measured) == 1 else 2 :], sep="\n", flush=True)
        if args.json:
            write_json(args.json, measured)
    if args.plot:
        plot(measured, args.plot)
    return 0


# ---- only the loader ------------------------------------------------------------------------


def measure_loaders(rows: Sequence[BenchSpec], args: argparse.Namespace) -> Iterator[dict]:
    """The first batches of training and testing, by number of workers.

    Core time is measured only without workers: it does not include other processes.
    """
    for row, loaders in zip(rows, _all_loaders(rows, args.workers, SPLITS)):
        for split, workers, loader in loaders:
            _, views = _size(row, loader, split)
            start, busy = time.perf_counter(), time.process_time()
            clips = sum(len(batch) for batch in islice(batches(row, loader), args.batches))
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            yield {
                **{"row": row.name, "split": split, "workers": workers, "clips": clips},
                "videos / s": clips / views / seconds,
                "clips / s": clips / seconds,
                "core-ms / clip": None if workers else 1000 * busy / clips,
            }
            print(f"{row.name} {split}, {workers} workers: {seconds:.1f} s", file=sys.stderr)


def batches(row: BenchSpec, loader) -> Iterator[torch.Tensor]:
    """The clips (B, 3, T, H, W) of either engine's loader; SlowFast's fast pathway."""
    for batch in loader:
        yield batch[0][-1] if isinstance(batch[0], (list, tuple)) else batch[0]


def _all_loaders(
    rows: Sequence[BenchSpec], workers: Sequence[int], splits: Iterable[str]
) -> list[list[tuple[str, int, object]]]:
    return map_rows(
        rows, lambda row: _loaders(row, workers, splits), "has data that cannot be read"
    )


def _loaders(row: BenchSpec, workers: Sequence[int], splits: Iterable[str]):
    loaders = []
    for split in splits:
        for number in workers:
            cfg = read_config(row)
            cfg.DATA_LOADER.NUM_WORKERS = number
            loaders.append((split, number, _loader(row, cfg, split)))
    return loaders


def _loader(row: BenchSpec, cfg, split: str):
    if row.engine == "slowfast":
        from stts_slowfast.pyslowfast import bench

        return bench.loader(cfg, split)
    from stts_slowfast.standalone.data import build_loader

    return build_loader(cfg, split)


def _size(row: BenchSpec, loader, split: str) -> tuple[int, int]:
    """Number of videos of a split, and of clips of a video."""
    cfg = read_config(row)
    if split == "train":
        return len(loader.dataset), cfg.AUG.NUM_SAMPLE
    views = cfg.TEST.NUM_ENSEMBLE_VIEWS * cfg.TEST.NUM_SPATIAL_CROPS
    items = len(loader.dataset)
    return (items // views if row.engine == "slowfast" else len(loader.dataset.videos)), views


# ---- a whole test ---------------------------------------------------------------------------


def measure_tests(rows: Sequence[BenchSpec], args: argparse.Namespace) -> Iterator[dict]:
    """Runs each row's model over its whole test list: seconds spent waiting for data, and
    computing (transfer and normalisation of clips included). Models run as their keys of precision
    and compilation say."""
    loaders = _all_loaders(rows, args.workers, ["test"])
    models = build_all(list(rows), args.device, checks.check_choices)
    for row, tests, (model, _) in zip(rows, loaders, models):
        model.eval()
        for _, workers, loader in tests:
            videos, _ = _size(row, loader, "test")
            with evaluating_as_configured(row, model):
                waiting, computing = run_test(row, loader, model, args.device)
            seconds = waiting + computing
            yield {
                **{"row": row.name, "workers": workers, "videos": videos, "seconds": seconds},
                **{"videos / s": videos / seconds, "waiting s": waiting, "computing s": computing},
            }
            print(f"{row.name}, {workers} workers: {seconds:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def evaluating_as_configured(row: BenchSpec, model: nn.Module) -> Iterator[None]:
    """Context manager: a row's model runs as in a test of its config."""
    cfg = read_config(row)
    precision, mode = (checks.key_value(cfg, key) for key in (checks.PRECISION, checks.COMPILE))
    with matmul_precision(row.matmul_precision), evaluating(model, precision, mode):
        yield


@torch.no_grad()
def run_test(
    row: BenchSpec,
    loader,
    model: Callable,
    device: str,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of waiting and of computing over a whole loader, including its start."""
    normalize = _normalization(row)
    waiting = computing = 0.0
    last = now()
    for clips in batches(row, loader):
        got = now()
        model(normalize(clips.to(device))).float().cpu()  # .cpu() waits for the device
        done = now()
        waiting, computing, last = waiting + got - last, computing + done - got, done
    return waiting + now() - last, computing


def _normalization(row: BenchSpec) -> Callable:
    if row.engine == "slowfast":
        return lambda clips: clips
    from stts_slowfast.standalone.data import normalize_clips

    cfg = read_config(row)
    return lambda clips: normalize_clips(clips, cfg)


# ---- plot -----------------------------------------------------------------------------------


def plot(measured: Sequence[dict], path: str) -> None:
    """Bars: seconds of a whole test, split into waiting and computing, or clips per second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(measured)), layout="constrained")
    axes = figure.subplots()
    positions = range(len(measured))
    labels = [
        f"{' '.join(result[key] for key in ('row', 'split') if key in result)}, "
        f"{result['workers']} workers"
        for result in measured
    ]
    if "seconds" in measured[0]:
        waiting = [result["waiting s"] for result in measured]
        axes.barh(positions, waiting, label="waiting for data")
        computing = [result["computing s"] for result in measured]
        axes.barh(positions, computing, left=waiting, label="computing")
        axes.set_xlabel("seconds of a whole test")
        axes.legend()
    else:
        axes.barh(positions, [result["clips / s"] for result in measured])
        axes.set_xlabel("clips / s of the loader")
    axes.set_yticks(positions, labels)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
