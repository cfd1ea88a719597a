"""RandAugment's operations on all frames of a clip, (T, H, W, 3) uint8, within a grey level of PIL.

They use NumPy in the decoder's memory layout: its transposed copies, conversions and lookups take a
fraction of PyTorch's time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stts_slowfast.video.affine import Box, warp

# Operations whose output pixel depends only on the same input pixel.
POINTWISE = {"Invert", "Posterize", "Solarize", "SolarizeAdd", "Color", "Brightness"}
# Operations that move pixels, by bilinear or bicubic interpolation.
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
OPERATIONS = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd"),
    *("Color", "Contrast", "Brightness", "Sharpness"),
    *("ShearX", "ShearY", "TranslateX", "TranslateY"),
)


class Operation(NamedTuple):
    """One of ``OPERATIONS``, with arguments as of PIL and timm.

    ``argument``: bits that Posterize keeps, the value from which Solarize inverts, the number that
    SolarizeAdd adds to values below 128, the factor of Color, Contrast, Brightness and Sharpness (1
    changes nothing), degrees counterclockwise of Rotate, the factor of ShearX and ShearY, pixels of
    TranslateX and TranslateY; none of the others. ``bicubic``: of the geometric ones, also one for
    each frame; else bilinear.
    """

    name: str
    argument: float = 0.0
    bicubic: bool | Sequence[bool] = False


def augment(frames: np.ndarray, operations: Sequence[Operation], box: Box | None = None):
    """Applies the operations and crops to ``box``; operations after the last non-local one run on
    the crop only."""
    last_nonlocal = max(
        (number for number, each in enumerate(operations) if each.name not in POINTWISE), default=-1
    )
    if box and last_nonlocal < 0:
        frames = crop(frames, box)
    for number, operation in enumerate(operations):
        frames = operate(frames, operation, box if number == last_nonlocal else None)
    return frames


def crop(frames: np.ndarray, box: Box) -> np.ndarray:
    """The part of frames (T, H, W, 3) in ``box``."""
    top, left, height, width = box
    return frames[:, top : top + height, left : left + width]


def operate(frames: np.ndarray, operation: Operation, box: Box | None = None) -> np.ndarray:
    """Applies one operation and crops to ``box``."""
    name, argument, bicubic = operation
    box = box or (0, 0, *frames.shape[1:3])
    part = crop(frames, box)
    if name in GEOMETRIC:
        return _affine(frames, name, argument, bicubic, box)
    if name == "AutoContrast":
        return _apply_lut(part.transpose(0, 3, 1, 2), _autocontrast_lut(frames)).transpose(
            0, 2, 3, 1
        )
    if name == "Equalize":
        return _apply_lut(part.transpose(0, 3, 1, 2), _equalize_lut(frames)).transpose(0, 2, 3, 1)
    if name == "Contrast":
        return _apply_lut(part, _blend(_mean_grey(frames)[:, None], np.arange(256), argument))
    if name == "Brightness":
        table = _blend(0, np.arange(256), argument)
        return _apply_lut(part, np.broadcast_to(table, (len(part), 256)))
    if name == "Color":
        return _saturate(part, argument)
    if name == "Sharpness":
        return _sharpen(frames, argument, box)
    if name == "Invert":
        return ~part
    if name == "Posterize":
        return part & (256 - 2 ** (8 - argument))
    if name == "Solarize":
        return part ^ -(part >= argument).view(np.uint8)
    if name == "SolarizeAdd":
        return part + (part < 128).view(np.uint8) * np.uint8(argument)
    raise ValueError(f"{name!r} is none of {OPERATIONS}")


_LUMA = np.float32([0.299, 0.587, 0.114])


def _apply_lut(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Applies lookup tables (..., 256), one for each ``pixels[...]``."""
    out = np.empty_like(pixels)
    for index in np.ndindex(tables.shape[:-1]):
        found = pixels[index].tobytes().translate(tables[index].tobytes())
        out[index] = np.frombuffer(found, np.uint8).reshape(out[index].shape)
    return out


def _blend(other, pixels: np.ndarray, factor: float) -> np.ndarray:
    """``Image.blend``: ``pixels`` for a ``factor`` of 1, ``other`` for 0; bytes."""
    return np.clip(other + np.float32(factor) * (pixels - other), 0, 255).astype(np.uint8)


def _mean_grey(frames: np.ndarray) -> np.ndarray:
    """Mean grey level (T,) of frames (T, H, W, 3)."""
    columns = frames.reshape(*frames.shape[:2], -1).sum(1, dtype=np.uint32)
    colours = columns.reshape(len(frames), -1, 3).mean(1) / frames.shape[1]
    return np.rint(colours @ _LUMA).astype(np.float32)


def _autocontrast_lut(frames: np.ndarray) -> np.ndarray:
    """Tables (T, 3, 256) that stretch each channel's values to 0..255."""
    columns = frames.reshape(*frames.shape[:2], -1)
    low, high = (
        edge.reshape(len(frames), -1, 3).transpose(0, 2, 1).astype(float)
        for edge in (columns.min(1), columns.max(1))
    )
    low, high = low.min(2, keepdims=True), high.max(2, keepdims=True)
    values = np.arange(256)
    stretched = np.clip((values - low) * (255 / np.maximum(high - low, 1)), 0, 255)
    return np.where(high > low, stretched, values).astype(np.uint8)


def _equalize_lut(frames: np.ndarray) -> np.ndarray:
    """Tables (T, 3, 256) that make each channel's values about equally frequent."""
    planes = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).flatten(2)
    counts = np.array(
        [[plane.bincount(minlength=256).numpy() for plane in frame] for frame in planes]
    )
    highest = planes.amax(2, keepdim=True).long().numpy()
    step = (planes.shape[2] - np.take_along_axis(counts, highest, 2)) // 255
    levels = (counts.cumsum(2) - counts + step // 2) // np.maximum(step, 1)
    return np.where(step > 0, np.minimum(levels, 255), np.arange(256)).astype(np.uint8)


def _saturate(frames: np.ndarray, factor: float) -> np.ndarray:
    out = np.empty(frames.shape, np.uint8)
    for frame, target in zip(frames, out):
        planes = np.ascontiguousarray(frame.transpose(2, 0, 1)).astype(np.float32)
        grey = np.rint(_LUMA[0] * planes[0] + _LUMA[1] * planes[1] + _LUMA[2] * planes[2])
        target.transpose(2, 0, 1)[:] = _blend(grey, planes, factor)
    return out


def _sharpen(frames: np.ndarray, factor: float, box: Box) -> np.ndarray:
    """Blends with a 3x3 smoothing whose centre has weight 5; border pixels are unchanged."""
    top, left, height, width = box
    out = frames[:, top : top + height, left : left + width].copy()
    first, last = max(top, 1), min(top + height, frames.shape[1] - 1)
    begin, end = max(left, 1), min(left + width, frames.shape[2] - 1)
    for frame, target in zip(frames, out):
        around = frame[first - 1 : last + 1, begin - 1 : end + 1].astype(np.uint16)
        rows = around[:-2] + around[1:-1] + around[2:]
        pixels = around[1:-1, 1:-1]
        smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * pixels + 6) // 13
        target[first - top : last - top, begin - left : end - left] = _blend(
            smooth.astype(np.float32), pixels, factor
        )
    return out


def _affine(frames: np.ndarray, name: str, argument: float, bicubic, box: Box) -> np.ndarray:
    height, width = frames.shape[1:3]
    if name == "Rotate":  # about the centre
        cos, sin = math.cos(math.radians(argument)), -math.sin(math.radians(argument))
        x, y = width / 2, height / 2
        matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    else:
        matrix = {
            "ShearX": (1, argument, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, argument, 1, 0),
            "TranslateX": (1, 0, argument, 0, 1, 0),
            "TranslateY": (1, 0, 0, 0, 1, argument),
        }[name]
    if isinstance(bicubic, bool):
        return warp(frames, matrix, bicubic, box)
    out = np.empty((len(frames), *box[2:], 3), np.uint8)
    for value in set(bicubic):
        chosen = np.array(bicubic) == value
        out[chosen] = warp(frames[chosen], matrix, value, box)
    return out
