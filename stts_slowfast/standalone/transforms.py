"""Transforms of clips in training and testing, as in SlowFast.

All transform one clip, its frames alike, in uint8 if possible. Random ones draw from PyTorch's and
Python's generators, which data.py seeds for every item.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as F

from stts_slowfast.constants import sized_constant
from stts_slowfast.standalone.rand_augment import RandAugment, RandomErasing


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
        top, left = self.place(*clip.shape[-2:])
        return clip[..., top : top + self.size, left : left + self.size]

    def place(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the square in a scaled frame."""
        top, left = math.ceil((height - self.size) / 2), math.ceil((width - self.size) / 2)
        if height > width:
            top = (0, top, height - self.size)[self.position]
        else:
            left = (0, left, width - self.size)[self.position]
        return top, left


class _RandomCrop:
    """Scales the short side to a random size, and crops at a random position."""

    def __init__(self, scales: tuple[int, int], size: int, inverse: bool):
        self.scales, self.size, self.inverse = scales, size, inverse

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        low, high = self.scales
        if self.inverse:
            size = round(1 / random.uniform(1 / high, 1 / low))
        else:
            size = round(random.uniform(low, high))
        clip = scale_short_side(clip, size)
        # Never at the very end, as in SlowFast.
        top, left = (random.randrange(max(n - self.size, 1)) for n in clip.shape[-2:])
        return clip[..., top : top + self.size, left : left + self.size]


def train_transform(cfg, split: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, 3, H, W) uint8 -> (3, T, TRAIN_CROP_SIZE, TRAIN_CROP_SIZE), uint8; clips that are erased
    are normalised before: see `normalize_clips`.

    SlowFast validates on random crops too, but without augmentation.
    """
    train = split == "train"
    augment = train and cfg.AUG.ENABLE
    steps = []
    policy = None
    if augment and cfg.AUG.AA_TYPE:
        policy = RandAugment(cfg.AUG.AA_TYPE, cfg.AUG.INTERPOLATION)
    relative = cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE or cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE
    # SlowFast's Ssv2 reads them only with AUG.ENABLE.
    if train and relative and (augment or cfg.TRAIN.DATASET.lower() != "ssv2"):
        steps.append(_RandomResizedCrop(cfg, policy))
    else:
        scales = tuple(cfg.DATA.TRAIN_JITTER_SCALES)
        _check_crop("TRAIN_JITTER_SCALES", scales[0], "TRAIN_CROP_SIZE", cfg.DATA.TRAIN_CROP_SIZE)
        inverse = cfg.DATA.INV_UNIFORM_SAMPLE
        if policy:
            steps.append(policy)
        steps.append(_RandomCrop(scales, cfg.DATA.TRAIN_CROP_SIZE, inverse))
    if cfg.DATA.RANDOM_FLIP:
        steps.append(v2.RandomHorizontalFlip())
    steps.append(functools.partial(_to_model, reverse=cfg.DATA.REVERSE_INPUT_CHANNEL))
    steps.append(_contiguous)
    if augment and cfg.AUG.RE_PROB > 0:  # normal noise of a normalised clip does not fit in uint8
        normalise = functools.partial(normalize_clips, cfg=cfg)
        steps.append(RandomErasing(cfg.AUG.RE_PROB, cfg.AUG.RE_MODE, cfg.AUG.RE_COUNT, normalise))
    return v2.Compose(steps)


class _RandomResizedCrop:
    """Crops at a random position, size and shape, augments the crop by the ``policy``, scales it.

    SlowFast augments before it crops, with the same result: the policy reads the whole frames.
    """

    def __init__(self, cfg, policy: RandAugment | None):
        self.policy, self.size = policy, cfg.DATA.TRAIN_CROP_SIZE
        self.scale = tuple(cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE) or (0.8, 1.0)
        self.ratio = tuple(cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE) or (3 / 4, 4 / 3)

    def __call__(self, clip: torch.Tensor) -> torch.Tensor:
        box = RandomResizedCrop.get_params(clip, self.scale, self.ratio)
        top, left, height, width = box
        if self.policy:
            clip = self.policy(clip, box)
        else:
            clip = clip[..., top : top + height, left : left + width]
        return F.resize(clip, [self.size, self.size], antialias=False)


def test_crops(cfg) -> list[UniformCrop]:
    """The NUM_SPATIAL_CROPS crops of testing; the centre if there is one, on SSv2 the start."""
    crops, size, scale = cfg.TEST.NUM_SPATIAL_CROPS, cfg.DATA.TEST_CROP_SIZE, view_scale(cfg)
    _check_crop("TRAIN_JITTER_SCALES", scale, "TEST_CROP_SIZE", size)
    only = [0 if cfg.TEST.DATASET.lower() == "ssv2" else 1]
    positions = only if crops == 1 else range(crops)
    return [UniformCrop(scale, size, position) for position in positions]


def view_transform(cfg, position: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, 3, H, W) uint8 -> (3, T, TEST_CROP_SIZE, TEST_CROP_SIZE): one of `make_test_views`."""
    crop = UniformCrop(view_scale(cfg), cfg.DATA.TEST_CROP_SIZE, position)
    return lambda clip: make_test_views(
        cfg, clip.permute(0, 2, 3, 1).numpy(), [range(len(clip))], [crop]
    )[0]


def stack_frames(images: Sequence[np.ndarray], indices: Sequence[int]) -> torch.Tensor:
    """The images (H, W, 3) at ``indices`` as a clip (T, 3, H, W)."""
    return torch.from_numpy(np.stack([images[index] for index in indices])).permute(0, 3, 1, 2)


def make_test_views(
    cfg, images: Sequence[np.ndarray], clips: Sequence[Sequence[int]], crops: list[UniformCrop]
) -> torch.Tensor:
    """The test views of a video: every crop of every clip, crop after crop.

    Args:
        images: each (H, W, 3) uint8.
        clips: for each, the indices of its T frames among them.

    Returns:
        (views, 3, T, TEST_CROP_SIZE, TEST_CROP_SIZE); still uint8 if the frames have the right
        scale, else normalised float32: see `normalize_clips`.
    """
    sides, size = images[0].shape[:2], crops[0].size
    if min(sides) != crops[0].scale:
        return torch.stack(
            [view for clip in clips for view in _scaled(cfg, stack_frames(images, clip), crops)]
        )
    views = np.empty((len(clips), len(crops), len(clips[0]), size, size, 3), np.uint8)
    for views_of_clip, clip in zip(views, clips):
        for view, crop in zip(views_of_clip, crops):
            top, left = crop.place(*sides)
            for image, index in zip(view, clip):  # contiguous rows
                image[:] = images[index][top : top + size, left : left + size]
    views = torch.from_numpy(views.reshape(-1, *views.shape[2:])).permute(0, 4, 1, 2, 3)
    return views.flip(1) if cfg.DATA.REVERSE_INPUT_CHANNEL else views


def _scaled(cfg, clip: torch.Tensor, crops: list[UniformCrop]) -> torch.Tensor:
    clip = F.to_dtype(clip, torch.float32, scale=True)
    clip = scale_short_side(clip, crops[0].scale)  # once for all crops
    views = (_to_model(crop(clip), cfg.DATA.REVERSE_INPUT_CHANNEL) for crop in crops)
    return torch.stack([_normalized(view, cfg) for view in views])


def normalize_clips(clips: torch.Tensor, cfg) -> torch.Tensor:
    """Clips (..., 3, T, H, W) as inputs of a model: uint8 pixels become normalised float32; float
    clips are already normalised and returned as they are."""
    if clips.is_floating_point():
        return clips
    pixels = torch.empty(clips.shape, dtype=torch.float32, device=clips.device)
    return _normalized(pixels.copy_(clips).mul_(1 / 255), cfg)


def _normalized(clips: torch.Tensor, cfg) -> torch.Tensor:
    """Normalises clips (..., 3, T, H, W) of 0..1, whose channels may be reversed; by one value a
    channel, or one for all."""
    order = -1 if cfg.DATA.REVERSE_INPUT_CHANNEL else 1
    mean, std = (_of_channels(clips, *node[::order]) for node in (cfg.DATA.MEAN, cfg.DATA.STD))
    return clips.sub(mean).div_(std)


@sized_constant
def _of_channels(*values, dtype, device):
    # Kept: a copy to a device would wait for it in each iteration.
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1, 1)


def view_scale(cfg) -> int:
    """The short side in testing: the crop's if several crops cover the frame, else the frame's
    around the one crop (``kinetics.Kinetics.__getitem__``, ``ssv2.Ssv2.__getitem__``)."""
    if cfg.TEST.NUM_SPATIAL_CROPS > 1 or cfg.TEST.DATASET.lower() == "ssv2":
        return cfg.DATA.TEST_CROP_SIZE
    return cfg.DATA.TRAIN_JITTER_SCALES[0]


def decode_short_side(cfg, scale: int) -> int:
    """The short side to decode at; 0 for the file's own, as with SlowFast's PyAV backend the
    transforms scale."""
    return 0 if cfg.DATA.DECODING_BACKEND == "pyav" else scale


def _to_model(clip: torch.Tensor, reverse: bool) -> torch.Tensor:
    """(T, 3, H, W) -> (3, T, H, W), with the channels reversed if the model expects BGR."""
    clip = clip.transpose(0, 1)
    return clip.flip(0) if reverse else clip


def _contiguous(clip: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(clip.numpy()))  # several times PyTorch's speed


def _check_crop(scale_key: str, scale: int, size_key: str, size: int) -> None:
    if scale < size:
        raise ValueError(
            f"DATA.{scale_key} begins at {scale} but DATA.{size_key} is {size}: "
            "frames must not be scaled below the crop"
        )
