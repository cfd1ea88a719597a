"""Converts decoded frames to RGB images."""

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter


class Converter:
    """Converts frames to RGB images (H, W, 3) uint8, rotated, mirrored and scaled, all to the size
    of the first."""

    def __init__(self, short_side: int, rotate: bool, reformatter: VideoReformatter):
        self.short_side, self.rotate = short_side, rotate
        self.reformatter, self.orientation = reformatter, (False, 1, 1)
        self.sides = self.rotation = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        # Reading a frame's side data makes a reference cycle, freed only by garbage collection.
        if self.rotate and frame.rotation != self.rotation:
            self.rotation, self.orientation = frame.rotation, orientation(frame)
        swapped, down, across = self.orientation
        if self.sides is None:
            scale = min(1.0, self.short_side / min(frame.height, frame.width) or 1.0)
            sides = round(frame.height * scale), round(frame.width * scale)
            self.sides = sides[::-1] if swapped else sides
        height, width = self.sides[::-1] if swapped else self.sides
        frame = self.reformatter.reformat(frame, width, height, "rgb24", **_ONE_THREAD)
        plane = frame.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : width * 3]
        image = rows.reshape(height, width, 3)
        return (image.swapaxes(0, 1) if swapped else image)[::down, ::across]


def orientation(frame: av.VideoFrame) -> tuple[bool, int, int]:
    """How a frame is shown, one of eight orientations: whether rows and columns are swapped, and
    then the direction (1 or -1) of rows and of columns."""
    matrix = next((each for each in frame.side_data if each.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return False, 1, 1
    # A stored pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if swapped else (a, d)
    return swapped, -1 if down < 0 else 1, -1 if across < 0 else 1


def _one_thread() -> dict:
    """The option that stops PyAV's scaler from starting a thread per core, which costs more than
    scaling a clip. Versions that start none do not have it."""
    try:
        VideoReformatter().reformat(av.VideoFrame(16, 16, "rgb24"), threads=1)
        return {"threads": 1}
    except TypeError:
        return {}


_ONE_THREAD = _one_thread()
