"""From decoded frames to images."""

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter


class Converter:
    """Frames to RGB images (H, W, 3) uint8, turned, mirrored and scaled; all of the size of the
    first."""

    def __init__(self, short_side: int, rotate: bool, reformatter: VideoReformatter):
        self.short_side, self.rotate = short_side, rotate
        self.reformatter, self.orientation = reformatter, (False, 1, 1)
        self.sides = self.rotation = None

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        # Who asks a frame for its side data makes a circle: it is kept until garbage is collected.
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
    """How a frame is shown: whether rows and columns change places, and the direction (1 or -1) in
    which the rows and the columns that this makes are passed through. All eight orientations."""
    matrix = next((each for each in frame.side_data if each.type == Type.DISPLAYMATRIX), None)
    if matrix is None:
        return False, 1, 1
    # A stored pixel (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    across, down = (c, b) if swapped else (a, d)
    return swapped, -1 if down < 0 else 1, -1 if across < 0 else 1


def _one_thread() -> dict:
    """How to keep PyAV's scaler from starting a thread per core: a scaler a clip pays more for
    them than for its work. Versions that start none do not know the option."""
    try:
        VideoReformatter().reformat(av.VideoFrame(16, 16, "rgb24"), threads=1)
        return {"threads": 1}
    except TypeError:
        return {}


_ONE_THREAD = _one_thread()
