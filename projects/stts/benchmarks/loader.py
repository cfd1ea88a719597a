"""Times what a DataLoader's worker does for a video, in core-milliseconds, several ways in turn.

    SLOWFAST_ROOT=/path/to/SlowFast PYTHONPATH=. OMP_NUM_THREADS=1 \\
        python projects/stts/benchmarks/loader.py [--tables ...] [--json FILE] [--profile]

Three processes take turns in every round: SlowFast's datasets as this package patched them at the
commit BASELINE, SlowFast as it is patched today, and the standalone runner. Processor time of the
process is measured, so that other load on the machine matters little. ``--profile`` profiles the
rows of today.
"""

import argparse
import cProfile
import itertools
import os
import pstats
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sample_videos import draw_images, write_folder, write_video

BASELINE = "bb2c245"
SLOWFAST = os.environ.get("SLOWFAST_ROOT")
VIEWS = 10
TITLES = {
    "views": "test, 10 views x 1 crop: a video",
    "crops": "test, 10 views x 3 crops: a video",
    "train": "training: an item of 2 samples",
    "open": "opening an mp4 of 36,000 frames",
}


# ---- what a worker does ---------------------------------------------------------------------


def settings(cfg, folder: Path, crops: int):
    """MViT-B's clips, crops and augmentation."""
    cfg.DATA.PATH_TO_DATA_DIR, cfg.OUTPUT_DIR = str(folder), str(folder)
    cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE = 16, 4
    cfg.DATA.TRAIN_JITTER_SCALES = [256, 320]
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = [0.08, 1.0]
    cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE = [0.75, 1.3333]
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 224
    cfg.DATA.DECODING_BACKEND = "torchvision"
    cfg.DATA.INPUT_CHANNEL_NUM = [3]
    cfg.AUG.ENABLE, cfg.AUG.NUM_SAMPLE = True, 2
    cfg.AUG.AA_TYPE, cfg.AUG.RE_PROB = "rand-m7-n4-mstd0.5-inc1", 0.25
    cfg.MODEL.NUM_CLASSES = 400
    if "READ_TIMEOUT" in cfg.DATA:  # it reads in a thread, which the profiler does not see
        cfg.DATA.READ_TIMEOUT = 0.0
    cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = VIEWS, crops
    return cfg


def slowfast_ways(folder: Path) -> dict:
    """SlowFast's Kinetics dataset, with the decoder as the imported package patches it."""
    sys.path.insert(0, SLOWFAST)
    from stts_slowfast.pyslowfast.autoload import register_hooks

    register_hooks()
    from slowfast.config.defaults import get_cfg
    from slowfast.datasets import build_dataset

    def dataset(split: str, crops: int = 1):
        cfg = settings(get_cfg(), folder, crops)
        cfg.MODEL.ARCH, cfg.NUM_GPUS = "mvit", 0
        return build_dataset("kinetics", cfg, split)

    def views(crops: int):
        items = dataset("test", crops)
        return lambda number: [items[view] for view in range(VIEWS * crops)]

    train, ways = dataset("train"), {"views": views(1), "crops": views(3)}
    ways["train"] = lambda number: train[0]
    if "FAST_AUGMENT" in train.cfg.get("STTS", {}):
        fast = dataset("train")
        fast.cfg.STTS.FAST_AUGMENT = True
        ways["fast"] = lambda number: fast[0]
    return ways


def standalone_ways(folder: Path) -> dict:
    from stts_slowfast.standalone.config import get_cfg
    from stts_slowfast.standalone.data import ClipDataset

    def views(crops: int):
        items = ClipDataset(settings(get_cfg(), folder, crops), "test")
        return lambda number: items[0]

    train = ClipDataset(settings(get_cfg(), folder, 1), "train")
    return {"views": views(1), "crops": views(3), "train": lambda number: train[number, 0]}


def opening_ways(folder: Path) -> dict:
    from stts_slowfast import video

    def opening(number: int) -> None:
        if hasattr(video, "reader"):  # BASELINE has no cache
            video.reader._cache.clear()
        video.Video(str(folder / "long.mp4")).close()

    def again(number: int) -> None:
        video.Video(str(folder / "long.mp4")).close()

    return {"open": opening, "again": again}


class Ways(torch.utils.data.Dataset):
    """An item is ``way number profile``; reading it in a worker prints its time."""

    def __init__(self, engine: str, folder: Path):
        self.ways = opening_ways(folder)
        self.ways |= slowfast_ways(folder) if engine == "slowfast" else standalone_ways(folder)

    def __getitem__(self, line: str) -> int:
        torch.set_num_threads(1)
        name, number, profile = line.split()
        random.seed(number), np.random.seed(int(number)), torch.manual_seed(int(number))
        profiler = cProfile.Profile(time.process_time)
        run = profiler.runcall if profile == "True" else lambda way, number: way(number)
        start = time.process_time()
        run(self.ways[name], int(number))
        took = 1000 * (time.process_time() - start)
        if profile == "True":
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(16)
        print("took", took, flush=True)
        return 0


def serve(engine: str, folder: Path) -> None:
    """Has a DataLoader's worker read the items that the parent process asks for."""
    loader = torch.utils.data.DataLoader(
        Ways(engine, folder), None, sampler=iter(sys.stdin.readline, ""), num_workers=1
    )
    for _ in loader:
        pass


class Worker:
    """A process with one engine, imported from the folder ``package``."""

    def __init__(self, engine: str, package: Path, folder: Path, profile: bool):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", engine, str(folder)],
            env={**os.environ, "PYTHONPATH": str(package)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if profile else subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, way: str, number: int, profile: bool = False) -> float:
        print(way, number, profile, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("took "):
                return float(line.split()[1])
        raise SystemExit(f"a process ended: {self.process.args} (--profile shows its messages)")


def take_turns(ways: dict, rounds: int) -> dict[str, list[float]]:
    """The milliseconds of each way in each round, after one that warms up. A way is a function from
    the round's number to milliseconds."""
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            milliseconds = way(number)
            if number:
                times[name].append(milliseconds)
    for name, values in times.items():
        print(f"  {name:<50} {statistics.median(values):8.1f} ms", flush=True)
    return times


def baseline(folder: Path, commit: str = BASELINE) -> Path:
    """A copy of the package at a commit."""
    archive, root = folder / "baseline.tar", Path(__file__).resolve().parents[3]
    command = ["git", "archive", "-o", archive, commit, "stts_slowfast"]
    subprocess.run(command, cwd=root, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "baseline", filter="data")
    return folder / "baseline"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tables", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--profile", action="store_true", help="profile today's rows")
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve[0], Path(arguments.serve[1]))
    with tempfile.TemporaryDirectory() as name:
        folder, here = Path(name), Path(__file__).resolve().parents[3]
        write_folder(folder, 1)
        if "open" in arguments.tables:
            images = itertools.islice(itertools.cycle(draw_images(30, 32, 48)), 36000)
            write_video(folder / "long.mp4", images, preset="ultrafast")
        engines = {"standalone": ("standalone", here)}
        if SLOWFAST:
            stock = {"SlowFast, as it was": ("slowfast", baseline(folder))}
            engines = {**stock, "SlowFast": ("slowfast", here), **engines}
        workers = {
            way: Worker(*engine, folder, arguments.profile) for way, engine in engines.items()
        }
        measure(workers, arguments)


def measure(workers: dict[str, Worker], arguments: argparse.Namespace) -> None:
    """Measures the tables one after the other; --json is written after each."""
    from stts_slowfast.standalone.run_logger import write_json
    from stts_slowfast.tools.bench.command import machine

    rows = []
    for table in arguments.tables:
        ways = {way: lambda n, w=worker, t=table: w(t, n) for way, worker in workers.items()}
        if table == "train" and "SlowFast" in workers:
            ways["SlowFast, STTS.FAST_AUGMENT"] = lambda n: workers["SlowFast"]("fast", n)
        if table == "open":
            ways["again, in the same worker"] = lambda n: workers["standalone"]("again", n)
        rounds = arguments.rounds * (4 if table == "train" else 1)
        print(f"\n{TITLES[table]}")
        times = take_turns(ways, rounds)
        rows += [{"table": table, "way": way, "ms": each} for way, each in times.items()]
        if arguments.json:
            write_json(arguments.json, machine("cpu") | {"rows": rows})
        if arguments.profile:
            for way in list(workers)[1:]:
                print(f"\n{TITLES[table]}, {way}:", file=sys.stderr, flush=True)
                workers[way](table, 1, profile=True)
                if table == "train" and way == "SlowFast":
                    workers[way]("fast", 1, profile=True)


if __name__ == "__main__":
    main()
