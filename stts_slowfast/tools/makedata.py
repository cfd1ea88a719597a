"""``stts make-data``: small H.264 videos whose class shows only where one looks, with the truth.

A folder of videos, the lists that a run reads, ``truth.json`` with the frames and boxes that show
the class, and ``config.yaml``, which trains a small MViT on them: ``stts run --cfg config.yaml``.
"""

import argparse
import colorsys
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction

import av
import numpy as np
import yaml

NUM_CLASSES = 8
FPS = 16
TOKEN_FRAMES = 8  # config.yaml's model sees a video as so many frames of tokens
GRID = 8  # of so many tokens a side

# top, left, height and width in pixels
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Truth:
    """What shows the class: ``boxes[i]`` (top, left, height, width in pixels) in ``frames[i]``."""

    label: int
    frames: list[int]
    boxes: list[list[int]]


@dataclass(frozen=True)
class Kind:
    """A kind of videos.

    Attributes:
        draw: ``(label, rng, num_frames, side)`` -> grey or coloured frames (T, H, W[, 3]) float
            around 0..255, and the box of each frame that shows the class.
        side, num_frames: the size unless another is asked for.
        epochs, num_train: with so much, all tokens learn it (see `config`).
        text: what there is to see.
    """

    draw: Callable[..., tuple[np.ndarray, dict[int, Box]]]
    side: int
    num_frames: int
    epochs: int
    num_train: int
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts make-data``."""
    kinds = "; ".join(f"{name}: {kind.text}" for name, kind in KINDS.items())
    parser.add_argument("--kind", required=True, choices=KINDS, help=kinds)
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything is written")
    parser.add_argument("--train", type=int, metavar="N", help="training videos")
    parser.add_argument("--test", type=int, default=256, metavar="N", help="test videos")
    parser.add_argument("--side", type=int, metavar="PIXELS", help="of a frame, a multiple of 16")
    parser.add_argument("--frames", type=int, metavar="N", help="of a video, a multiple of 16")
    parser.add_argument("--seed", type=int, default=0)


def main(args: argparse.Namespace) -> int:
    """Writes the videos of a kind.

    Raises:
        ValueError: for sizes that the model of config.yaml cannot see in whole tokens.
    """
    kind = KINDS[args.kind]
    side, num_frames = args.side or kind.side, args.frames or kind.num_frames
    for name, size in (("side", side), ("frames", num_frames)):
        if size < 16 or size % 16:
            raise ValueError(f"--{name} is {size}: give a multiple of 16")
    counts = {"--train": kind.num_train if args.train is None else args.train, "--test": args.test}
    for name, count in counts.items():
        if count < NUM_CLASSES:
            raise ValueError(f"{name} is {count}: give each of the {NUM_CLASSES} classes a video")
    write_dataset(args.out, args.kind, *counts.values(), args.seed, side, num_frames)
    path = os.path.join(args.out, "config.yaml")
    write_config(path, config(args.out, args.kind, args.seed, side, num_frames))
    print(f"wrote {sum(counts.values())} videos to {args.out}; next: stts run --cfg {path}")
    return 0


# ---- files ----------------------------------------------------------------------------------


def write_dataset(
    folder: str,
    kind: str,
    num_train: int,
    num_test: int,
    seed: int,
    side: int | None = None,
    num_frames: int | None = None,
) -> dict[str, Truth]:
    """Writes ``videos/*.mp4``, the lists ``train.csv``, ``val.csv`` and ``test.csv`` (the last two
    alike), and ``truth.json``. Returns the truth by file name; classes come equally often, and a
    video depends on seed, split and number alone."""
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
    """What `write_dataset` remembered, by file name."""
    with open(os.path.join(folder, "truth.json")) as file:
        return {name: Truth(**value) for name, value in json.load(file).items()}


def draw_video(
    kind: str,
    label: int,
    rng: np.random.Generator,
    side: int | None = None,
    num_frames: int | None = None,
) -> tuple[np.ndarray, Truth]:
    """Frames (T, H, W, 3) uint8 of a video of class ``label``, and the truth about it."""
    what = KINDS[kind]
    frames, boxes = what.draw(label, rng, num_frames or what.num_frames, side or what.side)
    if frames.ndim == 3:
        frames = np.repeat(frames[..., None], 3, axis=3)
    truth = Truth(label, sorted(boxes), [[int(n) for n in boxes[frame]] for frame in sorted(boxes)])
    return frames.clip(0, 255).astype(np.uint8), truth


def write_video(path: str, frames: np.ndarray) -> None:
    """Writes frames (T, H, W, 3) uint8 as H.264."""
    write_frames(path, frames, FPS)


def write_frames(path: str, frames: Iterable[np.ndarray], fps: float) -> None:
    """Writes frames (H, W, 3) uint8, of even sides, as H.264 in MP4."""
    # x264's mbtree reads memory that nobody wrote: with it, files differ from time to time.
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


# ---- what is drawn --------------------------------------------------------------------------


def _texture(rng: np.random.Generator, num_frames: int, side: int) -> np.ndarray:
    """A cloudy background (T, side, side) around 110 that moves evenly, with a little noise."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / (frequency + 2 / side)
    clouds = np.fft.irfft2(spectrum, (side, side))
    clouds *= 12 / clouds.std()
    velocity = rng.uniform(-1.5, 1.5, size=2)
    moved = [
        np.roll(clouds, np.round(velocity * number).astype(int), (0, 1))
        for number in range(num_frames)
    ]
    return 110 + np.stack(moved) + rng.normal(0, 4, (num_frames, side, side))


def _paste(frame: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    """Adds a picture to a frame whose opposite borders meet."""
    rows = (top + np.arange(picture.shape[0])) % frame.shape[0]
    columns = (left + np.arange(picture.shape[1])) % frame.shape[1]
    frame[np.ix_(rows, columns)] += picture


def _glyph(rows: Iterable[str]) -> np.ndarray:
    return np.array([[cell == "#" for cell in row] for row in rows])


# One a class, each of nine cells, so that none is told by how bright it is.
GLYPHS = [
    _glyph(rows.split())
    for rows in (
        "..#.. ..#.. ##### ..#.. ..#..",
        "#...# .#.#. ..#.. .#.#. #...#",
        "##### ..#.. ..#.. ..#.. ..#..",
        "..#.. ..#.. ..#.. ..#.. #####",
        "#.... #.... #.... #.... #####",
        "##### ....# ....# ....# ....#",
        "#.... #.... ##### #.... #....",
        "#...# #...# .###. ..#.. ..#..",
    )
]


def _draw_square(label, rng, num_frames, side):
    """Grey noise with a grey square that jumps about. For a quarter of the video the square is
    coloured and stays where it is; its hue is the class."""
    frames = np.repeat(rng.normal(110, 25, (num_frames, side, side, 1)), 3, axis=3)
    size, step = side * 14 // 32, num_frames // TOKEN_FRAMES
    start, place = step * int(rng.integers(TOKEN_FRAMES - 1)), rng.integers(side - size + 1, size=2)
    hue = np.array(colorsys.hsv_to_rgb(label / NUM_CLASSES, 0.8, 0.9)) * 255
    boxes = {}
    for number in range(num_frames):
        if start <= number < start + 2 * step:
            (top, left), color = place, hue
            boxes[number] = (top, left, size, size)
        elif number % step == 0:
            top, left = rng.integers(side - size + 1, size=2)
            color = np.full(3, rng.uniform(40, 240))
        square = frames[number, top : top + size, left : left + size]
        square[:] = color + 0.3 * (square - 110)
    return frames, boxes


def _draw_needle(label, rng, num_frames, side):
    """A glyph in an eighth of the frames; before and after it, elsewhere, its cells shuffled."""
    frames = _texture(rng, num_frames, side)
    token, step = side // GRID, num_frames // TOKEN_FRAMES
    cell, shown = max(side // 20, 1), int(rng.integers(TOKEN_FRAMES))
    size = 5 * cell
    boxes = {}
    for moment in range(TOKEN_FRAMES):
        cells = GLYPHS[label]
        if moment != shown:
            cells = rng.permutation(cells.flatten()).reshape(5, 5)
        picture = 120.0 * np.kron(cells, np.ones((cell, cell)))
        top, left = token * rng.integers((side - size) // token + 1, size=2)
        for number in range(moment * step, (moment + 1) * step):
            _paste(frames[number], picture, top, left)
            if moment == shown:
                boxes[number] = (top, left, size, size)
    return frames, boxes


def _draw_motion(label, rng, num_frames, side):
    """A disc that goes one of eight ways for half of the video, and hops about before and after:
    where it is in any one frame says nothing."""
    frames = _texture(rng, num_frames, side)
    size, step = side // 4, num_frames // TOKEN_FRAMES
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    picture = 120.0 * (np.hypot(rows, columns) < size / 2)
    angle = 2 * np.pi * label / NUM_CLASSES
    speed = side / 8 / step  # an eighth of the frame between two frames of tokens
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    start = step * int(rng.integers(TOKEN_FRAMES // 2 + 1))
    place, boxes = rng.uniform(0, side, size=2), {}
    for number in range(num_frames):
        moves = start <= number < start + num_frames // 2
        if moves:
            place = (place + velocity) % side
        elif number % step == 0:
            place = rng.uniform(0, side, size=2)
        top, left = np.round(place).astype(int)
        _paste(frames[number], picture, top, left)
        if moves:
            boxes[number] = _visible(top, left, size, side)
    return frames, boxes


def _visible(top: int, left: int, size: int, side: int) -> Box:
    """The larger part of a box that runs over the border."""
    spans = []
    for first in (top % side, left % side):
        inside = side - first
        spans.append((first, min(size, inside)) if inside >= size / 2 else (0, size - inside))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def _draw_clutter(label, rng, num_frames, side):
    """Nine rings that tremble together; eight have two gaps that face each other, one has a gap on
    one side alone: which side is the class."""
    frames = _texture(rng, num_frames, side)
    token = side // GRID
    size, turns = 2 * token - 1, rng.permutation(8)
    chosen = int(rng.integers(9))
    corners = [(3 * token * row, 3 * token * column) for row in range(3) for column in range(3)]
    sheet = np.zeros((side, side))
    for place, (top, left) in enumerate(corners):
        gaps = [label] if place == chosen else [turns[place % 8], turns[place % 8] + 4]
        _paste(sheet, _ring(size, gaps), top, left)
    for frame in frames:
        frame += np.roll(sheet, rng.integers(2, size=2), (0, 1))
    return frames, dict.fromkeys(range(num_frames), (*corners[chosen], size + 1, size + 1))


def _ring(size: int, gaps: Iterable[int]) -> np.ndarray:
    """A bright ring of ``size`` pixels, open at some of eight directions."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    distance, angle = np.hypot(rows, columns), np.arctan2(rows, columns)
    ring = (distance < size / 2) & (distance > size / 4)
    for gap in gaps:
        turned = np.angle(np.exp(1j * (angle - gap * np.pi / 4)))
        ring &= np.abs(turned) > np.pi / 6
    return 120.0 * ring


KINDS = {
    "square": Kind(_draw_square, 32, 32, 10, 512, "a square that is coloured for a moment"),
    "needle": Kind(_draw_needle, 64, 32, 20, 1024, "a glyph for a moment, shuffled else"),
    "motion": Kind(_draw_motion, 64, 32, 20, 1024, "which way a disc goes for a while"),
    "clutter": Kind(_draw_clutter, 64, 32, 20, 1024, "the one ring of nine with a single gap"),
}


# ---- the config that learns it --------------------------------------------------------------


def config(
    folder: str, kind: str, seed: int, side: int | None = None, num_frames: int | None = None
) -> dict:
    """SlowFast's keys of a small MViT that learns a kind of videos in ``folder`` in minutes."""
    what = KINDS[kind]
    side, num_frames = side or what.side, num_frames or what.num_frames
    stride = side // GRID
    return {
        "TRAIN": {"BATCH_SIZE": 32, "EVAL_PERIOD": 100, "CHECKPOINT_PERIOD": 100},
        "DATA": {
            "PATH_TO_DATA_DIR": folder,
            "PATH_PREFIX": os.path.join(folder, "videos"),
            "NUM_FRAMES": 2 * TOKEN_FRAMES,
            "SAMPLING_RATE": num_frames // (2 * TOKEN_FRAMES),
            "TARGET_FPS": FPS,
            "TRAIN_JITTER_SCALES": [side, side],
            "TRAIN_CROP_SIZE": side,
            "TEST_CROP_SIZE": side,
            "INPUT_CHANNEL_NUM": [3],
            "RANDOM_FLIP": kind == "square",  # the other classes have a left and a right
        },
        "MODEL": {
            "ARCH": "mvit",
            "MODEL_NAME": "MViT",
            "NUM_CLASSES": NUM_CLASSES,
            "DROPOUT_RATE": 0.0,
        },
        "MVIT": {
            "DEPTH": 4,
            "EMBED_DIM": 32,
            # A frame of tokens is of two frames of pixels and no others: what it shows is clear.
            "PATCH_KERNEL": [2, 2 * stride - 1, 2 * stride - 1],
            "PATCH_STRIDE": [2, stride, stride],
            "PATCH_PADDING": [0, stride - 1, stride - 1],
            "SEP_POS_EMBED": True,
            "DROPPATH_RATE": 0.0,
            "DIM_MUL": [[2, 2.0]],
            "HEAD_MUL": [[2, 2.0]],
            "POOL_Q_STRIDE": [[2, 1, 2, 2]],
            "POOL_KV_STRIDE_ADAPTIVE": [2, 8, 8],
            "POOL_KVQ_KERNEL": [3, 3, 3],
        },
        "SOLVER": {
            "OPTIMIZING_METHOD": "adamw",
            "BASE_LR": 2e-3,
            "MAX_EPOCH": what.epochs,
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
        "OUTPUT_DIR": os.path.join(folder, "run"),
    }


def write_config(path: str, values: dict) -> None:
    """Writes SlowFast's keys as YAML."""
    with open(path, "w") as file:
        yaml.safe_dump(values, file, sort_keys=False)
