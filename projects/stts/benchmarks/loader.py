"""Times what a DataLoader's worker does for a video, in core-milliseconds, ways side by side.

    PYTHONPATH=. OMP_NUM_THREADS=1 python projects/stts/benchmarks/loader.py

Where SlowFast can be imported (SLOWFAST_ROOT is a checkout), its own dataset stands beside ours: as
it was (each view decoded as if it were the only one, all frames of its span), and with views in one
pass. Decoders that are installed (torchcodec, cv2, decord) read the same frames. Every row is the
median of rounds in which all rows take turns (of training items, whose augmentation is drawn, the
mean), in processor time of one core: what else the machine does matters little.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.defaults import get_cfg
from stts_slowfast.video import Video, clip_span, frame_indices, reader

SLOWFAST = os.environ.get("SLOWFAST_ROOT")


def write_video(path: Path, frames: int, height: int, width: int, seed: int, preset: str) -> None:
    """Textured squares that drift, with grain, so that the encoder has something to do."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 255, (height // 8 + 24, width // 8 + 40, 3), dtype=np.uint8)
    texture = np.kron(texture, np.ones((8, 8, 1), np.uint8))
    grain = rng.integers(0, 16, (8, height, width, 1), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"preset": preset})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(frames):
            top, left = number // 3 % 160, number % 300
            image = texture[top : top + height, left : left + width] // 2 + grain[number * 5 % 8]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def compare(title: str, ways: dict, rounds: int, average=statistics.median) -> None:
    """Prints the average of each way, and how many times the first takes as long."""
    times = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(1000 * (time.process_time() - start))
    print(f"\n{title}")
    first = None
    for name, values in times.items():
        value = average(values[1:])  # the first round warms up
        first = first or value
        print(f"  {name:<58} {value:8.1f} ms  {first / value:5.1f}x")


def settings(cfg, folder: Path):
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
    cfg.TEST.NUM_ENSEMBLE_VIEWS = 10
    return cfg


def slowfast_dataset(folder: Path, split: str, **test):
    """SlowFast's Kinetics dataset, with the decoder that we mend."""
    if SLOWFAST not in sys.path:
        sys.path.insert(0, SLOWFAST)
    import stts_slowfast.pyslowfast

    stts_slowfast.pyslowfast.autoload.register_hooks()
    from slowfast.config.defaults import get_cfg as slowfast_cfg
    from slowfast.datasets import build_dataset

    cfg = settings(slowfast_cfg(), folder)
    cfg.MODEL.ARCH, cfg.NUM_GPUS = "mvit", 0
    cfg.TEST.update(test)
    return build_dataset("kinetics", cfg, split)


def as_it_was(item):
    """Runs ``item()`` with every clip decoded for itself, whole."""
    from stts_slowfast.pyslowfast import decoder

    def read(file, whole, taken, later):
        frames = file.video.decode(whole, file.short_side)
        file.close()
        return frames

    ours, decoder._File.read = decoder._File.read, read
    try:
        item()
    finally:
        decoder._File.read = ours


def test_ways(folder: Path, crops: int) -> dict:
    cfg = settings(get_cfg(), folder)
    cfg.TEST.NUM_SPATIAL_CROPS = crops
    ours = ClipDataset(cfg, "test")
    ways = {}
    if SLOWFAST:
        stock = slowfast_dataset(folder, "test", NUM_SPATIAL_CROPS=crops)

        def views():
            for view in range(10 * crops):
                stock[view]

        ways["SlowFast, view by view"] = lambda: as_it_was(views)
        ways["SlowFast, one pass"] = views
    ways["standalone, one pass"] = lambda: ours[0]
    return ways


def train_ways(folder: Path) -> dict:
    cfg = settings(get_cfg(), folder)
    ours, ways, count = ClipDataset(cfg, "train"), {}, iter(range(10**6))
    if SLOWFAST:
        stock = slowfast_dataset(folder, "train")
        ways["SlowFast, as it was"] = lambda: as_it_was(lambda: stock[0])
        ways["SlowFast"] = lambda: stock[0]
    ways["standalone"] = lambda: ours[next(count), 0]
    return ways


def opening_ways(path: str) -> dict:
    def opening(**patches):
        def way():
            saved = {name: getattr(reader, name) for name in patches}
            vars(reader).update(patches)
            reader._memory.items.clear()
            Video(path).close()
            vars(reader).update(saved)

        return way

    def remembered():
        Video(path).close()

    ways = {"by all its packets": opening(from_index=lambda *_: None), "by its index": opening()}
    return {**ways, "remembered": remembered}


def decoder_ways(path: str, views: int) -> dict:
    clips = [frame_indices(*clip_span(300, 64, view, views), 16, 300) for view in range(views)]
    wanted = sorted(set().union(*clips))

    def alone():
        for clip in clips:
            with Video(path) as video:
                video.decode(clip)

    def one_pass():
        with Video(path) as video:
            video.decode(wanted)

    ways = {"this reader, view by view": alone, "this reader, one pass": one_pass}
    for name, make in (("torchcodec", torchcodec), ("cv2", opencv), ("decord", decord)):
        try:
            module = importlib.import_module(
                name if name != "torchcodec" else "torchcodec.decoders"
            )
            read = make(module, path, wanted)
            read()
        except Exception as error:  # missing, or installed without the libraries that it needs
            print(f"left out: {name} ({' '.join(str(error).split())[:50]})")
            continue
        ways[f"{name} {getattr(module, '__version__', '')}".strip()] = read
    return ways


def torchcodec(module, path, wanted):
    def read():
        decoder = module.VideoDecoder(path, num_ffmpeg_threads=1, dimension_order="NHWC")
        decoder.get_frames_at(wanted)

    return read


def opencv(cv2, path, wanted):
    def read():
        cv2.setNumThreads(1)
        video, left = (
            cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]),
            set(wanted),
        )
        for number in range(wanted[-1] + 1):
            video.grab()
            if number in left:
                cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB)

    return read


def decord(module, path, wanted):
    return lambda: module.VideoReader(path, num_threads=1).get_batch(wanted).asnumpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, default=36000, help="frames of the long mp4")
    tables = ["views", "crops", "train", "open", "decoders"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip, long = folder / "clip.mp4", folder / "long.mp4"
        write_video(clip, 300, 256, 340, 0, "medium")
        for split in ("train", "val", "test"):
            (folder / f"{split}.csv").write_text(f"{clip} 0\n")
        rounds = arguments.rounds
        if "views" in arguments.tables:
            compare("test, 10 views x 1 crop: a video", test_ways(folder, 1), rounds)
        if "crops" in arguments.tables:
            compare("test, 10 views x 3 crops: a video", test_ways(folder, 3), rounds)
        if "train" in arguments.tables:
            ways = train_ways(folder)
            compare("training: an item of 2 samples", ways, 8 * rounds, statistics.fmean)
        if "open" in arguments.tables:
            write_video(long, arguments.long, 64, 96, 0, "ultrafast")
            compare(f"opening an mp4 of {arguments.long} frames", opening_ways(str(long)), rounds)
        if "decoders" in arguments.tables:
            compare("frames of 10 views, in RGB", decoder_ways(str(clip), 10), rounds)


if __name__ == "__main__":
    main()
