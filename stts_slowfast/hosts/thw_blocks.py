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

import inspect
from collections.abc import Sequence

from torch import cat, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, Host, Tokens


class ThwBlockHost(Host):
    """``model.blocks``, each called with tokens and their ``thw``.

    Or ``model.model.blocks``, of a model that only wraps another, as SlowFast's PTVMViT.
    """

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        holder = model if hasattr(model, "blocks") else getattr(model, "model", None)
        blocks = getattr(holder, "blocks", None)
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
            return ()
        for block in blocks:
            if not _takes_grid(block):
                raise ValueError(
                    f"{type(holder).__name__} has blocks, but {type(block).__name__} takes no grid "
                    f"(forward{inspect.signature(type(block).forward)}): selection must know where "
                    "tokens lie, so it takes models whose blocks are called as "
                    "x, thw = block(x, thw), and for others a host of their own "
                    "(projects/stts/extending.md)"
                )
        return blocks

    def incoming_grid(self, args: tuple, kwargs: dict, thw: Grid | None) -> Grid | None:
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

    def set_block_grid(self, output, thw: Grid):
        if not isinstance(output, (tuple, list)) or len(output) < 2:
            return output  # tokens alone, as from a block that was called without thw
        x, sizes, *rest = output
        return (x, thw.pooled(sizes), *rest)


def _takes_grid(block: nn.Module) -> bool:
    """Whether a block can be called as ``block(x, thw)``; one that is wrapped may take anything."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    if any(parameter.name.startswith("thw") for parameter in parameters):
        return True
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


def _thw(args: tuple, kwargs: dict):
    return args[1] if len(args) > 1 else kwargs.get(_keyword(kwargs))


def _keyword(kwargs: dict) -> str:
    """What a block calls its grid: SlowFast says ``thw_shape``."""
    return "thw" if "thw" in kwargs else "thw_shape"


HOSTS._do_register("BlocksWithGrid", ThwBlockHost)  # its name before 0.2
