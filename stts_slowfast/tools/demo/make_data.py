"""``stts make-data``: small synthetic H.264 videos whose class shows in few tokens.

Writes the videos, the lists that a run reads, ``truth.json`` with the frames and boxes that show
the class, and configs of small models to train on them: ``stts run --cfg DIR/mvit.yaml``.
"""

import argparse
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import yaml

from stts_slowfast.tools.demo.synthetic_scenes import (
    GRID,
    KINDS,
    NUM_CLASSES,
    NUM_FRAMES,
    SIDE,
    TOKEN_FRAMES,
)

FPS = 16


@dataclass(frozen=True)
class Truth:
    """``boxes[i]`` (top, left, height, width in pixels) shows the class in ``frames[i]``."""

    label: int
    frames: list[int]
    boxes: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts make-data``."""
    kinds = "; ".join(f"{name}: {kind.__doc__}" for name, kind in KINDS.items())
    parser.add_argument("--kind", required=True, choices=KINDS, help=kinds)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--train", type=int, default=2048, metavar="N", help="training videos")
    parser.add_argument("--test", type=int, default=256, metavar="N", help="test videos")
    parser.add_argument("--side", type=int, default=SIDE, metavar="PIXELS", help="side of a frame")
    parser.add_argument("--frames", type=int, default=NUM_FRAMES, metavar="N", help="in a video")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace the videos in the folder")


def main(args: argparse.Namespace) -> int:
    """Writes the videos of a kind.

    Raises:
        ValueError: for sizes that are not whole tokens, or too small to tell the classes apart.
        FileExistsError: if the folder has videos of it, without --force.
    """
    # In tokens of 2 x 2 pixels, needle's two diagonals would look alike.
    for name, least in (("side", 32), ("frames", 16)):
        size = getattr(args, name)
        if size < least or size % 16:
            raise ValueError(f"--{name} is {size}: give a multiple of 16, at least {least}")
    for name in ("train", "test"):
        count = getattr(args, name)
        if count < NUM_CLASSES:
            raise ValueError(f"--{name} is {count}: give each of the {NUM_CLASSES} classes a video")
    if os.path.exists(os.path.join(args.out, "truth.json")):
        if not args.force:
            raise FileExistsError(
                f"{args.out} has videos of make-data already: choose another folder, or add --force"
            )
        shutil.rmtree(os.path.join(args.out, "videos"))
    size = (args.side, args.frames)
    write_dataset(args.out, args.kind, args.train, args.test, args.seed, *size)
    for model in MODELS:
        path = os.path.join(args.out, f"{model}.yaml")
        write_config(path, config(args.out, args.seed, *size, model))
    path = os.path.join(args.out, "mvit.yaml")
    print(f"wrote {args.train + args.test} videos to {args.out}; next: stts run --cfg {path}")
    return 0


# ---- files ----------------------------------------------------------------------------------


def write_dataset(
    folder: str,
    kind: str,
    num_train: int,
    num_test: int,
    seed: int,
    side: int = SIDE,
    num_frames: int = NUM_FRAMES,
) -> dict[str, Truth]:
    """Writes ``videos/*.mp4``, the lists ``train.csv``, ``val.csv`` and ``test.csv`` (the last two
    are equal), and ``truth.json``.

    Classes are equally frequent; a video depends only on seed, split and number.

    Returns:
        The truth by file name.
    """
    os.makedirs(os.path.join(folder, "videos"), exist_ok=True)
    truth = {}
    for split, count in (("train", num_train), ("test", num_test)):
        names = [f"{split}_{number:04d}.mp4" for number in range(count)]
        for number, name in enumerate(names):
            rng = np.random.default_rng([seed, split == "test", number])
            label = number % NUM_CLASSES
            frames, truth[name] = draw_video(kind, label, rng, side, num_frames)
            write_video(os.path.join(folder, "videos", name), frames)
        lines = "".join(f"{name} {truth[name].label}\n" for name in names)
        for list_name in ("train",) if split == "train" else ("val", "test"):
            with open(os.path.join(folder, f"{list_name}.csv"), "w") as file:
                file.write(lines)
    with open(os.path.join(folder, "truth.json"), "w") as file:
        json.dump({name: asdict(value) for name, value in truth.items()}, file)
    return truth


def read_truth(folder: str) -> dict[str, Truth]:
    """The truth that `write_dataset` wrote, by file name."""
    with open(os.path.join(folder, "truth.json")) as file:
        return {name: Truth(**value) for name, value in json.load(file).items()}


def draw_video(
    kind: str,
    label: int,
    rng: np.random.Generator,
    side: int = SIDE,
    num_frames: int = NUM_FRAMES,
) -> tuple[np.ndarray, Truth]:
    """Frames (T, H, W, 3) uint8 of a video of class ``label``, and its truth."""
    grey, boxes = KINDS[kind](label, rng, num_frames, side)
    truth = Truth(label, sorted(boxes), [[int(n) for n in boxes[frame]] for frame in sorted(boxes)])
    frames = grey.clip(0, 255).astype(np.uint8)
    return np.repeat(frames[..., None], 3, axis=3), truth


def write_video(path: str, frames: np.ndarray) -> None:
    """Writes frames (T, H, W, 3) uint8 as H.264."""
    write_frames(path, frames, FPS)


def write_frames(path: str, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames (H, W, 3) uint8, of even sides, as H.264 in MP4."""
    # x264's mbtree reads uninitialized memory: with it, files are not reproducible.
    options = {"crf": "20", "g": "16", "x264-params": "mbtree=0"}
    with av.open(path, "w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            if not number:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


# ---- configs of small models -----------------------------------------------------------------


class SmallModel(NamedTuple):
    """A model that learns the videos on a CPU, and what its config needs besides its node."""

    name: str  # MODEL.MODEL_NAME
    node: Callable[[int], dict]  # pixels of a token's side -> the model's node of the config
    tubelet: int = 2  # frames of a token
    space_stride: int = 1  # STTS.SPACE.STRIDE
    block: int = 0  # before which frames and windows are selected
    base_lr: float = 2e-3
    epochs: int = 3


def config(
    folder: str,
    seed: int,
    side: int = SIDE,
    num_frames: int = NUM_FRAMES,
    model: str = "mvit",
) -> dict:
    """A config in SlowFast's keys: a small model, one of ``MODELS``, and the videos in ``folder``.

    STTS is off; its blocks are those before which ``stts study`` selects.
    """
    small = MODELS[model]
    frames = small.tubelet * TOKEN_FRAMES
    return {
        "TRAIN": {"BATCH_SIZE": 16, "EVAL_PERIOD": 100, "CHECKPOINT_PERIOD": 100},
        "DATA": {
            "PATH_TO_DATA_DIR": folder,
            "PATH_PREFIX": os.path.join(folder, "videos"),
            "NUM_FRAMES": frames,
            "SAMPLING_RATE": num_frames // frames,
            "TARGET_FPS": FPS,
            "TRAIN_JITTER_SCALES": [side, side],
            "TRAIN_CROP_SIZE": side,
            "TEST_CROP_SIZE": side,
            "INPUT_CHANNEL_NUM": [3],
            "RANDOM_FLIP": False,  # the classes have a left and a right
        },
        "MODEL": {
            "ARCH": "mvit",
            "MODEL_NAME": small.name,
            "NUM_CLASSES": NUM_CLASSES,
            "DROPOUT_RATE": 0.0,
        },
        **small.node(side // GRID),
        "STTS": {
            "ENABLE": False,
            "TIME": {"BLOCKS": [small.block], "KEEP": [0.5]},
            "SPACE": {"BLOCKS": [small.block], "KEEP": [0.5], "STRIDE": small.space_stride},
        },
        "SOLVER": {
            "OPTIMIZING_METHOD": "adamw",
            "BASE_LR": small.base_lr,
            "MAX_EPOCH": small.epochs,
            "WARMUP_EPOCHS": 1.0,
            "COSINE_AFTER_WARMUP": True,
            "WARMUP_START_LR": 1e-4,
            "WEIGHT_DECAY": 0.05,
            "CLIP_GRAD_L2NORM": 1.0,
        },
        "TEST": {"BATCH_SIZE": 16, "NUM_ENSEMBLE_VIEWS": 1, "NUM_SPATIAL_CROPS": 1},
        "DATA_LOADER": {"NUM_WORKERS": 1},
        "NUM_GPUS": 0,
        "RNG_SEED": seed,
        "OUTPUT_DIR": os.path.join(folder, f"run_{model}"),
    }


def _mvit(stride: int) -> dict:
    node = {
        "DEPTH": 3,
        "EMBED_DIM": 32,
        # A frame of tokens sees only its own two frames: which of them show the class is clear.
        "PATCH_KERNEL": [2, 2 * stride - 1, 2 * stride - 1],
        "PATCH_STRIDE": [2, stride, stride],
        "PATCH_PADDING": [0, stride - 1, stride - 1],
        "SEP_POS_EMBED": True,
        "DROPPATH_RATE": 0.0,
        "DIM_MUL": [[1, 2.0]],
        "HEAD_MUL": [[1, 2.0]],
        "POOL_Q_STRIDE": [[1, 1, 2, 2]],
        "POOL_KV_STRIDE_ADAPTIVE": [1, 2, 2],
        "POOL_KVQ_KERNEL": [3, 3, 3],
    }
    return {"MVIT": node}


def _timesformer(stride: int) -> dict:
    sizes = {"PATCH_SIZE": stride, "EMBED_DIM": 64, "DEPTH": 3, "NUM_HEADS": 4}
    return {"TIMESFORMER": {**sizes, "DROPPATH_RATE": 0.0}}


def _vit(stride: int) -> dict:
    patches = [2, stride, stride]
    node: dict = {"PATCH_KERNEL": patches, "PATCH_STRIDE": patches}
    node |= {"PATCH_PADDING": [0, 0, 0]}
    node |= {"EMBED_DIM": 64, "DEPTH": 3, "NUM_HEADS": 4, "SEP_POS_EMBED": True}
    return {"MVIT": {**node, "DROPPATH_RATE": 0.0}}


def _video_swin(stride: int) -> dict:
    sizes = {"PATCH_SIZE": [2, stride, stride], "EMBED_DIM": 32, "DEPTHS": [2, 2]}
    windows = {"NUM_HEADS": [2, 4], "WINDOW_SIZE": [8, 4, 4], "DROPPATH_RATE": 0.0}
    return {"VIDEO_SWIN": {**sizes, **windows}}


MODELS = {  # by the name of the config file
    "mvit": SmallModel("MViT", _mvit),
    # At 2e-3 it may stay on a plateau of clutter; of motion it learns the direction last. A token
    # sees one frame: what moves is known after the first block.
    "timesformer": SmallModel(
        "TimeSformer", _timesformer, tubelet=1, block=1, base_lr=1e-3, epochs=7
    ),
    "vit": SmallModel("MViT", _vit),
    # Windows at even positions: patch merging pairs their tokens as those of a whole frame.
    "video_swin": SmallModel("VideoSwin", _video_swin, space_stride=2),
}


def write_config(path: str, values: dict) -> None:
    """Writes SlowFast's keys as YAML."""
    with open(path, "w") as file:
        yaml.safe_dump(values, file, sort_keys=False)
