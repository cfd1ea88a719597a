"""timm's ``Eva`` on video, frame by frame: EVA, EVA-02, PE, DINOv3 and ViTs with rotary positions.

As ``timm_vit``, but the model makes rotary positions of the whole image once for all blocks: each
block gets those of the kept tokens.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs, is_instance_of
from stts_slowfast.hosts.timm_vit import TimmViT, refuse_patch_drop


class TimmEva(TimmViT):
    """``Eva``, with rotary positions ``(N, D)``, or ``(heads, N, D)`` of each block, or without."""

    @staticmethod
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        if not is_instance_of(model, "timm", "Eva"):
            return ()
        refuse_patch_drop(model)
        return list(model.blocks)

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        args, kwargs = super().adapt_call(block, thw, args, kwargs)
        rotary = kwargs.get("rope")
        if thw.is_selected and rotary is not None:
            _, indices = self.kept_indices(thw, args[0])
            rotary = rotary[..., indices[:, self.prefix :] - self.prefix, :]
            # (b, 1, n, D), or (heads, b, n, D) -> (b, heads, n, D)
            rotary = rotary[:, None] if rotary.dim() == 3 else rotary.transpose(0, 1)
            kwargs = {**kwargs, "rope": rotary}
        return args, kwargs
