"""SlowFast's RandAugment on byte arrays instead of PIL images, with ``STTS.FAST_AUGMENT``.

SlowFast still draws the operations, their strength, the interpolation of each frame and the crop.
The operations are recorded and then applied to the crop only, by `stts_slowfast.video.image_ops`:
each differs from PIL's by at most one grey level.
"""

import copy
import random
from collections.abc import Callable
from contextvars import ContextVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stts_slowfast.pyslowfast.config_access import get_value
from stts_slowfast.pyslowfast.lazy_clip import LazyClip
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.video.affine import Box
from stts_slowfast.video.image_ops import GEOMETRIC, Operation, augment

# Function of SlowFast's `rand_augment.py` to the operation of `image_ops`.
NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "solarize_add": "SolarizeAdd",
    "color": "Color",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x_rel": "TranslateX",
    "translate_y_rel": "TranslateY",
}

# The steps that SlowFast records on a `LazyClip` before: bytes to floats in 0..1.
_TO_FLOATS = ((Tensor.div_, 255.0),)

# Whether the item that is read now is augmented by this file.
_enabled: ContextVar[bool] = ContextVar("stts_fast_augment", default=False)


def wrap_augment(kinetics) -> None:
    """How Kinetics and SSv2 augment frames in training (``slowfast/datasets``)."""
    from slowfast.datasets import rand_augment, utils

    wrap(rand_augment.AugmentOp, "__call__", _operate)
    wrap(kinetics.Kinetics, "__getitem__", _get_item)
    wrap(kinetics.decoder, "decode", _decode)
    wrap(
        kinetics.Kinetics,
        "_frame_to_list_img",
        lambda original, self, x: _to_images(original, x, self),
    )
    wrap(
        kinetics.Kinetics,
        "_list_img_to_frames",
        lambda original, self, x: _to_clip(original, x, self),
    )
    wrap(utils, "aug_frame", _augment_frames)
    wrap(utils, "_frame_to_list_img", _to_images)
    wrap(utils, "_list_img_to_frames", _to_clip)


def is_enabled(cfg) -> bool:
    """Whether a config sets ``STTS.FAST_AUGMENT``."""
    return bool(get_value(cfg, "STTS.FAST_AUGMENT", False))


class LazyImages:
    """A clip in place of SlowFast's list of PIL images; operations are recorded.

    Attributes:
        frames: (T, H, W, 3) uint8.
        operations: the recorded operations, in order.
    """

    def __init__(self, frames: np.ndarray, operations: tuple[Operation, ...] = ()):
        self.frames, self.operations = frames, operations
        self._box, self._crop = None, None

    def crop(self, box: Box) -> np.ndarray:
        """The crop ``box`` of the augmented frames; the last one is cached."""
        if box != self._box:
            self._box, self._crop = box, augment(self.frames, self.operations, box)
        return self._crop


class LazyFrame:
    """One frame of `LazyImages`; `LazyClip` handles it as an array (H, W, 3)."""

    def __init__(self, images: LazyImages, number: int):
        self.images, self.number = images, number

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.frames.shape[1:]

    def __getitem__(self, square: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (
            axis.indices(size) for axis, size in zip(square, self.shape)
        )
        return self.images.crop((top, left, bottom - top, right - left))[self.number]


def _get_item(getitem, dataset, index):
    token = _enabled.set(dataset.mode == "train" and is_enabled(dataset.cfg))
    try:
        return getitem(dataset, index)
    finally:
        _enabled.reset(token)


def _augment_frames(aug_frame, cfg, *args, **kwargs):
    token = _enabled.set(is_enabled(cfg))
    try:
        return aug_frame(cfg, *args, **kwargs)
    finally:
        _enabled.reset(token)


def _decode(decode, *args, **kwargs):
    frames, *others = decode(*args, **kwargs)
    if _enabled.get() and frames is not None:
        # Lazy: SlowFast would copy and convert all pixels.
        frames = [
            LazyClip.create(list(clip.numpy())) if _is_plain(clip) else clip for clip in frames
        ]
    return frames, *others


def _is_plain(clip) -> bool:
    return type(clip) is Tensor and clip.dtype == torch.uint8 and clip.dim() == 4


def _to_images(original, frames: Tensor, dataset=None):
    """Frames (T, 3, H, W), bytes or floats in 0..1, as `LazyImages`."""
    if not _enabled.get():
        return original(frames) if dataset is None else original(dataset, frames)
    if isinstance(frames, LazyClip) and frames.steps == _TO_FLOATS:
        return LazyImages(np.stack(frames.images))
    pixels = frames.mul(255).byte() if frames.is_floating_point() else frames
    return LazyImages(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))


def _operate(call, operation, images):
    if not isinstance(images, LazyImages):
        return call(operation, images)
    drawing = copy.copy(operation)  # SlowFast draws, then calls aug_fn
    drawing.aug_fn = _recorder(NAMES[operation.aug_fn.__name__])
    return call(drawing, images)


def _recorder(name: str) -> Callable[..., LazyImages]:
    """A function that records the operation ``name`` for all frames."""

    def record(images: LazyImages, argument: float = 0.0, *, resample, **_) -> LazyImages:
        bicubic: list[bool] | bool = False
        if name in GEOMETRIC:
            several = isinstance(resample, (list, tuple))  # one is drawn for each frame
            drawn = [random.choice(resample) if several else resample for _ in images.frames]
            if not {*drawn} <= {Image.BILINEAR, Image.BICUBIC}:
                raise ValueError(
                    "STTS.FAST_AUGMENT is True, but AUG.INTERPOLATION is none of bicubic, bilinear "
                    "and random: set one of these"
                )
            bicubic = [method == Image.BICUBIC for method in drawn]
            bicubic = bicubic[0] if len({*bicubic}) == 1 else bicubic
        height, width = images.frames.shape[1:3]
        argument *= {"TranslateX": width, "TranslateY": height}.get(name, 1)
        operation = Operation(name, argument, bicubic)
        return LazyImages(images.frames, (*images.operations, operation))

    return record


def _to_clip(original, images, dataset=None) -> Tensor:
    """`LazyImages` as a `LazyClip` of floats (T, 3, H, W) in 0..1."""
    if not isinstance(images, LazyImages):
        return original(images) if dataset is None else original(dataset, images)
    frames = [LazyFrame(images, number) for number in range(len(images.frames))]
    return LazyClip.create(frames, _TO_FLOATS, (0, 3, 1, 2), floating=True)
