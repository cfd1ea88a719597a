"""What hosts share whose blocks take tokens alone: the model's call says their grid."""

import torch
from torch import Tensor, cat, nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import Host, Tokens


class TokenSequenceHost(Host):
    """Blocks that take tokens first, and return them alone or first.

    Attributes:
        sizes: ``(T, H, W)`` of the grid of the clips that the model was made for.
        patch: ``(T, H, W)`` of a patch in frames and pixels, if :meth:`call_grid` is to read
            clips ``(B, T, channels, H, W)`` with it.
        prefix: how many cls tokens ``n`` lie in front.
        by_frame: False where tokens are those of a clip, ``(B, n + T*H*W, C)``; True where each
            frame is an entry of the batch, ``(B*T, n + H*W, C)``.
    """

    sizes: tuple[int, int, int]
    patch: tuple[int, int, int] | None = None
    prefix = 0
    by_frame = False

    def call_grid(self, model: nn.Module, args: tuple, kwargs: dict) -> Grid | None:
        if self.patch is None:
            return self.default_grid()
        _, frames, _, *image = first_tensor(args, kwargs).shape
        return Grid(size // side for size, side in zip((frames, *image), self.patch))

    def default_grid(self) -> Grid | None:
        return Grid(self.sizes)

    def read(self, args: tuple, kwargs: dict, thw: Grid | None) -> Tokens:
        x = args[0]
        if thw is None:
            raise ValueError(
                "a block was called outside of a call of its model, so the grid of its tokens is "
                "not known: call the model"
            )
        frames, height, width = thw
        clips, count = (frames, height * width) if self.by_frame else (1, frames * height * width)
        if x.dim() != 3 or x.shape[1] != self.prefix + count or x.shape[0] % clips:
            raise ValueError(
                f"tokens of shape {tuple(x.shape)} do not make a grid of {frames}x{height}x{width} "
                f"with {self.prefix} cls tokens for each {'frame' if self.by_frame else 'clip'}: "
                "selection needs clips of the frames and size that the model is made for, whole"
            )
        if self.by_frame:
            x = x.unflatten(0, (-1, frames))
            cls = x[:, :, : self.prefix] if self.prefix else None
            return Tokens(x[:, :, self.prefix :].unflatten(2, (height, width)), thw, frames=cls)
        cls = x[:, : self.prefix] if self.prefix else None
        return Tokens(self.unfold(x[:, self.prefix :], thw), thw, clip=cls)

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        grid, _, clip, frames = tokens
        if self.by_frame:
            x = grid.flatten(2, 3)
            x = (x if frames is None else cat([frames, x], dim=2)).flatten(0, 1)
        else:
            x = self.fold(grid)
            x = x if clip is None else cat([clip, x], dim=1)
        return (_in_order_of(args[0], x), *args[1:]), kwargs

    def left(self, thw: Grid, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which entries of the batch, and which tokens of each, are left of all that entered.

        Args:
            thw: the grid of the tokens ``x`` of a block's call.

        Returns:
            LongTensors ``(b,)`` and ``(b, n)``, cls tokens included: of clips, or ``by_frame`` of
            frames.
        """
        frames, height, width = thw
        clips = len(x) // frames if self.by_frame else len(x)
        places = thw.positions(clips, x.device)
        entries = torch.arange(clips, device=x.device)
        if self.by_frame:
            all_frames, rows, columns = thw.whole
            places = places.view(-1, height * width)
            first = places[:, 0].div(rows * columns, rounding_mode="floor")
            entries = entries.repeat_interleave(frames) * all_frames + first
            places = places.remainder(rows * columns)
        prefix = torch.arange(self.prefix, device=x.device).expand(len(places), -1)
        return entries, cat([prefix, places + self.prefix], dim=1)

    def unfold(self, x: Tensor, thw: Grid) -> Tensor:
        """Tokens ``(B, T*H*W, C)`` in the host's order as ``(B, T, H, W, C)``."""
        return x.unflatten(1, tuple(thw))

    def fold(self, grid: Tensor) -> Tensor:
        """A grid ``(B, T, H, W, C)`` as tokens ``(B, T*H*W, C)`` in the host's order."""
        return grid.flatten(1, 3)


def _in_order_of(whole: Tensor, x: Tensor) -> Tensor:
    """``x`` in the memory order of ``whole``, which residuals keep to the head.

    Tokens of a convolution have their channels outermost in memory. A mean adds them in another
    order then, so that keeping all would change the last bits.
    """
    if whole.stride(1) == 1 and whole.stride(2) > 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x


def pair(size) -> tuple[int, int]:
    """A side, or two, as height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def patches(frames: int, image, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid ``(T, H, W)`` that patches ``(T, H, W)`` make of a clip."""
    (height, width), (tubelet, rows, columns) = pair(image), patch
    return frames // tubelet, height // rows, width // columns


def inner(model: nn.Module) -> nn.Module:
    """A model of transformers without its head."""
    return getattr(model, model.base_model_prefix, model)
