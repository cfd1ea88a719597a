"""RandAugment and random erasing, as in SlowFast, alike for all frames of a clip.

Operations work in NumPy on bytes in the order of the decoder, (T, H, W, 3): its copies in another
order, conversions and lookups take a fraction of PyTorch's time.
"""

import math
import random
import re

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from stts_slowfast.standalone.warp import Box, warp

_INTERPOLATIONS = {
    "bilinear": [F.InterpolationMode.BILINEAR],
    "bicubic": [F.InterpolationMode.BICUBIC],
    "random": [F.InterpolationMode.BILINEAR, F.InterpolationMode.BICUBIC],
}


class RandAugment:
    """RandAugment (arXiv 1909.13719) by a policy in timm's notation, for uint8 clips.

    ``rand-m7-n4-mstd0.5-inc1``: 4 operations, each done with probability 0.5, at a magnitude of
    0..10 drawn from a normal distribution with mean 7 and standard deviation 0.5; ``inc1``: all
    grow stronger with it. (`v2.RandAugment` has other operations, always done, and no deviation.)
    """

    def __init__(self, policy: str, interpolation: str = "bicubic"):
        head, *parts = policy.split("-")
        found = [re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part) for part in parts]
        if head != "rand" or None in found:
            raise ValueError(
                f"AUG.AA_TYPE is {policy!r}: expected 'rand' and parts mX, nX, mstdX or incX, "
                "such as rand-m7-n4-mstd0.5-inc1"
            )
        values = {match[1]: float(match[2]) for match in found}
        if values.get("inc", 1) != 1:  # SlowFast takes the text "0" for True
            raise ValueError(
                f"AUG.AA_TYPE is {policy!r}: inc may only be inc1, which SlowFast makes of any "
                "other; leave it out for operations that do not grow stronger"
            )
        self.magnitude = values.get("m", 10.0)
        self.num_ops = int(values.get("n", 2))
        self.deviation = values.get("mstd", 0.0)
        self.increasing = "inc" in values
        self.interpolations = _INTERPOLATIONS[interpolation]

    def __call__(self, clip: torch.Tensor, box: Box | None = None) -> torch.Tensor:
        """The part ``box`` of the augmented clip: operations behind the last one that looks beyond
        it are done there alone."""
        drawn = [
            (
                name,
                min(max(random.gauss(self.magnitude, self.deviation), 0.0), 10.0) / 10,
                self.increasing,
                random.choice([-1, 1]),
                random.choice(self.interpolations),
            )
            for name in random.choices(OPERATIONS, k=self.num_ops)
            if random.random() < 0.5
        ]
        afar = [place for place, (name, *_) in enumerate(drawn) if name not in _PIXEL_BY_PIXEL]
        if box and not afar:
            clip = cut(clip, box)
        for place, operation in enumerate(drawn):
            clip = apply_operation(clip, *operation, box if afar[-1:] == [place] else None)
        return clip


def cut(clip: torch.Tensor, box: Box) -> torch.Tensor:
    top, left, height, width = box
    return clip[..., top : top + height, left : left + width]


OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)

_MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_PIXEL_BY_PIXEL = {"Invert", "Posterize", "Solarize", "SolarizeAdd", "Color", "Brightness"}
_LUMA = np.float32([0.299, 0.587, 0.114])


def apply_operation(
    clip: torch.Tensor,
    name: str,
    level: float,
    increasing: bool,
    sign: int,
    interpolation,
    box: Box | None = None,
) -> torch.Tensor:
    """One of ``OPERATIONS`` at a ``level`` of 0..1, by timm's scales; ``sign`` -1 or 1. Of the
    result the part ``box``."""
    frames = clip.permute(0, 2, 3, 1).numpy()  # the decoder's order, if nothing changed it
    top, left, height, width = box = box or (0, 0, *frames.shape[1:3])
    part = frames[:, top : top + height, left : left + width]
    strength = 1 + sign * 0.9 * level if increasing else 0.1 + 1.8 * level
    steps = 4 - int(level * 4) if increasing else int(level * 4)
    threshold = 256 - int(level * 256) if increasing else int(level * 256)
    if name in _MOVES:
        out = _move(frames, name, level * sign, interpolation, box)
    elif name == "AutoContrast":
        out = _looked_up(part.transpose(0, 3, 1, 2), _stretching(frames)).transpose(0, 2, 3, 1)
    elif name == "Equalize":
        out = _looked_up(part.transpose(0, 3, 1, 2), _levelling(frames)).transpose(0, 2, 3, 1)
    elif name == "Contrast":
        out = _looked_up(part, _blend(_mean_grey(frames)[:, None], np.arange(256), strength))
    elif name == "Brightness":
        table = _blend(0, np.arange(256), strength)
        out = _looked_up(part, np.broadcast_to(table, (len(part), 256)))
    elif name == "Color":
        out = _saturate(part, strength)
    elif name == "Sharpness":
        out = _sharpen(frames, strength, box)
    elif name == "Invert":
        out = ~part
    elif name == "Posterize":
        out = part & (256 - 2 ** (8 - steps))
    elif name == "Solarize":
        out = part ^ -(part >= threshold).view(np.uint8)
    elif name == "SolarizeAdd":
        out = part + (part < 128).view(np.uint8) * np.uint8(level * 110)
    else:
        raise ValueError(f"{name!r} is none of {OPERATIONS}")
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def _looked_up(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Each byte's entry in its table: ``tables`` (..., 256) has one for each ``pixels[...]``."""
    out = np.empty_like(pixels)
    for place in np.ndindex(tables.shape[:-1]):
        found = pixels[place].tobytes().translate(tables[place].tobytes())
        out[place] = np.frombuffer(found, np.uint8).reshape(out[place].shape)
    return out


def _blend(other, pixels: np.ndarray, factor: float) -> np.ndarray:
    """``Image.blend``: ``pixels`` for a ``factor`` of 1, ``other`` for 0; bytes."""
    return np.clip(other + np.float32(factor) * (pixels - other), 0, 255).astype(np.uint8)


def _mean_grey(frames: np.ndarray) -> np.ndarray:
    """(T,): that of each frame (T, H, W, 3)."""
    columns = frames.reshape(*frames.shape[:2], -1).sum(1, dtype=np.uint32)
    colours = columns.reshape(len(frames), -1, 3).mean(1) / frames.shape[1]
    return np.rint(colours @ _LUMA).astype(np.float32)


def _stretching(frames: np.ndarray) -> np.ndarray:
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


def _levelling(frames: np.ndarray) -> np.ndarray:
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
    """Away from, or towards, the mean of each pixel, counted five times, and its neighbours; pixels
    at the border stay."""
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


def _move(frames: np.ndarray, name: str, amount: float, interpolation, box: Box) -> np.ndarray:
    """Rotates by 30 degrees, shears by 0.3, or moves by 0.45 of the side, times ``amount``."""
    height, width = frames.shape[1:3]
    if name == "Rotate":  # about the middle
        cos, sin = math.cos(math.radians(30 * amount)), math.sin(math.radians(30 * amount))
        x, y = width / 2, height / 2
        matrix = (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)
    else:
        shear, shift = 0.3 * amount, -0.45 * amount
        matrix = {
            "ShearX": (1, shear, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, shear, 1, 0),
            "TranslateX": (1, 0, shift * width, 0, 1, 0),
            "TranslateY": (1, 0, 0, 0, 1, shift * height),
        }[name]
    return warp(frames, matrix, interpolation == F.InterpolationMode.BICUBIC, box)


class RandomErasing:
    """Random erasing (arXiv 1708.04896) of the same boxes in all frames of a clip (3, T, H, W), of
    which ``prepare`` makes a normalised one first, where it is erased.

    1 to ``count`` boxes, together 2% to a third of the frame; ``mode`` ``pixel`` fills them with
    normal noise, ``rand`` with one normal colour for each frame, ``const`` with zeros. (With
    several boxes the first 1/``count`` of the frames stay clean, as in SlowFast.
    `v2.RandomErasing` would give all frames the same noise.)
    """

    def __init__(self, prob: float, mode: str = "pixel", count: int = 1, prepare=torch.clone):
        self.prob, self.mode, self.count, self.prepare = prob, mode, count, prepare

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        if random.random() > self.prob:
            return clip
        clip = self.prepare(clip)
        dirty = clip[:, clip.shape[1] // self.count if self.count > 1 else 0 :]
        count = random.randint(1, self.count)
        for _ in range(count):
            top, left, height, width = self._box(*clip.shape[-2:], count)
            box = dirty[..., top : top + height, left : left + width]
            size = {"pixel": box.shape, "rand": (*dirty.shape[:2], 1, 1), "const": (1,)}[self.mode]
            box.copy_(torch.zeros(size) if self.mode == "const" else torch.randn(size))
        return clip

    def _box(self, height: int, width: int, count: int) -> tuple[int, int, int, int]:
        for _ in range(100):
            area = random.uniform(0.02, 1 / 3) * height * width / count
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
        return 0, 0, 0, 0
