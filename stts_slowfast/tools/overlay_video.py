"""Writes a video again, with what the model dropped dimmed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stts_slowfast.tools.demo.make_data import write_frames
from stts_slowfast.tools.inspection import View
from stts_slowfast.video import Video
from stts_slowfast.visualization import Box, KeptRegions

DIM = 0.25  # brightness of what was dropped
_CHUNK = 64  # frames of a video in memory at a time


@dataclass
class ViewOverlay:
    """What the model keeps of its video in a view.

    Attributes:
        view: the clip's frames in the video, and its crop.
        num_frames: of tokens.
        kept: of the crop.
    """

    view: View
    num_frames: int
    kept: KeptRegions

    def boxes_at(self, frame: int) -> list[Box]:
        """The window or the tokens kept in the video's frame ``frame``, in shares of it.

        A frame between two of the clip belongs to the one before it.
        """
        number = self._frame_of_tokens(frame)
        boxes = [] if number is None else self.kept.boxes(number)
        return [self._in_video(box) for box in boxes]

    def _frame_of_tokens(self, frame: int) -> int | None:
        indices = self.view.indices
        starts = indices[:: len(indices) // self.num_frames]
        gap = max((indices[-1] - indices[0]) / max(len(indices) - 1, 1), 1)
        if not starts[0] <= frame < indices[-1] + gap:
            return None
        return int(np.searchsorted(starts, frame, side="right")) - 1

    def _in_video(self, box: Box) -> Box:
        """A box in shares of the crop as one in shares of the video's frame."""
        top, left, height, width = self.view.crop
        return (
            top + box[0] * height,
            left + box[1] * width,
            box[2] * height,
            box[3] * width,
        )


def write_dimmed(path: str, video: Video, overlays: Sequence[ViewOverlay]) -> None:
    """Writes the video as H.264, dimmed outside of what any view keeps."""
    write_frames(path, _dimmed(video, overlays), video.fps)


def _dimmed(video: Video, overlays: Sequence[ViewOverlay]) -> Iterator[np.ndarray]:
    for first in range(0, video.num_frames, _CHUNK):
        numbers = range(first, min(first + _CHUNK, video.num_frames))
        for number, frame in zip(numbers, video.decode(numbers).numpy()):
            yield dim(frame, [box for overlay in overlays for box in overlay.boxes_at(number)])


def dim(frame: np.ndarray, windows: Iterable[Box | None]) -> np.ndarray:
    """A frame (H, W, 3) uint8, cut to even sides, dimmed outside all windows."""
    height, width = (side - side % 2 for side in frame.shape[:2])
    frame = frame[:height, :width]
    bright = np.zeros((height, width, 1), bool)
    for window in windows:
        if window is not None:
            top, left, tall, wide = window
            rows = slice(round(top * height), round((top + tall) * height))
            bright[rows, round(left * width) : round((left + wide) * width)] = True
    return np.where(bright, frame, (DIM * frame).astype(np.uint8))
