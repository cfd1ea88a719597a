"""Writes the video with what was dropped dimmed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stts_slowfast.tools.demo.make_data import write_frames
from stts_slowfast.video import Video
from stts_slowfast.visualization import Window

DIM = 0.25  # how bright what was dropped is
_CHUNK = 64  # frames of a video in memory at a time


# ---- video ----------------------------------------------------------------------------------


@dataclass
class ViewOverlay:
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


def write_dimmed(path: str, video: Video, views: Sequence[ViewOverlay]) -> None:
    """Writes the video as H.264 with what no view kept dimmed."""
    write_frames(path, _dimmed(video, views), video.fps)


def _dimmed(video: Video, views: Sequence[ViewOverlay]) -> Iterator[np.ndarray]:
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
