"""Hosts whose blocks are called as ``x, thw = block(x, thw)``: most video transformers.

torchvision's, SlowFast's and pytorchvideo's MViT, SlowFast's ViT, our ViT and TimeSformer. Three
layouts, distinguished by the number of tokens that arrive with a grid ``(T, H, W)``:

====================  =====================  ============================================
tokens                shape                  models
====================  =====================  ============================================
plain                 ``(B, T*H*W, C)``      ViT with mean pooling
one cls token         ``(B, 1+T*H*W, C)``    MViT, ViT, TimeSformer (divided, joint)
a cls token a frame   ``(B, T*(1+H*W), C)``  TimeSformer (space only)
====================  =====================  ============================================
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import cat, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.block_trial import one_of_each, sees_frames_alone
from stts_slowfast.hosts.host import Args, ForeignModule, Host, Kwargs, Tokens


class ThwBlockHost(Host):
    """``model.blocks``, each called with tokens and their ``thw``.

    Or ``model.model.blocks``, of a model that only wraps another, such as SlowFast's PTVMViT.
    """

    @staticmethod
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        holder = model if hasattr(model, "blocks") else getattr(model, "model", None)
        blocks = getattr(holder, "blocks", None)
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
            return ()
        for block in blocks:
            if not _takes_grid(block):
                raise ValueError(
                    f"{type(holder).__name__} has blocks, but {type(block).__name__} takes no grid "
                    f"(forward{inspect.signature(type(block).forward)}), and selection needs the "
                    "positions of tokens: blocks must be called as x, thw = block(x, thw), or the "
                    "model needs a host of its own (projects/stts/extending.md)"
                )
        return list(blocks)

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        """Found by trial, with random weights: blocks may be of any library."""
        found = {sees_frames_alone(b, self.channels(b)) for b in one_of_each(blocks)}
        if len(found) > 1:
            raise ValueError("only some of its blocks see each frame alone")
        return found.pop()

    def incoming_grid(self, args: Args, kwargs: Kwargs, thw: Grid | None) -> Grid | None:
        sizes = _thw(args, kwargs)
        return sizes if sizes is None or isinstance(sizes, Grid) else Grid(sizes)

    def unpack(self, args: Args, kwargs: Kwargs, thw: Grid | None) -> Tokens:
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
            return Tokens(grid, thw, cls=x[:, :extra] if extra else None)
        x = x.unflatten(1, (frames, 1 + height * width))
        return Tokens(x[:, :, 1:].unflatten(2, (height, width)), thw, frame_cls=x[:, :, :1])

    def pack(self, tokens: Tokens, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if tokens.frame_cls is not None:
            x = cat([tokens.frame_cls, tokens.grid.flatten(2, 3)], dim=2).flatten(1, 2)
        else:
            x = tokens.grid.flatten(1, 3)
            x = x if tokens.cls is None else cat([tokens.cls, x], dim=1)
        if len(args) > 1:
            return (x, tokens.thw, *args[2:]), kwargs
        return (x,), {**kwargs, _keyword(kwargs): tokens.thw}

    def set_block_grid(self, output: Any, thw: Grid) -> Any:
        if not isinstance(output, (tuple, list)) or len(output) < 2:
            return output  # only tokens, of a block that was called without thw
        x, sizes, *rest = output
        return (x, thw.pooled(sizes), *rest)


def _takes_grid(block: nn.Module) -> bool:
    """Whether a block can be called as ``block(x, thw)``; a wrapper may take any arguments."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    if any(parameter.name.startswith("thw") for parameter in parameters):
        return True
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


def _thw(args: Args, kwargs: Kwargs) -> Any:
    return args[1] if len(args) > 1 else kwargs.get(_keyword(kwargs))


def _keyword(kwargs: Kwargs) -> str:
    """The name of a block's argument for its grid; in SlowFast ``thw_shape``."""
    return "thw" if "thw" in kwargs else "thw_shape"
