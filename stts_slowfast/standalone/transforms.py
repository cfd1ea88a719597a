"""Transforms of clips in training and testing, and the mixing of mini-batches, as in SlowFast.

All but `batch_mixer` work on one clip and treat its frames alike, in uint8 as long as they can.
What is random draws from PyTorch's and Python's generators, which data.py seeds for every item.
"""

import functools
import math
import random
import re
from collections.abc import Callable

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from stts_slowfast.standalone.warp import warp

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

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        clip = clip.contiguous()  # several times faster than the decoder's order
        for name in random.choices(OPERATIONS, k=self.num_ops):
            if random.random() < 0.5:
                magnitude = min(max(random.gauss(self.magnitude, self.deviation), 0.0), 10.0)
                clip = apply_operation(
                    clip,
                    name,
                    magnitude / 10,
                    self.increasing,
                    random.choice([-1, 1]),
                    random.choice(self.interpolations),
                )
        return clip


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


def apply_operation(
    clip: torch.Tensor, name: str, level: float, increasing: bool, sign: int, interpolation
) -> torch.Tensor:
    """One of ``OPERATIONS`` at a ``level`` of 0..1, by timm's scales; ``sign`` -1 or 1."""
    if name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
        return _move(clip, name, level * sign, interpolation)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        adjust = {
            "Color": F.adjust_saturation,
            "Contrast": F.adjust_contrast,
            "Brightness": F.adjust_brightness,
            "Sharpness": F.adjust_sharpness,
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


def _move(clip: torch.Tensor, name: str, amount: float, interpolation) -> torch.Tensor:
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
    return warp(clip, matrix, interpolation == F.InterpolationMode.BICUBIC)


class RandomErasing:
    """Random erasing (arXiv 1708.04896) of the same boxes in all frames of a normalised clip
    (3, T, H, W).

    1 to ``count`` boxes, together 2% to a third of the frame; ``mode`` ``pixel`` fills them with
    normal noise, ``rand`` with one normal colour for each frame, ``const`` with zeros. (With
    several boxes the first 1/``count`` of the frames stay clean, as in SlowFast.
    `v2.RandomErasing` would give all frames the same noise.)
    """

    def __init__(self, prob: float, mode: str = "pixel", count: int = 1):
        if mode not in ("pixel", "rand", "const"):
            raise ValueError(f"AUG.RE_MODE is {mode!r}: use pixel, rand or const")
        self.prob, self.mode, self.count = prob, mode, count

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        if random.random() > self.prob:
            return clip
        clip = clip.clone()
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


def scale_short_side(clip: torch.Tensor, size: int) -> torch.Tensor:
    """Scales so that the shorter side is ``size``, the other one rounded down."""
    height, width = clip.shape[-2:]
    if min(height, width) == size:
        return clip
    if width < height:
        target = [math.floor(height / width * size), size]
    else:
        target = [size, math.floor(width / height * size)]
    return F.resize(clip, target, antialias=False)


class UniformCrop:
    """Scales the short side to ``scale`` and takes a square of ``size`` at the start (``position``
    0), centre (1) or end (2) of the longer side."""

    def __init__(self, scale: int, size: int, position: int):
        self.scale, self.size, self.position = scale, size, position

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        clip = scale_short_side(clip, self.scale)
        height, width = clip.shape[-2:]
        top, left = math.ceil((height - self.size) / 2), math.ceil((width - self.size) / 2)
        if height > width:
            top = (0, top, height - self.size)[self.position]
        else:
            left = (0, left, width - self.size)[self.position]
        return clip[..., top : top + self.size, left : left + self.size]


class _RandomCrop:
    """Scales the short side to a random size, and crops anywhere."""

    def __init__(self, scales: tuple[int, int], size: int, inverse: bool):
        self.scales, self.inverse = scales, inverse
        self.crop = v2.RandomCrop(size)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        low, high = self.scales
        if self.inverse:
            size = round(1 / random.uniform(1 / high, 1 / low))
        else:
            size = round(random.uniform(low, high))
        return self.crop(scale_short_side(clip, size))


def train_transform(cfg, split: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, 3, H, W) uint8 -> (3, T, TRAIN_CROP_SIZE, TRAIN_CROP_SIZE), uint8 but for random erasing,
    before which clips are normalised: see `prepare`.

    SlowFast validates on random crops too, but without augmentation.
    """
    train = split == "train"
    augment = train and cfg.AUG.ENABLE
    steps = []
    if augment and cfg.AUG.AA_TYPE:
        steps.append(RandAugment(cfg.AUG.AA_TYPE, cfg.AUG.INTERPOLATION))
    if train and (cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE or cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE):
        steps.append(_random_resized_crop(cfg))
    else:
        scales = tuple(cfg.DATA.TRAIN_JITTER_SCALES)
        _check_crop("TRAIN_JITTER_SCALES", scales[0], "TRAIN_CROP_SIZE", cfg.DATA.TRAIN_CROP_SIZE)
        inverse = cfg.DATA.INV_UNIFORM_SAMPLE
        steps.append(_RandomCrop(scales, cfg.DATA.TRAIN_CROP_SIZE, inverse))
    if cfg.DATA.RANDOM_FLIP:
        steps.append(v2.RandomHorizontalFlip())
    steps.append(functools.partial(_to_model, reverse=cfg.DATA.REVERSE_INPUT_CHANNEL))
    if augment and cfg.AUG.RE_PROB > 0:  # normal noise of a normalised clip does not fit in uint8
        steps.append(functools.partial(prepare, cfg=cfg))
        steps.append(RandomErasing(cfg.AUG.RE_PROB, cfg.AUG.RE_MODE, cfg.AUG.RE_COUNT))
    return v2.Compose(steps)


def _random_resized_crop(cfg) -> v2.RandomResizedCrop:
    if cfg.DATA.TRAIN_JITTER_MOTION_SHIFT:
        raise ValueError("DATA.TRAIN_JITTER_MOTION_SHIFT is True: only SlowFast can, set it False")
    return v2.RandomResizedCrop(
        cfg.DATA.TRAIN_CROP_SIZE,
        scale=tuple(cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE) or (0.8, 1.0),
        ratio=tuple(cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE) or (3 / 4, 4 / 3),
        antialias=False,
    )


def view_transform(cfg, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, 3, H, W) uint8 -> (3, T, TEST_CROP_SIZE, TEST_CROP_SIZE): crop ``position`` of
    NUM_SPATIAL_CROPS, or the centre where there is one. Still uint8 where the frames have the
    right scale, else normalised float32: see `prepare`."""
    size, scale = cfg.DATA.TEST_CROP_SIZE, view_scale(cfg)
    _check_crop("TRAIN_JITTER_SCALES", scale, "TEST_CROP_SIZE", size)
    return functools.partial(_view, cfg, UniformCrop(scale, size, position))


def _view(cfg, crop: UniformCrop, clip: torch.Tensor) -> torch.Tensor:
    clip = _to_model(crop(scale_for_view(clip, crop.scale)), cfg.DATA.REVERSE_INPUT_CHANNEL)
    return _normalized(clip, cfg) if clip.is_floating_point() else clip


def scale_for_view(clip: torch.Tensor, scale: int) -> torch.Tensor:
    """A uint8 clip (T, 3, H, W) as its crops need it: as it is where its short side is ``scale``,
    else scaled, float32 of 0..1. What has been scaled passes."""
    if min(clip.shape[-2:]) == scale:
        return clip
    return scale_short_side(F.to_dtype(clip, torch.float32, scale=True), scale)


def prepare(clips: torch.Tensor, cfg) -> torch.Tensor:
    """Clips (..., 3, T, H, W) as a model takes them: uint8 pixels become normalised float32 of the
    same shape, float clips are normalised already and pass."""
    if clips.is_floating_point():
        return clips
    pixels = torch.empty(clips.shape, dtype=torch.float32, device=clips.device)
    return _normalized(pixels.copy_(clips).mul_(1 / 255), cfg)


def _normalized(clips: torch.Tensor, cfg) -> torch.Tensor:
    """Normalises clips (..., 3, T, H, W) of 0..1, whose channels may be reversed."""
    mean, std = (
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1, 1)
        for values in (cfg.DATA.MEAN, cfg.DATA.STD)
    )
    if cfg.DATA.REVERSE_INPUT_CHANNEL:
        mean, std = mean.flip(0), std.flip(0)
    return clips.sub(mean.to(clips.device)).div_(std.to(clips.device))


def view_scale(cfg) -> int:
    """The short side in testing: the crop itself where several lie side by side, or a frame
    around the one crop (``kinetics.Kinetics.__getitem__``, ``ssv2.Ssv2.__getitem__``)."""
    if cfg.TEST.NUM_SPATIAL_CROPS > 1 or cfg.TEST.DATASET == "ssv2":
        return cfg.DATA.TEST_CROP_SIZE
    return cfg.DATA.TRAIN_JITTER_SCALES[0]


def _to_model(clip: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(T, 3, H, W) -> (3, T, H, W), in the order of channels that the model wants."""
    clip = clip.transpose(0, 1)
    return clip.flip(0) if reverse else clip


def _check_crop(scale_key: str, scale: int, size_key: str, size: int) -> None:
    if scale < size:
        raise ValueError(
            f"DATA.{scale_key} begins at {scale} but DATA.{size_key} is {size}: "
            "frames must not be scaled below the crop"
        )


def batch_mixer(cfg) -> Callable | None:
    """Mixup (arXiv 1710.09412), cutmix (1905.04899) and label smoothing of a mini-batch.

    Returns None where MIXUP.ENABLE is False, else a function of clips (B, 3, T, H, W) float and
    labels (B,) long to clips and soft labels (B, NUM_CLASSES) float32.
    """
    if not cfg.MIXUP.ENABLE:
        return None
    node, num_classes = cfg.MIXUP, cfg.MODEL.NUM_CLASSES
    mixup = v2.MixUp(alpha=node.ALPHA, num_classes=num_classes) if node.ALPHA > 0 else None
    cutmix = (
        v2.CutMix(alpha=node.CUTMIX_ALPHA, num_classes=num_classes)
        if node.CUTMIX_ALPHA > 0
        else None
    )

    def mix(clips: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        soft = torch.nn.functional.one_hot(labels, num_classes).float()
        if mixup or cutmix:
            use_cutmix = not mixup or (cutmix and torch.rand(()) < node.SWITCH_PROB)
            if torch.rand(()) < node.PROB:
                video = tv_tensors.Video(clips)  # else a batch of clips is not let in
                video, soft = (cutmix if use_cutmix else mixup)(video, soft)
                clips = video.as_subclass(torch.Tensor)
        smoothing = node.LABEL_SMOOTH_VALUE
        return clips, soft * (1 - smoothing) + smoothing / num_classes

    return mix
