"""From decoded frames to images."""

import av
import numpy as np
from av.video.reformatter import VideoReformatter


class Converter:
    """Frames to RGB images (H, W, 3) uint8, turned and scaled; all of the size of the first."""

    def __init__(self, short_side: int, rotate: bool, reformatter: VideoReformatter):
        self.short_side, self.rotate = short_side, rotate
        self.reformatter = reformatter
        self.sides = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        turns = round(frame.rotation / 90) % 4 if self.rotate else 0
        if self.sides is None:
            scale = min(1.0, self.short_side / min(frame.height, frame.width) or 1.0)
            sides = round(frame.height * scale), round(frame.width * scale)
            self.sides = sides[::-1] if turns % 2 else sides
        height, width = self.sides[::-1] if turns % 2 else self.sides
        frame = self.reformatter.reformat(frame, width, height, "rgb24", **_ONE_THREAD)
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : width * 3]
        return np.rot90(rows.reshape(height, width, 3), turns)


def _one_thread() -> dict:
    """How to keep PyAV's scaler from starting a thread per core: a scaler a clip pays more for
    them than for its work. Versions that start none do not know the option."""
    try:
        VideoReformatter().reformat(av.VideoFrame(16, 16, "rgb24"), threads=1)
        return {"threads": 1}
    except TypeError:
        return {}


_ONE_THREAD = _one_thread()
