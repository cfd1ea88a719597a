"""Times this package's reader and other decoders that are installed, in turn, on the same frames.

    OMP_NUM_THREADS=1 python projects/stts/benchmarks/decoders.py [--json FILE]

The frames are those of 10 views of MViT-B, in RGB, decoded by one thread and by two.
"""

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from sample_videos import FRAMES, write_folder

from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench.command import machine
from stts_slowfast.video import Video, clip_frames

VIEWS = 10


def wanted_frames() -> list[list[int]]:
    """The frames of each view."""
    return [clip_frames(FRAMES, 30.0, 16, 4, clip_idx=n, num_clips=VIEWS) for n in range(VIEWS)]


def decoder_ways(path: str, threads: int) -> dict:
    """Functions that read the frames of all views in RGB."""
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
        options, left = [cv2.CAP_PROP_N_THREADS, threads], set(wanted)
        video = cv2.VideoCapture(path, cv2.CAP_FFMPEG, options)
        for number in range(wanted[-1] + 1):
            video.grab()
            if number in left:
                cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)

    return read


def decord(module, path, wanted, threads):
    return lambda: module.VideoReader(path, num_threads=threads).get_batch(wanted).asnumpy()


def milliseconds(way: Callable) -> tuple[float, float]:
    """Core time and wall clock of a call."""
    start = time.process_time(), time.perf_counter()
    way()
    busy, passed = time.process_time() - start[0], time.perf_counter() - start[1]
    return 1000 * busy, 1000 * passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), 1)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ways = decoder_ways(f"{folder}/0.mp4", threads)
            found = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    found[name].append(milliseconds(way))
            for name, times in found.items():
                busy, passed = map(list, zip(*times))
                rows.append({"way": name, "threads": threads, "core_ms": busy, "ms": passed})
                print(f"{threads} threads: {name:<40} {min(busy):8.1f} core-ms", flush=True)
    if args.json:
        write_json(args.json, machine("cpu") | {"rows": rows})


if __name__ == "__main__":
    main()
