"""A clip that delays SlowFast's pixelwise arithmetic until the clip is cropped.

SlowFast converts whole frames to float and normalises them, then crops a square. Here the same
operations run on the square only, in the same order and with the same bits.
"""

import numpy as np
import torch
from torch import Tensor

_IN_PLACE = {
    Tensor.div: Tensor.div_,
    Tensor.__truediv__: Tensor.div_,
    Tensor.sub: Tensor.sub_,
    Tensor.__sub__: Tensor.sub_,
}
_METADATA = {Tensor.size, Tensor.dim, Tensor.__len__, Tensor.shape.__get__, Tensor.dtype.__get__}


class LazyClip(Tensor):
    """Frames (T, H, W, 3) uint8 and the operations recorded since.

    Recorded are conversion to float, division and subtraction by a number or one a channel,
    selecting frames, and permuting axes. Cropping (3, T, H, W), and any other operation, returns a
    plain tensor.
    """

    images: list[np.ndarray | None]  # None: a frame that was not decoded and will not be used
    steps: tuple  # of (in-place function, operand)
    order: tuple[int, ...]  # of the axes

    @classmethod
    def create(cls, images, steps=(), order=(0, 1, 2, 3), floating=False) -> "LazyClip":
        sizes = len(images), *next(each.shape for each in images if each is not None)
        shape = [sizes[axis] for axis in order]
        dtype = torch.float32 if floating else torch.uint8
        clip = torch.empty((), dtype=dtype).expand(shape).as_subclass(cls)  # one element
        clip.images, clip.steps, clip.order = images, steps, order
        return clip

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in _METADATA:
            return super().__torch_function__(function, types, args, kwargs)
        self, *rest = args
        if isinstance(self, cls) and not kwargs:
            result = self._record_op(function, rest)
            if result is not None:
                return result
        args = [each.materialize() if isinstance(each, cls) else each for each in args]
        return function(*args, **kwargs or {})

    def _record_op(self, function, rest: list):
        images, steps, order = self.images, self.steps, self.order
        floating = self.dtype == torch.float32
        if function in (Tensor.__eq__, Tensor.eq) and rest == [None]:
            return False
        if function is Tensor.clone and not rest:
            return self.create(images, steps, order, floating)
        if function is Tensor.float and not rest:
            return self.create(images, steps, order, True)
        if function in _IN_PLACE and floating and self._is_per_channel(rest[0]):
            return self.create(images, (*steps, (_IN_PLACE[function], rest[0])), order, True)
        if function is Tensor.permute and len(rest) == 4:
            return self.create(images, steps, tuple(order[axis] for axis in rest), floating)
        if function is torch.index_select and order[0] == rest[0] == 0:
            return self.create([images[index] for index in rest[1]], steps, order, floating)
        if function is Tensor.__getitem__ and order == (3, 0, 1, 2) and type(rest[0]) is tuple:
            channels, frames, *square = rest[0]
            if channels == frames == slice(None) and list(map(type, square)) == [slice] * 2:
                return self.materialize(*square)
        return None

    def _is_per_channel(self, operand) -> bool:
        """Whether it is one number, or one a channel while channels are last."""
        if isinstance(operand, Tensor):
            return operand.shape == (3,) and self.order[-1] == 3
        return isinstance(operand, int | float)

    def materialize(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """The tensor with all recorded operations applied, or a crop of each frame."""
        like = next(each for each in self.images if each is not None)[rows, columns]
        pixels = torch.zeros((len(self.images), *like.shape), dtype=self.dtype)
        width = like.shape[1]
        steps = [  # on whole rows, in which channels alternate
            (step, by.repeat(width) if isinstance(by, Tensor) else by) for step, by in self.steps
        ]
        for frame, image in zip(pixels, self.images):
            if image is not None:
                frame.copy_(torch.from_numpy(image[rows, columns]))
                frame = frame.view(len(frame), -1)
                for step, by in steps:
                    step(frame, by)
        return pixels.permute(self.order)
