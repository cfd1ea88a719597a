"""``stts bench --data`` and ``--end-to-end``: the loader alone, and tests from files to scores."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch

from stts_slowfast.tools.bench.spec import BenchSpec, build_all, map_rows, read_config
from stts_slowfast.tools.output import format_cell, markdown_table, write_json

SPLITS = ("train", "test")
DATA = ("row", "split", "workers", "clips", "videos / s", "clips / s", "core-ms / clip")
TEST = ("row", "workers", "videos", "seconds", "videos / s", "waiting s", "computing s")


def run(rows: Sequence[BenchSpec], args: argparse.Namespace) -> int:
    """Measures the rows' loaders or tests; prints a table and writes --json, both line by line as
    they are measured, and --plot.

    Raises:
        ValueError: naming every row whose data or model cannot be read or built.
    """
    columns, measure = (DATA, measure_loaders) if args.data else (TEST, measure_tests)
    measured = []
    for one in measure(rows, args):
        measured.append(one)
        row = [format_cell(one[column]) for column in columns]
        lines = markdown_table(columns, [row]).splitlines()
        print(*lines[0 if len(measured) == 1 else 2 :], sep="\n", flush=True)
        if args.json:
            write_json(args.json, measured)
    if args.plot:
        plot(measured, args.plot)
    return 0


# ---- the loader alone -----------------------------------------------------------------------


def measure_loaders(rows: Sequence[BenchSpec], args: argparse.Namespace) -> Iterator[dict]:
    """The first batches of training and testing, by number of workers.

    The time of a core is measured where there are no workers; workers of their own are not ours to
    measure.
    """
    for row, loaders in zip(rows, _all_loaders(rows, args.workers, SPLITS)):
        for split, workers, loader in loaders:
            _, views = _size(row, loader, split)
            start, busy = time.perf_counter(), time.process_time()
            clips = sum(len(batch) for batch in islice(batches(row, loader), args.batches))
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
            one = {"row": row.name, "split": split, "workers": workers, "clips": clips}
            one["videos / s"] = clips / views / seconds
            one["clips / s"] = clips / seconds
            one["core-ms / clip"] = None if workers else 1000 * busy / clips
            yield one
            print(f"{row.name} {split}, {workers} workers: {seconds:.1f} s", file=sys.stderr)


def batches(row: BenchSpec, loader) -> Iterator[torch.Tensor]:
    """The clips (B, 3, T, H, W) of a loader of either engine; of SlowFast's the fast pathway."""
    for batch in loader:
        yield batch[0][-1] if isinstance(batch[0], (list, tuple)) else batch[0]


def _all_loaders(
    rows: Sequence[BenchSpec], workers: Sequence[int], splits: Iterable[str]
) -> list[list[tuple[str, int, object]]]:
    return map_rows(
        rows, lambda row: _loaders(row, workers, splits), "has data that cannot be read"
    )


def _loaders(row: BenchSpec, workers: Sequence[int], splits: Iterable[str]):
    found = []
    for split in splits:
        for number in workers:
            cfg = read_config(row)
            cfg.DATA_LOADER.NUM_WORKERS = number
            found.append((split, number, _loader(row, cfg, split)))
    return found


def _loader(row: BenchSpec, cfg, split: str):
    if row.engine == "slowfast":
        from stts_slowfast.pyslowfast import bench

        return bench.loader(cfg, split)
    from stts_slowfast.standalone.data import build_loader

    return build_loader(cfg, split)


def _size(row: BenchSpec, loader, split: str) -> tuple[int, int]:
    """Videos of a split, and the clips that one of them gives."""
    cfg = read_config(row)
    if split == "train":
        return len(loader.dataset), cfg.AUG.NUM_SAMPLE
    views = cfg.TEST.NUM_ENSEMBLE_VIEWS * cfg.TEST.NUM_SPATIAL_CROPS
    items = len(loader.dataset)
    return (items // views if row.engine == "slowfast" else len(loader.dataset.videos)), views


# ---- a whole test ---------------------------------------------------------------------------


def measure_tests(rows: Sequence[BenchSpec], args: argparse.Namespace) -> Iterator[dict]:
    """All views of each row's test list through its model: time spent waiting for data, and
    computing (moving and normalising clips included)."""
    loaders = _all_loaders(rows, args.workers, ["test"])
    models = build_all(list(rows), args.device)
    for row, tests, (model, _) in zip(rows, loaders, models):
        model.eval()
        for _, workers, loader in tests:
            videos, _ = _size(row, loader, "test")
            waiting, computing = run_test(row, loader, model, args.device)
            seconds = waiting + computing
            one = {"row": row.name, "workers": workers, "videos": videos, "seconds": seconds}
            one |= {"videos / s": videos / seconds, "waiting s": waiting, "computing s": computing}
            yield one
            print(f"{row.name}, {workers} workers: {seconds:.1f} s", file=sys.stderr)


@torch.no_grad()
def run_test(
    row: BenchSpec,
    loader,
    model: Callable,
    device: str,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """Seconds of waiting and of computing over a whole loader, its start included."""
    prepare = _preparation(row)
    waiting = computing = 0.0
    last = now()
    for clips in batches(row, loader):
        got = now()
        model(prepare(clips.to(device))).float().cpu()  # .cpu() waits for the device
        done = now()
        waiting, computing, last = waiting + got - last, computing + done - got, done
    return waiting + now() - last, computing


def _preparation(row: BenchSpec) -> Callable:
    if row.engine == "slowfast":
        return lambda clips: clips
    from stts_slowfast.standalone.data import normalize_clips

    cfg = read_config(row)
    return lambda clips: normalize_clips(clips, cfg)


# ---- what is told ---------------------------------------------------------------------------


def plot(measured: Sequence[dict], path: str) -> None:
    """Bars: seconds of a whole test, split into waiting and computing, or clips a second."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.4 * len(measured)), layout="constrained")
    axes = figure.subplots()
    places = range(len(measured))
    labels = [
        " ".join(str(one[key]) for key in ("row", "split") if key in one)
        + (f", {one['workers']} workers")
        for one in measured
    ]
    if "seconds" in measured[0]:
        waiting = [one["waiting s"] for one in measured]
        axes.barh(places, waiting, label="waiting for data")
        computing = [one["computing s"] for one in measured]
        axes.barh(places, computing, left=waiting, label="computing")
        axes.set_xlabel("seconds of a whole test")
        axes.legend()
    else:
        axes.barh(places, [one["clips / s"] for one in measured])
        axes.set_xlabel("clips / s of the loader")
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)
