"""SlowFast's RandAugment on bytes instead of PIL's images, if STTS.FAST_AUGMENT asks for it.

SlowFast draws, as ever: which operations, how strong, which interpolation for each frame, which
crop. What it would do to a list of images is put down, and done to the crop alone, by
`stts_slowfast.video.image_ops`: at most a grey level from PIL's at each operation.
"""

import copy
import random
from collections.abc import Callable
from contextvars import ContextVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stts_slowfast.pyslowfast.config_access import value
from stts_slowfast.pyslowfast.lazy_clip import LazyClip
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.video.affine import Box
from stts_slowfast.video.image_ops import GEOMETRIC, Operation, augment

# Which of our operations stands for a function of SlowFast's `rand_augment.py`.
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

# What SlowFast has asked of a clip before and after: bytes as floats in 0..1.
_TO_FLOATS = ((Tensor.div_, 255.0),)

# Whether the training item that is read now is of a config that asks for it.
_asked: ContextVar[bool] = ContextVar("stts_fast_augment", default=False)


def wrap_augment(kinetics) -> None:
    """What Kinetics and SSv2 do to frames in training (``slowfast/datasets``)."""
    from slowfast.datasets import rand_augment, utils

    wrap(rand_augment.AugmentOp, "__call__", _operate)
    wrap(kinetics.Kinetics, "__getitem__", _get_item)
    wrap(kinetics.decoder, "decode", _decode)
    wrap(kinetics.Kinetics, "_frame_to_list_img", lambda stock, self, x: _to_images(stock, x, self))
    wrap(kinetics.Kinetics, "_list_img_to_frames", lambda stock, self, x: _to_clip(stock, x, self))
    wrap(utils, "aug_frame", _augment_frames)
    wrap(utils, "_frame_to_list_img", _to_images)
    wrap(utils, "_list_img_to_frames", _to_clip)


def is_asked(cfg) -> bool:
    """Whether a config asks for it."""
    return bool(value(cfg, "STTS.FAST_AUGMENT", False))


class Images:
    """A clip in place of SlowFast's list of PIL's images; operations on it wait.

    Attributes:
        frames: (T, H, W, 3) uint8.
        operations: what has been asked of them, in order.
    """

    def __init__(self, frames: np.ndarray, operations: tuple[Operation, ...] = ()):
        self.frames, self.operations = frames, operations
        self._box, self._part = None, None

    def part(self, box: Box) -> np.ndarray:
        """The part ``box`` of the augmented frames; the last one is kept."""
        if box != self._box:
            self._box, self._part = box, augment(self.frames, self.operations, box)
        return self._part


class Frame:
    """One of `Images`, as `LazyClip` handles an array (H, W, 3)."""

    def __init__(self, images: Images, number: int):
        self.images, self.number = images, number

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.frames.shape[1:]

    def __getitem__(self, square: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (
            each.indices(size) for each, size in zip(square, self.shape)
        )
        return self.images.part((top, left, bottom - top, right - left))[self.number]


def _get_item(getitem, dataset, index):
    token = _asked.set(dataset.mode == "train" and is_asked(dataset.cfg))
    try:
        return getitem(dataset, index)
    finally:
        _asked.reset(token)


def _augment_frames(aug_frame, cfg, *args, **kwargs):
    token = _asked.set(is_asked(cfg))
    try:
        return aug_frame(cfg, *args, **kwargs)
    finally:
        _asked.reset(token)


def _decode(decode, *args, **kwargs):
    frames, *others = decode(*args, **kwargs)
    if _asked.get() and frames is not None:
        # Its copies, and what makes floats of it, would be of all pixels.
        frames = [LazyClip.of(list(clip.numpy())) if _is_plain(clip) else clip for clip in frames]
    return frames, *others


def _is_plain(clip) -> bool:
    return type(clip) is Tensor and clip.dtype == torch.uint8 and clip.dim() == 4


def _to_images(stock, frames: Tensor, dataset=None):
    """Frames (T, 3, H, W), bytes or floats in 0..1, as `Images`."""
    if not _asked.get():
        return stock(frames) if dataset is None else stock(dataset, frames)
    if isinstance(frames, LazyClip) and frames.steps == _TO_FLOATS:
        return Images(np.stack(frames.images))
    pixels = frames.mul(255).byte() if frames.is_floating_point() else frames
    return Images(np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()))


def _operate(call, operation, images):
    if not isinstance(images, Images):
        return call(operation, images)
    drawing = copy.copy(operation)  # SlowFast's, which draws and then calls this
    drawing.aug_fn = _noting(NAMES[operation.aug_fn.__name__])
    return call(drawing, images)


def _noting(name: str) -> Callable[..., Images]:
    """In place of a function on one image: ``name`` is noted for all."""

    def note(images: Images, argument: float = 0.0, *, resample, **_) -> Images:
        bicubic: list[bool] | bool = False
        if name in GEOMETRIC:
            several = isinstance(resample, (list, tuple))  # then one is drawn for each frame
            drawn = [random.choice(resample) if several else resample for _ in images.frames]
            if not {*drawn} <= {Image.BILINEAR, Image.BICUBIC}:
                raise ValueError(
                    "STTS.FAST_AUGMENT is True, but AUG.INTERPOLATION is none of bicubic, bilinear "
                    "and random: set one of these"
                )
            bicubic = [each == Image.BICUBIC for each in drawn]
            bicubic = bicubic[0] if len({*bicubic}) == 1 else bicubic
        height, width = images.frames.shape[1:3]
        argument *= {"TranslateX": width, "TranslateY": height}.get(name, 1)
        operation = Operation(name, argument, bicubic)
        return Images(images.frames, (*images.operations, operation))

    return note


def _to_clip(stock, images, dataset=None) -> Tensor:
    """`Images` as floats (T, 3, H, W) in 0..1, which wait for their crop."""
    if not isinstance(images, Images):
        return stock(images) if dataset is None else stock(dataset, images)
    frames = [Frame(images, number) for number in range(len(images.frames))]
    return LazyClip.of(frames, _TO_FLOATS, (0, 3, 1, 2), floating=True)
