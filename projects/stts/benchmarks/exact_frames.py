"""Times the cost of exact frames: this reader beside the one that trusted the container's index.

    PYTHONPATH=. OMP_NUM_THREADS=1 python projects/stts/benchmarks/exact_frames.py [--json FILE]

Core-milliseconds for a training clip (16 frames, every fourth, from a random start) and for the
frames of 10 views: of a file that the process reads for the first time ("cold"), and again
("warm"). The reader at the commit BASELINE and today's take turns, each in a process; a row is
the minimum of its rounds, since other jobs may share the cores.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import loader
from sample_videos import draw_images, write_video

BASELINE = "a56a37f"
# UCF-101 and HMDB-51 are MPEG-4 part 2 in AVI, some 320x240 at 25 or 30 frames a second.
VIDEOS = {
    "H.264 in mp4, 10 s of 456x256": ("video.mp4", 300, 256, 456, "libx264", {"g": "250"}),
    "H.264 in Matroska, 10 s of 456x256": ("video.mkv", 300, 256, 456, "libx264", {"g": "250"}),
    "H.264 in mp4, 10 s of 32x16": ("tiny.mp4", 300, 16, 32, "libx264", {"g": "250"}),
    "MPEG-4 in AVI, 7 s of 320x240": ("plain.avi", 210, 240, 320, "mpeg4", {"g": "60"}),
    "the same with B-frames": ("b.avi", 210, 240, 320, "mpeg4", {"g": "60", "bf": "2"}),
}
WAYS = "a clip, cold", "a clip, warm", "10 views, cold", "10 views, warm"


def serve(folder: str) -> None:
    """Reads lines ``name way number`` from stdin; prints the milliseconds of each."""
    from stts_slowfast.video import Video, reader

    cache = reader._cache if hasattr(reader, "_cache") else reader._memory  # BASELINE's name
    for line in sys.stdin:
        name, way, number = line.split()
        if way in "02":
            cache.clear()
        start = time.process_time()
        with Video(os.path.join(folder, name)) as video:
            room, rng = video.num_frames - 64, random.Random(int(number))
            starts = [rng.randrange(room)] if way in "01" else range(0, room, room // 10)
            video.decode(sorted({begin + 4 * i for begin in starts for i in range(16)}))
        print(1000 * (time.process_time() - start), flush=True)


def start(package: Path, folder: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", folder],
        env={**os.environ, "PYTHONPATH": f"{package}:{Path(__file__).parent}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    with tempfile.TemporaryDirectory() as folder:
        before = loader.baseline(Path(folder), BASELINE)
        for name, frames, height, width, codec, options in VIDEOS.values():
            path = Path(folder) / name
            write_video(path, draw_images(frames, height, width), codec, **options)
        readers = [start(package, folder) for package in (before, Path(__file__).parents[3])]
        measure(readers, arguments)
        for reader in readers:
            reader.stdin.close()
            reader.wait()


def measure(readers: list[subprocess.Popen], arguments: argparse.Namespace) -> None:
    """Both readers take turns; --json is written after each row."""
    from stts_slowfast.standalone.run_logger import write_json
    from stts_slowfast.tools.bench.command import machine

    rows = []
    for title, (name, *_) in VIDEOS.items():
        for way, way_title in enumerate(WAYS):
            times = [[], []]
            for number in range(arguments.rounds + 2):
                for reader, values in zip(readers, times):
                    print(name, way, number, file=reader.stdin, flush=True)
                    values.append(float(reader.stdout.readline()))
            times = dict(zip(("before", "today"), times))
            rows.append({"video": title, "way": way_title, "ms": times})
            print(title, way_title, {key: round(min(each), 1) for key, each in times.items()})
            if arguments.json:
                write_json(arguments.json, machine("cpu") | {"rows": rows})


if __name__ == "__main__":
    main()
