"""Warps all frames of a clip by one affine map, with the same pixels as PIL.

If a map moves pixels along one axis only (shears, shifts), every line is a sum of a few shifted
copies of itself; else each output pixel is a weighted sum of 4 or 16 input pixels. Weights are
computed once for all frames. Neither PIL's bicubic kernel (a = -1) nor its border is that of
``torch.nn.functional.grid_sample``.
"""

import itertools

import numpy as np
import torch
from torch.nn.functional import embedding_bag

GREY = 128
Box = tuple[int, int, int, int]  # top, left, height, width


def warp(frames: np.ndarray, matrix: tuple[float, ...], bicubic: bool, box: Box) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 as by ``Image.transform`` with ``Image.AFFINE`` and grey outside,
    cropped to ``box``.

    Args:
        matrix: (a, b, c, d, e, f): the output pixel (x, y) shows the input at
            (a x + b y + c, d x + e y + f), all at pixel centres.
        bicubic: bicubic interpolation, else bilinear.
    """
    a, b, c, d, e, f = matrix
    top, left, height, width = box
    if (d, e, f) == (0, 1, 0) and a == 1:
        offsets = b * (np.arange(top, top + height) + 0.5) + c
        return _shift_rows(frames[:, top : top + height], offsets, bicubic, left, width)
    if (a, b, c) == (1, 0, 0) and e == 1:
        offsets = d * (np.arange(left, left + width) + 0.5) + f
        return _shift_columns(frames[:, :, left : left + width], offsets, bicubic, top, height)
    return _gather(frames, matrix, bicubic, box)


def _shift_rows(frames, offsets, bicubic, left: int, width: int) -> np.ndarray:
    """Rows of ``frames``, each shifted by its own offset; ``width`` columns from ``left`` on."""
    padded = np.concatenate([frames[:, :, :1]] * 2 + [frames] + [frames[:, :, -1:]] * 2, 2)
    lines = padded.reshape(*padded.shape[:2], -1)
    out = np.empty((*frames.shape[:2], width * 3), np.uint8)
    _shift_lines(lines, out, offsets, 3, bicubic, left, width)
    return out.reshape(*out.shape[:2], width, 3)


def _shift_columns(frames, offsets, bicubic, top: int, height: int) -> np.ndarray:
    """As :func:`_shift_rows` for columns, which stay rows in memory."""
    padded = np.concatenate([frames[:, :1]] * 2 + [frames] + [frames[:, -1:]] * 2, 1)
    lines = padded.reshape(*padded.shape[:2], -1).swapaxes(1, 2)
    out = np.empty((len(frames), height, lines.shape[1]), np.uint8)
    _shift_lines(lines, out.swapaxes(1, 2), offsets.repeat(3), 1, bicubic, top, height)
    return out.reshape(len(frames), height, -1, 3)


def _shift_lines(lines, out, offsets, step: int, bicubic: bool, start: int, count: int) -> None:
    """Fills ``out`` (T, A, count * step) from A lines of B pixels, of ``step`` bytes each, with
    two more of the border's at either end: (T, A, (2 + B + 2) * step)."""
    size = lines.shape[2] // step - 4
    before = np.floor(offsets).astype(int)
    weights = _weights((offsets - before).astype(np.float32), bicubic)[..., None]
    taps = len(weights)
    aligned = np.empty_like(lines, shape=(*lines.shape[:2], (count + taps - 1) * step))
    for run in _equal_runs(before):
        first = start + before[run.start] - bicubic
        begin = max(first, -2)
        end = max(min(first + count + taps - 1, size + 2), begin)
        aligned[:, run, (begin - first) * step : (end - first) * step] = lines[
            :, run, (begin + 2) * step : (end + 2) * step
        ]
    for frame, target in zip(aligned, out):
        pixels = frame.astype(np.float32)
        total = weights[0] * pixels[:, : count * step]
        for tap in range(1, taps):
            total += weights[tap] * pixels[:, tap * step : (tap + count) * step]
        target[:] = _to_bytes(total)
    nearest = np.floor(offsets + 0.5).astype(int)
    for run in _equal_runs(nearest):
        begin = -nearest[run.start] - start
        out[:, run, : max(begin, 0) * step] = GREY
        out[:, run, max(begin + size, 0) * step :] = GREY


def _equal_runs(values: np.ndarray) -> list[slice]:
    """Slices of equal neighbours."""
    ends = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _gather(frames, matrix, bicubic: bool, box: Box) -> np.ndarray:
    """As `warp`, for any matrix."""
    count, height, width = frames.shape[:3]
    top, left, out_height, out_width = box
    y, x = np.mgrid[top : top + out_height, left : left + out_width] + 0.5
    a, b, c, d, e, f = matrix
    from_x, from_y = (a * x + b * y + c).ravel(), (d * x + e * y + f).ravel()
    columns, across = _taps(from_x, width, bicubic)  # (taps, N)
    rows, down = _taps(from_y, height, bicubic)
    indices = (rows[:, None] * width + columns).reshape(-1, len(from_x))  # (taps^2, N)
    weights = (down[:, None] * across).reshape(indices.shape)
    pixels = frames.reshape(count, -1).T.astype(np.float32, order="C").reshape(height * width, -1)
    found = embedding_bag(
        torch.from_numpy(indices.T.copy()),
        torch.from_numpy(pixels),
        mode="sum",
        per_sample_weights=torch.from_numpy(weights.T.copy()),
    ).numpy()  # (N, 3 * T)
    out = _to_bytes(found)
    out[(from_x < 0) | (from_x >= width) | (from_y < 0) | (from_y >= height)] = GREY
    return out.reshape(-1, count).T.copy().reshape(count, out_height, out_width, 3)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """Truncates to bytes as PIL does; overwrites ``values``."""
    values += 2**-10  # a flat area is unchanged despite float32 rounding
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def _taps(position: np.ndarray, size: int, bicubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Indices along one axis of the pixels that make up the value at each position (N,), clamped to
    the border, and their weights: (taps, N) int32 and float32."""
    before = np.floor(position - 0.5)
    weights = _weights((position - 0.5 - before).astype(np.float32), bicubic)
    offsets = np.arange(len(weights), dtype=np.int32)[:, None] - bicubic
    return np.clip(before.astype(np.int32) + offsets, 0, size - 1), weights


def _weights(t: np.ndarray, bicubic: bool) -> np.ndarray:
    """Weights (2 or 4, N) of the pixels around positions that are ``t`` (N,) after a pixel."""
    if not bicubic:
        return np.stack([1 - t, t])
    return np.stack(  # cubic convolution with a = -1
        [t * (t * (2 - t) - 1), 1 + t * t * (t - 2), t * (1 + t * (1 - t)), t * t * (t - 1)]
    )
