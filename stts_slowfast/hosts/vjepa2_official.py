"""V-JEPA 2 in its authors' code: blocks with rotary positions by ``mask`` and sizes of the grid.

Blocks take ``mask`` ``(B, N)``, the position of each token in a clip of ``T`` times ``H_patches``
times ``W_patches``; without it they use the order of tokens. After a selection every block gets it.
"""

from collections.abc import Sequence
from inspect import signature

from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, patches

TAKES = {"mask", "H_patches", "W_patches"}


class VJEPA2Official(TokenSequenceHost):
    """The encoder, recognised by the arguments of its blocks; clips ``(B, 3, T, H, W)``."""

    def __init__(self, model: ForeignModule):
        patch = (model.tubelet_size, model.patch_size, model.patch_size)
        image = (model.img_height, model.img_width)
        self.patch, self.sizes = patch, patches(model.num_frames, image, patch)

    @staticmethod
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        blocks = getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or not hasattr(model, "tubelet_size"):
            return ()
        takes = [signature(type(block).forward).parameters for block in blocks]
        return list(blocks) if all(set(names) >= TAKES for names in takes) else ()

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return self.by_frame

    def entry(self, model: ForeignModule) -> nn.Module:
        embeddings: nn.Module = model.patch_embed
        return embeddings

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Grid:
        _, _, *sizes = first_tensor(args, kwargs).shape
        patch = self.patch or ()
        if len(sizes) == 2:  # of images
            return Grid((1, *(size // side for size, side in zip(sizes, patch[1:]))))
        return Grid(size // side for size, side in zip(sizes, patch))

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        if not thw.is_selected:
            return args, kwargs
        x, *rest = args
        positions = thw.positions(len(x), x.device)
        if rest:  # with activation checkpointing it is a positional argument
            return (x, positions, *rest[1:]), kwargs
        return args, {**kwargs, "mask": positions}
