"""What hosts share whose blocks take tokens alone: their grid is a mark on the tensor."""

from torch import Tensor, cat, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import Host, Tokens, remember, remembered


class TokensAlone(Host):
    """Blocks that take tokens first, and return them alone or first.

    Attributes:
        sizes: ``(T, H, W)`` of the grid that arrives where nothing was selected before.
        prefix: how many cls tokens ``n`` lie in front.
        by_frame: False where tokens are those of a clip, ``(B, n + T*H*W, C)``; True where each
            frame is an entry of the batch, ``(B*T, n + H*W, C)``.
    """

    sizes: tuple[int, int, int]
    prefix = 0
    by_frame = False

    def read(self, args: tuple, kwargs: dict) -> Tokens:
        x = args[0]
        thw = self.grid(x)
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
        grid, thw, clip, frames = tokens
        if self.by_frame:
            x = grid.flatten(2, 3)
            x = (x if frames is None else cat([frames, x], dim=2)).flatten(0, 1)
        else:
            x = self.fold(grid)
            x = x if clip is None else cat([clip, x], dim=1)
        return (remember(x, thw), *args[1:]), kwargs

    def arrived(self, args: tuple, kwargs: dict) -> Grid | None:
        return remembered(args[0])

    def hand_on(self, output, thw: Grid):
        remember(output if isinstance(output, Tensor) else output[0], thw)
        return output

    def grid(self, x: Tensor) -> Grid:
        """The grid of tokens ``x``: the one they are marked with, else the model's."""
        thw = remembered(x)
        return Grid(self.sizes) if thw is None else thw

    def unfold(self, x: Tensor, thw: Grid) -> Tensor:
        """Tokens ``(B, T*H*W, C)`` in the host's order as ``(B, T, H, W, C)``."""
        return x.unflatten(1, tuple(thw))

    def fold(self, grid: Tensor) -> Tensor:
        """A grid ``(B, T, H, W, C)`` as tokens ``(B, T*H*W, C)`` in the host's order."""
        return grid.flatten(1, 3)


def pair(size) -> tuple[int, int]:
    """A side, or two, as height and width."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def patches(frames: int, image, tubelet: int, patch) -> tuple[int, int, int]:
    """The grid ``(T, H, W)`` that patches of ``tubelet`` frames make of a clip."""
    (height, width), (rows, columns) = pair(image), pair(patch)
    return frames // tubelet, height // rows, width // columns


def inner(model: nn.Module) -> nn.Module:
    """A model of transformers without its head."""
    return getattr(model, model.base_model_prefix, model)
