"""Hosts whose blocks are called as ``x, thw = block(x, thw)``: most video transformers.

torchvision's, SlowFast's and pytorchvideo's MViT, SlowFast's ViT, our ViT and TimeSformer. Three
layouts, told apart by the number of tokens that arrive with a grid ``(T, H, W)``:

====================  =====================  ============================================
tokens                shape                  who
====================  =====================  ============================================
plain                 ``(B, T*H*W, C)``      ViT with mean pooling
one cls token         ``(B, 1+T*H*W, C)``    MViT, ViT, TimeSformer (divided, joint)
a cls token a frame   ``(B, T*(1+H*W), C)``  TimeSformer (space only)
====================  =====================  ============================================
"""

from collections.abc import Sequence

from torch import cat, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, Host, Tokens


@HOSTS.register()
class BlocksWithGrid(Host):
    """``model.blocks``, each called with tokens and their ``thw``.

    Or ``model.model.blocks``, of a model that only wraps another, as SlowFast's PTVMViT.
    """

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        holder = model if hasattr(model, "blocks") else getattr(model, "model", None)
        blocks = getattr(holder, "blocks", None)
        return blocks if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else ()

    def arrived(self, args: tuple, kwargs: dict, thw: Grid | None) -> Grid | None:
        sizes = _thw(args, kwargs)
        return sizes if sizes is None or isinstance(sizes, Grid) else Grid(sizes)

    def read(self, args: tuple, kwargs: dict, thw: Grid | None) -> Tokens:
        x = args[0]
        if thw is None:
            raise ValueError("a block was called without thw: the grid of its tokens is not known")
        frames, height, width = thw
        extra = x.shape[1] - frames * height * width
        if x.dim() != 3 or extra not in (0, 1, frames):
            raise ValueError(
                f"tokens of shape {tuple(x.shape)} do not make a grid of "
                f"{frames}x{height}x{width}, with or without cls token"
            )
        if extra <= 1:
            grid = x[:, extra:].unflatten(1, (frames, height, width))
            return Tokens(grid, thw, clip=x[:, :extra] if extra else None)
        x = x.unflatten(1, (frames, 1 + height * width))
        return Tokens(x[:, :, 1:].unflatten(2, (height, width)), thw, frames=x[:, :, :1])

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        grid, thw, clip, frames = tokens
        if frames is not None:
            x = cat([frames, grid.flatten(2, 3)], dim=2).flatten(1, 2)
        else:
            x = grid.flatten(1, 3)
            x = x if clip is None else cat([clip, x], dim=1)
        if len(args) > 1:
            return (x, thw, *args[2:]), kwargs
        return (x,), {**kwargs, _keyword(kwargs): thw}

    def hand_on(self, output, thw: Grid):
        if not isinstance(output, (tuple, list)) or len(output) < 2:
            return output  # tokens alone, as from a block that was called without thw
        x, sizes, *rest = output
        return (x, thw.pooled(sizes), *rest)


def _thw(args: tuple, kwargs: dict):
    return args[1] if len(args) > 1 else kwargs.get(_keyword(kwargs))


def _keyword(kwargs: dict) -> str:
    """What a block calls its grid: SlowFast says ``thw_shape``."""
    return "thw" if "thw" in kwargs else "thw_shape"
