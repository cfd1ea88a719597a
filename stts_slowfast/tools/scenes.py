"""What the videos of ``stts make-data`` show: four kinds of scenes, each with its truth."""

import colorsys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

NUM_CLASSES = 8
TOKEN_FRAMES = 8  # a model sees a video as so many frames of tokens
GRID = 8  # tokens a side that objects are made for: they begin where a token does

# top, left, height and width in pixels
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Kind:
    """A kind of videos.

    Attributes:
        draw: ``(label, rng, num_frames, side)`` -> grey or coloured frames (T, H, W[, 3]) float
            around 0..255, and the box of each frame that shows the class.
        side, num_frames: the size unless another is asked for.
        grid: tokens a side of a frame.
        kv_stride: POOL_KV_STRIDE_ADAPTIVE of the model; what is small needs many keys.
        batch_size, epochs, num_train: of the training on all tokens.
        text: what there is to see.
    """

    draw: Callable[..., tuple[np.ndarray, dict[int, Box]]]
    side: int
    num_frames: int
    grid: int
    kv_stride: list[int]
    batch_size: int
    epochs: int
    num_train: int
    text: str


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
    cell, shown = max(2 * token // 5, 1), int(rng.integers(TOKEN_FRAMES))
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
    "square": Kind(
        *(_draw_square, 32, 32, 8, [2, 8, 8], 32, 10, 512),
        text="a square that is coloured for a moment",
    ),
    "needle": Kind(
        *(_draw_needle, 48, 32, GRID, [1, 2, 2], 16, 8, 2048),
        text="a glyph for a moment, its cells shuffled else",
    ),
    "motion": Kind(
        *(_draw_motion, 48, 32, 6, [1, 2, 2], 16, 3, 2048),
        text="which way a disc goes for a while",
    ),
    "clutter": Kind(
        *(_draw_clutter, 48, 32, GRID, [1, 2, 2], 16, 8, 2048),
        text="the one ring of nine with a single gap",
    ),
}
