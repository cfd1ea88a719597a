"""Hosts whose blocks take tokens ``(B, N, C)`` without their grid."""

from typing import Any

import torch
from torch import Tensor, cat

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, ForeignModule, Host, Kwargs, Tokens


class TokenSequenceHost(Host):
    """Blocks that take tokens as their first argument, and return only them, or them first.

    Attributes:
        sizes: ``(T, H, W)`` of the grid of the clips that the model was made for.
        patch: ``(T, H, W)`` of a patch in frames and pixels, for :meth:`call_grid` of clips
            ``(B, T, channels, H, W)``; None for models that take only clips of ``sizes``.
        prefix: number of cls tokens ``n`` before the others.
        by_frame: False if tokens are those of a clip, ``(B, n + T*H*W, C)``; True if each frame is
            an entry of the batch, ``(B*T, n + H*W, C)``.
    """

    sizes: tuple[int, int, int]
    patch: tuple[int, int, int] | None = None
    prefix = 0
    by_frame = False

    def call_grid(self, model: ForeignModule, args: Args, kwargs: Kwargs) -> Grid | None:
        if self.patch is None:
            return self.default_grid()
        _, frames, _, *image = first_tensor(args, kwargs).shape
        return Grid(size // side for size, side in zip((frames, *image), self.patch))

    def default_grid(self) -> Grid | None:
        return Grid(self.sizes)

    def unpack(self, args: Args, kwargs: Kwargs, thw: Grid | None) -> Tokens:
        x = args[0]
        if thw is None:
            raise ValueError(
                "a block was called outside of a call of its model, so the grid of its tokens is "
                "not known: call the model"
            )
        frames, height, width = thw
        entries, count = (frames, height * width) if self.by_frame else (1, frames * height * width)
        if x.dim() != 3 or x.shape[1] != self.prefix + count or x.shape[0] % entries:
            raise ValueError(
                f"tokens of shape {tuple(x.shape)} do not make a grid of {frames}x{height}x{width} "
                f"with {self.prefix} cls tokens for each {'frame' if self.by_frame else 'clip'}: "
                "selection needs whole clips of the frames and size that the model is made for"
            )
        if self.by_frame:
            x = x.unflatten(0, (-1, frames))
            cls = x[:, :, : self.prefix] if self.prefix else None
            grid = x[:, :, self.prefix :].unflatten(2, (height, width))
            return Tokens(grid, thw, frame_cls=cls)
        cls = x[:, : self.prefix] if self.prefix else None
        return Tokens(self.unflatten_grid(x[:, self.prefix :], thw), thw, cls=cls)

    def pack(self, tokens: Tokens, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if self.by_frame:
            x, cls = tokens.grid.flatten(2, 3), tokens.frame_cls
            x = (x if cls is None else cat([cls, x], dim=2)).flatten(0, 1)
        else:
            x, cls = self.flatten_grid(tokens.grid), tokens.cls
            x = x if cls is None else cat([cls, x], dim=1)
        return (_with_memory_order_of(args[0], x), *args[1:]), kwargs

    def kept_indices(self, thw: Grid, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept entries of the batch, and of the kept tokens of each.

        Args:
            thw: the grid of the tokens ``x`` of a block's call.

        Returns:
            LongTensors ``(b,)`` and ``(b, n)``, cls tokens included: of clips, or, ``by_frame``, of
            frames.
        """
        frames, height, width = thw
        clips = len(x) // frames if self.by_frame else len(x)
        tokens = thw.positions(clips, x.device)
        entries = torch.arange(clips, device=x.device)
        if self.by_frame:
            assert thw.whole is not None  # else positions has raised
            all_frames, rows, columns = thw.whole
            tokens = tokens.view(-1, height * width)
            first = tokens[:, 0].div(rows * columns, rounding_mode="floor")
            entries = entries.repeat_interleave(frames) * all_frames + first
            tokens = tokens.remainder(rows * columns)
        prefix = torch.arange(self.prefix, device=x.device).expand(len(tokens), -1)
        return entries, cat([prefix, tokens + self.prefix], dim=1)

    def unflatten_grid(self, x: Tensor, thw: Grid) -> Tensor:
        """Tokens ``(B, T*H*W, C)`` in the host's order as ``(B, T, H, W, C)``."""
        return x.unflatten(1, tuple(thw))

    def flatten_grid(self, grid: Tensor) -> Tensor:
        """A grid ``(B, T, H, W, C)`` as tokens ``(B, T*H*W, C)`` in the host's order."""
        return grid.flatten(1, 3)


def _with_memory_order_of(whole: Tensor, x: Tensor) -> Tensor:
    """``x`` in the memory order of ``whole``, which residual connections keep up to the head.

    Tokens of a convolution have their channels outermost in memory. A mean sums them in another
    order then, so that keeping all tokens would change the last bits.
    """
    if whole.stride(1) == 1 and whole.stride(2) > 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def pair(size: Any) -> tuple[int, int]:
    """One side or two, as height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def patches(frames: int, image: Any, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid ``(T, H, W)`` that patches ``(T, H, W)`` make of a clip."""
    (height, width), (tubelet, rows, columns) = pair(image), patch
    return frames // tubelet, height // rows, width // columns
