"""The scenes in the videos of ``stts make-data``: three kinds, each with its truth.

All have four classes and a dark background, against which a token of an object stands out, also
after a LayerNorm. What small models learn of them is in docs/experiments.md.
"""

from collections.abc import Callable, Iterable

import numpy as np

NUM_CLASSES = 4
NUM_FRAMES = 32
SIDE = 32  # pixels
TOKEN_FRAMES = 8  # frames of tokens of a video
GRID = 8  # tokens of a side of a frame; objects have 2 x 2, those of needle 3 x 3

# top, left, height and width in pixels
Box = tuple[int, int, int, int]
# Grey frames (T, H, W) float around 0..255, and the box of each frame that shows the class.
Scene = tuple[np.ndarray, dict[int, Box]]

_OBJECT_BRIGHTNESS = 120.0  # added to the background


def _background(rng: np.random.Generator, num_frames: int, side: int) -> np.ndarray:
    """Dark clouds (T, side, side) that move at a constant velocity, with some noise."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / (frequency + 2 / side)
    clouds = np.fft.irfft2(spectrum, (side, side))
    clouds *= 10 / clouds.std()
    velocity = rng.uniform(-1.5, 1.5, size=2)
    moved = [
        np.roll(clouds, np.round(velocity * number).astype(int), (0, 1))
        for number in range(num_frames)
    ]
    return 60 + np.stack(moved) + rng.normal(0, 4, (num_frames, side, side))


def _add(frame: np.ndarray, picture: np.ndarray, top: int, left: int) -> None:
    """Adds a picture to a frame, wrapped around at the borders."""
    rows = (top + np.arange(picture.shape[0])) % frame.shape[0]
    columns = (left + np.arange(picture.shape[1])) % frame.shape[1]
    frame[np.ix_(rows, columns)] += _OBJECT_BRIGHTNESS * picture


# ---- kinds ----------------------------------------------------------------------------------


def needle(label: int, rng: np.random.Generator, num_frames: int, side: int) -> Scene:
    """a hatched square for an eighth of the video; squares of shuffled pixels for the rest"""
    frames, boxes = _background(rng, num_frames, side), {}
    token, step = side // GRID, num_frames // TOKEN_FRAMES
    shown = int(rng.integers(TOKEN_FRAMES))
    for moment in range(TOKEN_FRAMES):
        picture = glyph(3 * token, label)
        if moment != shown:
            picture = rng.permutation(picture.flatten()).reshape(picture.shape)
        top, left = token * rng.integers(GRID - 2, size=2)
        for number in range(moment * step, (moment + 1) * step):
            _add(frames[number], picture, top, left)
            if moment == shown:
                boxes[number] = (top, left, *picture.shape)
    return frames, boxes


def glyph(size: int, label: int) -> np.ndarray:
    """A square hatched in one of four directions; its 3 x 3 tokens are equal and half filled."""
    rows, columns = np.mgrid[:size, :size]
    across, token = (rows, columns, rows + columns, rows - columns)[label], size // 3
    return across % token < token // 2


def motion(label: int, rng: np.random.Generator, num_frames: int, side: int) -> Scene:
    """a disc that moves in one of four directions for half of the video, else jumps at random"""
    frames, boxes = _background(rng, num_frames, side), {}
    size, step = side // 4, num_frames // TOKEN_FRAMES
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    disc = np.hypot(rows, columns) < size / 2
    angle = np.pi / 2 * label
    speed = side / 8 / step  # an eighth of the frame from one frame of tokens to the next
    velocity = speed * np.array([np.sin(angle), np.cos(angle)])
    start = step * int(rng.integers(TOKEN_FRAMES // 2 + 1))
    position = rng.uniform(0, side, size=2)
    for number in range(num_frames):
        moves = start <= number < start + num_frames // 2
        if moves:
            position = (position + velocity) % side
        elif number % step == 0:
            position = rng.uniform(0, side, size=2)
        top, left = np.round(position).astype(int)
        _add(frames[number], disc, top, left)
        if moves:
            boxes[number] = _visible(top, left, size, side)
    return frames, boxes


def _visible(top: int, left: int, size: int, side: int) -> Box:
    """The larger part of a box that is wrapped around at the border."""
    spans = []
    for first in (top % side, left % side):
        inside = side - first
        spans.append((first, min(size, inside)) if inside >= size / 2 else (0, size - inside))
    return spans[0][0], spans[1][0], spans[0][1], spans[1][1]


def clutter(label: int, rng: np.random.Generator, num_frames: int, side: int) -> Scene:
    """16 rings; one has a single gap, whose side is the class; the others have two opposite gaps"""
    frames, size = _background(rng, num_frames, side), 2 * (side // GRID)
    chosen, upright = int(rng.integers(16)), rng.permutation(16) % 2
    corners = [(size * row, size * column) for row in range(4) for column in range(4)]
    for number, (top, left) in enumerate(corners):
        gaps = [label] if number == chosen else [upright[number], upright[number] + 2]
        for frame in frames:
            _add(frame, ring(size - 1, gaps), top, left)
    return frames, dict.fromkeys(range(num_frames), (*corners[chosen], size, size))


def ring(size: int, gaps: Iterable[int]) -> np.ndarray:
    """A ring with gaps at some of four sides: 0 right, 1 below, 2 left, 3 above."""
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    distance, angle = np.hypot(rows, columns), np.arctan2(rows, columns)
    closed = (distance < size / 2) & (distance > size / 4)
    for gap in gaps:
        turned = np.angle(np.exp(1j * (angle - gap * np.pi / 2)))
        closed &= np.abs(turned) > np.pi / 6
    return closed


# Functions (label, rng, num_frames, side) -> scene; the docstring is the help text.
KINDS: dict[str, Callable[..., Scene]] = {"needle": needle, "motion": motion, "clutter": clutter}
