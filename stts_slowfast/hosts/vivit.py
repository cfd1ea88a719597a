"""ViViT of transformers: a cls token, then the grid of the config's tubelets."""

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import masks
from stts_slowfast.hosts.hf_video import HFVideoHost
from stts_slowfast.hosts.host import Args, Kwargs


class ViViT(HFVideoHost):
    """``VivitModel`` and ``VivitForVideoClassification``."""

    classes = ("VivitPreTrainedModel",)
    layers = "layers"
    prefix = 1

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        x, mask, *rest = args
        if thw.is_selected and mask is not None:
            args = (x, masks.cut(mask, *self.kept_indices(thw, x), padding=True), *rest)
        return args, kwargs
