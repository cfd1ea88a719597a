"""RandAugment and random erasing, as in SlowFast, alike for all frames of a clip."""

import math
import random
import re

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
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(
                f"AUG.INTERPOLATION is {interpolation!r}: use one of {sorted(_INTERPOLATIONS)}"
            )
        values = {match[1]: float(match[2]) for match in found}
        self.magnitude = values.get("m", 10.0)
        self.num_ops = int(values.get("n", 2))
        self.deviation = values.get("mstd", 0.0)
        self.increasing = bool(values.get("inc", 0))
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
        clip = clip.contiguous()  # several times faster than the decoder's order
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
    if name in _MOVES:
        return _move(clip, name, level * sign, interpolation, box)
    if box:
        return cut(apply_operation(clip, name, level, increasing, sign, interpolation), box)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        adjust = {
            "Color": F.adjust_saturation,
            "Contrast": F.adjust_contrast,
            "Brightness": F.adjust_brightness,
            "Sharpness": _sharpen,
        }[name]
        return adjust(clip, 1 + sign * 0.9 * level if increasing else 0.1 + 1.8 * level)
    if name == "AutoContrast":
        return F.autocontrast(clip)
    if name == "Equalize":
        return F.equalize(clip)
    if name == "Invert":
        return F.invert(clip)
    if name == "Posterize":
        bits = 4 - int(level * 4) if increasing else int(level * 4)
        return F.posterize(clip, bits) if bits else torch.zeros_like(clip)
    if name == "Solarize":
        threshold = 256 - int(level * 256) if increasing else int(level * 256)
        return clip ^ ((clip >= threshold).to(clip.dtype) * 255) if threshold < 256 else clip
    if name == "SolarizeAdd":
        return clip + (clip < 128).to(clip.dtype) * int(level * 110)
    raise ValueError(f"{name!r} is none of {OPERATIONS}")


def _sharpen(clip: torch.Tensor, factor: float) -> torch.Tensor:
    # Its convolution of bytes in the usual order takes twenty times as long.
    clip = clip.contiguous(memory_format=torch.channels_last)
    return F.adjust_sharpness(clip, factor).contiguous()


def _move(clip: torch.Tensor, name: str, amount: float, interpolation, box) -> torch.Tensor:
    """Rotates by 30 degrees, shears by 0.3, or moves by 0.45 of the side, times ``amount``."""
    height, width = clip.shape[-2:]
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
    return warp(clip, matrix, interpolation == F.InterpolationMode.BICUBIC, box)


class RandomErasing:
    """Random erasing (arXiv 1708.04896) of the same boxes in all frames of a clip (3, T, H, W), of
    which ``prepare`` makes a normalised one first, where it is erased.

    1 to ``count`` boxes, together 2% to a third of the frame; ``mode`` ``pixel`` fills them with
    normal noise, ``rand`` with one normal colour for each frame, ``const`` with zeros. (With
    several boxes the first 1/``count`` of the frames stay clean, as in SlowFast.
    `v2.RandomErasing` would give all frames the same noise.)
    """

    def __init__(self, prob: float, mode: str = "pixel", count: int = 1, prepare=torch.clone):
        if mode not in ("pixel", "rand", "const"):
            raise ValueError(f"AUG.RE_MODE is {mode!r}: use pixel, rand or const")
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
