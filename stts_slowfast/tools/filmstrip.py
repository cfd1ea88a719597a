"""Draws what was kept of a clip: film strips, and the video with what was dropped dimmed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from stts_slowfast.tools.makedata import write_frames
from stts_slowfast.video import Video

# Top, left, height and width as shares of the frame.
Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)

DIM = 0.25  # how bright what was dropped is
_CHUNK = 64  # frames of a video in memory at a time


@dataclass
class Strip:
    """A row of the picture.

    Attributes:
        title: what stands above it.
        frames: (T, H, W, 3) uint8, one picture for each frame of tokens.
        kept: the frames that all selectors kept, and of each the window that went on.
        marked: frames to point at, such as those that show the class.
        scores: of the frames, in 0..1, where frames were scored.
    """

    title: str
    frames: torch.Tensor
    kept: dict[int, Window]
    marked: Sequence[int] = field(default_factory=tuple)
    scores: Sequence[float] | None = None


def draw(strips: Sequence[Strip], path: str, format: str | None = None) -> None:
    """Writes the picture: kept frames framed in green with their window, dropped ones dim."""
    from matplotlib.figure import Figure

    columns = max(len(strip.frames) for strip in strips)
    figure = Figure(figsize=(1.3 * columns, 1.75 * len(strips)), layout="constrained")
    rows = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for row, strip in zip(rows, strips):
        title = row.suptitle(_printable(strip.title), fontsize=9, x=0.01, ha="left")
        title.set_parse_math(False)  # file names may have dollar signs
        axes, bars = row.subplots(2, columns, squeeze=False, height_ratios=[10, 1])
        for number, (axis, bar) in enumerate(zip(axes, bars)):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(number < len(strip.frames))
            bar.set_axis_off()
            if number < len(strip.frames):
                _draw_frame(axis, strip, number)
                if strip.scores is not None:
                    bar.barh(0, 1, color="0.9")
                    bar.barh(0, strip.scores[number], color="tab:blue")
                    bar.set_xlim(0, 1)
    legend = "green: frame kept (dim: dropped)     red: window that went on"
    if any(strip.scores is not None for strip in strips):
        legend += "     blue: score of the frame"
    if any(strip.marked for strip in strips):
        legend += "     \N{BLACK UP-POINTING TRIANGLE}: shows the class"
    figure.supxlabel(legend, fontsize=8)
    figure.savefig(path, dpi=120, format=format)


def _draw_frame(axis, strip: Strip, number: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = strip.frames.shape[1:3]
    window = strip.kept.get(number)
    axis.imshow(strip.frames[number].numpy(), alpha=1.0 if window else 0.25)
    for spine in axis.spines.values():
        spine.set(color="tab:green" if window else "0.8", linewidth=3 if window else 0.5)
    if window and window != WHOLE:
        top, left, tall, wide = window
        corner, size = (left * width - 0.5, top * height - 0.5), (wide * width, tall * height)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=4))
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:red", linewidth=2))
    label = f"{number} \N{BLACK UP-POINTING TRIANGLE}" if number in strip.marked else f"{number}"
    axis.set_xlabel(label, fontsize=7, labelpad=2)


def _printable(text: str) -> str:
    """Without line breaks and bytes that are no text, which file names may hold."""
    text = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# ---- video ----------------------------------------------------------------------------------


@dataclass
class Shown:
    """What a view keeps of its video.

    Attributes:
        indices: the video's frames that the clip is of, ascending.
        num_frames: of tokens.
        kept: frame of tokens -> window, in shares of the crop.
        crop: the part of the video's frame that the model saw.
    """

    indices: Sequence[int]
    num_frames: int
    kept: dict[int, Window]
    crop: Window

    def at(self, frame: int) -> Window | None:
        """What is kept of the video's frame ``frame``, in shares of it; None for nothing.

        A frame between two of the clip belongs to the one before it.
        """
        step = len(self.indices) // self.num_frames
        starts = [*self.indices[::step]]
        gap = max((self.indices[-1] - self.indices[0]) / max(len(self.indices) - 1, 1), 1)
        if not starts[0] <= frame < self.indices[-1] + gap:
            return None
        window = self.kept.get(int(np.searchsorted(starts, frame, side="right")) - 1)
        if window is None:
            return None
        top, left, height, width = self.crop
        return (
            top + window[0] * height,
            left + window[1] * width,
            window[2] * height,
            window[3] * width,
        )


def center_crop(height: int, width: int, scale: int, size: int) -> Window:
    """The square of ``size`` in the middle of a frame whose short side is scaled to ``scale``."""
    short = min(height, width)
    tall, wide = (math.floor(side * scale / short) for side in (height, width))
    top, left = math.ceil((tall - size) / 2), math.ceil((wide - size) / 2)
    return top / tall, left / wide, size / tall, size / wide


def write_dimmed(path: str, video: Video, views: Sequence[Shown]) -> None:
    """Writes the video as H.264 with what no view kept dimmed."""
    write_frames(path, _dimmed(video, views), video.fps)


def _dimmed(video: Video, views: Sequence[Shown]) -> Iterator[np.ndarray]:
    for first in range(0, video.num_frames, _CHUNK):
        numbers = range(first, min(first + _CHUNK, video.num_frames))
        for number, frame in zip(numbers, video.decode(numbers).numpy()):
            yield dim(frame, [view.at(number) for view in views])


def dim(frame: np.ndarray, windows: Iterable[Window | None]) -> np.ndarray:
    """A frame (H, W, 3) uint8 of even sides, dimmed outside all windows."""
    height, width = (side - side % 2 for side in frame.shape[:2])
    frame = frame[:height, :width]
    bright = np.zeros((height, width, 1), bool)
    for window in windows:
        if window is not None:
            top, left, tall, wide = window
            rows = slice(round(top * height), round((top + tall) * height))
            bright[rows, round(left * width) : round((left + wide) * width)] = True
    return np.where(bright, frame, (DIM * frame).astype(np.uint8))
