"""Times what a DataLoader's worker does for a video, in core-milliseconds, several ways in turn.

    SLOWFAST_ROOT=/path/to/SlowFast PYTHONPATH=. OMP_NUM_THREADS=1 \\
        python projects/stts/benchmarks/loader.py [--tables ...] [--profile]

Three processes take turns in every round: SlowFast's datasets as this package patched them at the
commit BASELINE, SlowFast as it is patched today, and the standalone runner. A row is the median of
its rounds (the mean for training items, whose augmentation is random) in processor time of the
process, so that other load on the machine matters little. ``--profile`` profiles today's rows.
Installed decoders read the same frames.
"""

import argparse
import cProfile
import importlib
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

import av
import numpy as np
import torch

BASELINE = "bb2c245"
SLOWFAST = os.environ.get("SLOWFAST_ROOT")
FRAMES, VIEWS = 300, 10
TITLES = {
    "views": "test, 10 views x 1 crop: a video",
    "crops": "test, 10 views x 3 crops: a video",
    "train": "training: an item of 2 samples",
    "open": "opening an mp4 of 36,000 frames",
}


# ---- videos ---------------------------------------------------------------------------------


def write_video(
    path: Path,
    frames: int,
    height: int,
    width: int,
    grain: float,
    codec: str = "libx264",
    **options,
) -> None:
    """Objects that rotate and drift over a panned background: textures with the spectrum of natural
    images, and grain; encoded by x264's defaults (with B-frames)."""
    rng = np.random.default_rng(0)
    back, front = _texture(rng, 512), _texture(rng, 256)
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width) * width / height, indexing="ij"
    )

    def look(texture, across, down):
        grid = torch.stack([across, down], -1)[None]
        return torch.nn.functional.grid_sample(
            texture, grid, padding_mode="reflection", align_corners=False
        )[0]

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            t = number / 30
            zoom = 0.4 + 0.05 * np.sin(t / 2)
            image = look(back, x * zoom + 0.3 * np.sin(t / 2), y * zoom + 0.2 * np.cos(0.4 * t))
            for each in range(3):
                turn = t * (0.9 + 0.4 * each) + 2 * each
                u = (x - 1.2 * np.sin(turn)) / (0.28 + 0.05 * each)
                v = (y - 0.6 * np.cos(1.3 * turn)) / (0.28 + 0.05 * each)
                across = np.cos(turn) * u - np.sin(turn) * v
                down = np.sin(turn) * u + np.cos(turn) * v
                inside = u * u + 1.5 * v * v < 1
                image = torch.where(inside, look(front, across / 2, down / 2).flip(0), image)
            pixels = image.permute(1, 2, 0).numpy() + grain * rng.standard_normal(
                (height, width, 1)
            )
            pixels = pixels.clip(0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _texture(rng, size: int) -> torch.Tensor:
    """(1, 3, size, size) around 110; amplitudes decrease with frequency."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)) + 1 / size
    waves = np.fft.rfft2(rng.standard_normal((3, size, size))) / frequency**1.1
    waves[:, 0, 0] = 0
    image = np.fft.irfft2(waves, (size, size))
    return torch.from_numpy(110 + 45 * image / image.std((1, 2), keepdims=True)).float()[None]


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
        if hasattr(video, "reader"):
            video.reader._memory.items.clear()
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


def compare(title: str, ways: dict, rounds: int, average=statistics.median) -> None:
    """Prints the average of each way and the ratio of the first to it. A way is a function from
    the round's number to milliseconds."""
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            times[name].append(way(number))
    print(f"\n{title}")
    first = None
    for name, values in times.items():
        value = average(values[1:])  # the first round warms up
        first = first or value
        print(f"  {name:<58} {value:8.1f} ms  {first / value:5.1f}x", flush=True)


def baseline(folder: Path, commit: str = BASELINE) -> Path:
    """A copy of the package at a commit."""
    archive, root = folder / "baseline.tar", Path(__file__).resolve().parents[3]
    command = ["git", "archive", "-o", archive, commit, "stts_slowfast"]
    subprocess.run(command, cwd=root, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "baseline", filter="data")
    return folder / "baseline"


# ---- decoders -------------------------------------------------------------------------------


def wanted_frames() -> list[list[int]]:
    from stts_slowfast.video import clip_frames

    return [clip_frames(FRAMES, 30.0, 16, 4, clip_idx=n, num_clips=VIEWS) for n in range(VIEWS)]


def decoder_ways(path: str, threads: int) -> dict:
    """Functions that read the frames of all views in RGB."""
    from stts_slowfast.video import Video

    clips = wanted_frames()
    wanted = sorted(set().union(*clips))

    def stock():
        for clip in clips:
            with Video(path, threads=threads) as video:
                video.decode(range(clip[0], min(clip[0] + 64, FRAMES)))

    def alone():
        for clip in clips:
            with Video(path, threads=threads) as video:
                video.decode(clip)

    def one_pass():
        with Video(path, threads=threads) as video:
            video.decode(wanted)

    ways = {
        "SlowFast's way: each view's span": stock,
        "this reader, view by view": alone,
        "this reader, one pass": one_pass,
    }
    for name, make in (("torchcodec.decoders", torchcodec), ("cv2", opencv), ("decord", decord)):
        try:
            read = make(importlib.import_module(name), path, wanted, threads)
            read()
        except Exception as error:  # missing, or without the libraries that it needs
            print(f"left out: {name} ({' '.join(str(error).split())[:50]})")
            continue
        package = importlib.import_module(name.split(".")[0])
        ways[f"{package.__name__} {getattr(package, '__version__', '')}".strip()] = read
    return ways


def torchcodec(module, path, wanted, threads):
    def read():
        decoder = module.VideoDecoder(path, num_ffmpeg_threads=threads, dimension_order="NHWC")
        return decoder.get_frames_at(wanted).data

    return read


def opencv(cv2, path, wanted, threads):
    def read():
        cv2.setNumThreads(1)
        video, left = (
            cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads]),
            set(wanted),
        )
        for number in range(wanted[-1] + 1):
            video.grab()
            if number in left:
                cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)

    return read


def decord(module, path, wanted, threads):
    return lambda: module.VideoReader(path, num_threads=threads).get_batch(wanted).asnumpy()


def timed(way, clock):
    def milliseconds(number: int) -> float:
        start = clock()
        way()
        return 1000 * (clock() - start)

    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    tables = [*TITLES, "decoders"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--profile", action="store_true", help="profile today's rows")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve[0], Path(arguments.serve[1]))
    with tempfile.TemporaryDirectory() as name:
        folder, here = Path(name), Path(__file__).resolve().parents[3]
        write_video(folder / "clip.mp4", FRAMES, 256, 456, 2.0, g="250")
        if "open" in arguments.tables:
            write_video(folder / "long.mp4", 36000, 32, 48, 0.0, preset="ultrafast")
        for split in ("train", "val", "test"):
            (folder / f"{split}.csv").write_text(f"{folder / 'clip.mp4'} 0\n")
        rows = {"standalone": ("standalone", here)}
        if SLOWFAST:
            stock = {"SlowFast, as it was": ("slowfast", baseline(folder))}
            rows = {**stock, "SlowFast": ("slowfast", here), **rows}
        workers = {row: Worker(*row_of, folder, arguments.profile) for row, row_of in rows.items()}
        for table in arguments.tables:
            if table == "decoders":
                continue
            ways = {row: lambda n, w=worker, t=table: w(t, n) for row, worker in workers.items()}
            if table == "train" and "SlowFast" in workers:
                ways["SlowFast, STTS.FAST_AUGMENT True"] = lambda n: workers["SlowFast"]("fast", n)
            training = table == "train"
            rounds = arguments.rounds * (8 if training else 1)
            compare(
                TITLES[table], ways, rounds, statistics.fmean if training else statistics.median
            )
            if arguments.profile:
                for row in list(rows)[1:]:
                    print(f"\n{TITLES[table]}, {row}:", file=sys.stderr, flush=True)
                    workers[row](table, 1, profile=True)
                    if table == "train" and row == "SlowFast":
                        workers[row]("fast", 1, profile=True)
        if "decoders" in arguments.tables:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                ways = decoder_ways(str(folder / "clip.mp4"), threads)
                for clock in (time.process_time, time.perf_counter):
                    title = f"frames of 10 views in RGB, {threads} threads, {clock.__name__}"
                    timed_ways = {name: timed(way, clock) for name, way in ways.items()}
                    compare(title, timed_ways, arguments.rounds, min)


if __name__ == "__main__":
    main()
