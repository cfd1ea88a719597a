"""V-JEPA 2 in its authors' code: blocks with rotary positions by ``mask`` and sizes of the grid.

Blocks take ``mask`` ``(B, N)``, the place of each token in a clip of ``T`` times ``H_patches``
times ``W_patches``; without it they count tokens. Behind a selection every block is given it.
"""

from collections.abc import Sequence
from inspect import signature

from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, patches

TAKES = {"mask", "H_patches", "W_patches"}


@HOSTS.register()
class VJEPA2Official(TokenSequenceHost):
    """The encoder, known by what its blocks take; clips ``(B, 3, T, H, W)``."""

    def __init__(self, model: nn.Module):
        self.patch = (model.tubelet_size, model.patch_size, model.patch_size)
        image = (model.img_height, model.img_width)
        self.sizes = patches(model.num_frames, image, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or not hasattr(model, "tubelet_size"):
            return ()
        takes = [signature(type(block).forward).parameters for block in blocks]
        return blocks if all(set(names) >= TAKES for names in takes) else ()

    def entry(self, model: nn.Module) -> nn.Module:
        return model.patch_embed

    def call_grid(self, model: nn.Module, args: tuple, kwargs: dict) -> Grid:
        _, _, *sizes = first_tensor(args, kwargs).shape
        if len(sizes) == 2:  # of images
            return Grid((1, *(size // side for size, side in zip(sizes, self.patch[1:]))))
        return Grid(size // side for size, side in zip(sizes, self.patch))

    def adapt_call(self, block: nn.Module, thw: Grid, args: tuple, kwargs: dict):
        if not thw.is_selected:
            return args, kwargs
        x, *rest = args
        places = thw.positions(len(x), x.device)
        if rest:  # activation checkpointing gives it by position
            return (x, places, *rest[1:]), kwargs
        return args, {**kwargs, "mask": places}
