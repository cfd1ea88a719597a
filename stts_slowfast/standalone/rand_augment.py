"""RandAugment and random erasing, as in SlowFast, alike for all frames of a clip."""

import math
import random
import re

import torch

from stts_slowfast.video.affine import Box
from stts_slowfast.video.image_ops import OPERATIONS, Operation, augment

_BICUBIC = {"bilinear": [False], "bicubic": [True], "random": [False, True]}


class RandAugment:
    """RandAugment (arXiv 1909.13719) by a policy in timm's notation, for uint8 clips.

    ``rand-m7-n4-mstd0.5-inc1``: 4 operations, each applied with probability 0.5, at a magnitude of
    0..10 drawn from a normal distribution with mean 7 and standard deviation 0.5; ``inc1``: the
    strength of all grows with it. (`v2.RandAugment` has others, always applied, and no deviation.)
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
        self.bicubic = _BICUBIC[interpolation]

    def __call__(self, clip: torch.Tensor, box: Box | None = None) -> torch.Tensor:
        """The ``box`` of the augmented clip (T, 3, H, W)."""
        operations = [
            operation(
                name,
                min(max(random.gauss(self.magnitude, self.deviation), 0.0), 10.0) / 10,
                self.increasing,
                random.choice([-1, 1]),
                clip.shape[-2:],
                random.choice(self.bicubic),
            )
            for name in random.choices(OPERATIONS, k=self.num_ops)
            if random.random() < 0.5
        ]
        frames = clip.permute(0, 2, 3, 1).numpy()  # the decoder's order, if nothing changed it
        return torch.from_numpy(augment(frames, operations, box)).permute(0, 3, 1, 2)


def operation(
    name: str, level: float, increasing: bool, sign: int, size: tuple[int, int], bicubic: bool
) -> Operation:
    """One of ``OPERATIONS`` at a ``level`` of 0..1, by timm's scales; ``sign`` -1 or 1, ``size``
    the frames' height and width."""
    signed = sign * level
    factor = 1 + 0.9 * signed if increasing else 0.1 + 1.8 * level
    argument = {
        "Posterize": 4 - int(level * 4) if increasing else int(level * 4),
        "Solarize": 256 - int(level * 256) if increasing else int(level * 256),
        "SolarizeAdd": int(level * 110),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), factor),
        "Rotate": -30 * signed,
        "ShearX": 0.3 * signed,
        "ShearY": 0.3 * signed,
        "TranslateX": -0.45 * signed * size[1],
        "TranslateY": -0.45 * signed * size[0],
    }
    return Operation(name, argument.get(name, 0), bicubic)


class RandomErasing:
    """Random erasing (arXiv 1708.04896) of the same boxes in all frames of a clip (3, T, H, W),
    which ``prepare`` normalises before, if it is erased.

    1 to ``count`` boxes, together 2% to a third of the frame; ``mode`` ``pixel`` fills them with
    normal noise, ``rand`` with one normal colour for each frame, ``const`` with zeros. (With
    several boxes the first 1/``count`` of the frames are not erased, as in SlowFast.
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
        rows, columns = clip.shape[-2:]
        for _ in range(count):
            top, left, height, width = self._box(rows, columns, count)
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
