"""Writes small H.264 videos in which the class shows only for a moment and in one place.

A video is grey noise with a grey square that jumps about. For a quarter of the video the square is
coloured and stays where it is; its hue is the class. Whoever looks elsewhere cannot know it.
"""

import colorsys
import json
import os
from dataclasses import asdict, dataclass

import av
import numpy as np

NUM_CLASSES = 8
NUM_FRAMES = 32
FPS = 16
SIDE = 32  # pixels of a frame
SQUARE = 14  # pixels of the square
SHOWN = 8  # frames in which the square is coloured
_STEP = 4  # the coloured part begins at a multiple of so many frames


@dataclass(frozen=True)
class Truth:
    """Where the class shows: frames ``start`` .. ``stop - 1``, the square at ``top``, ``left``."""

    label: int
    start: int
    stop: int
    top: int
    left: int


def write_dataset(folder: str, num_train: int, num_test: int, seed: int) -> dict[str, Truth]:
    """Writes ``videos/*.mp4``, the lists ``train.csv``, ``val.csv`` and ``test.csv`` (the last two
    alike), and ``truth.json``. Returns the truth by file name; classes come equally often."""
    os.makedirs(os.path.join(folder, "videos"), exist_ok=True)
    rng = np.random.default_rng(seed)
    truth = {}
    for split, count in (("train", num_train), ("test", num_test)):
        names = [f"{split}_{number:04d}.mp4" for number in range(count)]
        for number, name in enumerate(names):
            frames, truth[name] = draw_video(number % NUM_CLASSES, rng)
            write_video(os.path.join(folder, "videos", name), frames)
        lines = "".join(f"{name} {truth[name].label}\n" for name in names)
        for list_name in ("train",) if split == "train" else ("val", "test"):
            with open(os.path.join(folder, f"{list_name}.csv"), "w") as file:
                file.write(lines)
    with open(os.path.join(folder, "truth.json"), "w") as file:
        json.dump({name: asdict(value) for name, value in truth.items()}, file, indent=1)
    return truth


def read_truth(folder: str) -> dict[str, Truth]:
    """What `write_dataset` remembered, by file name."""
    with open(os.path.join(folder, "truth.json")) as file:
        return {name: Truth(**value) for name, value in json.load(file).items()}


def draw_video(label: int, rng: np.random.Generator) -> tuple[np.ndarray, Truth]:
    """Frames (NUM_FRAMES, SIDE, SIDE, 3) uint8 of a video of class ``label``."""
    noise = rng.normal(110, 25, (NUM_FRAMES, SIDE, SIDE, 1))
    frames = np.repeat(noise, 3, axis=3)
    start = _STEP * int(rng.integers((NUM_FRAMES - SHOWN) // _STEP + 1))
    top, left = (int(place) for place in rng.integers(SIDE - SQUARE + 1, size=2))
    hue = np.array(colorsys.hsv_to_rgb(label / NUM_CLASSES, 0.8, 0.9)) * 255
    for number in range(NUM_FRAMES):
        if start <= number < start + SHOWN:
            row, column, color = top, left, hue
        else:
            if number % _STEP == 0:
                row, column = rng.integers(SIDE - SQUARE + 1, size=2)
                color = np.full(3, rng.uniform(40, 240))
        square = frames[number, row : row + SQUARE, column : column + SQUARE]
        square[:] = color + 0.3 * (square - 110)
    return frames.clip(0, 255).astype(np.uint8), Truth(label, start, start + SHOWN, top, left)


def write_video(path: str, frames: np.ndarray) -> None:
    """Writes frames (T, H, W, 3) uint8 as H.264."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "g": "16"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
