"""ViViT of transformers: a cls token, then the grid of the config's tubelets, in ``layers``."""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, is_instance_of, masks
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, inner, patches


@HOSTS.register()
class ViViT(TokenSequenceHost):
    """``VivitModel`` and ``VivitForVideoClassification``."""

    prefix = 1

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = tuple(config.tubelet_size)
        self.sizes = patches(config.num_frames, config.image_size, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        return (
            inner(model).layers
            if is_instance_of(model, "transformers", "VivitPreTrainedModel")
            else ()
        )

    def entry(self, model: nn.Module) -> nn.Module:
        return inner(model).embeddings

    def adapt_call(self, block: nn.Module, thw: Grid, args: tuple, kwargs: dict):
        x, mask, *rest = args
        if thw.is_selected and mask is not None:
            args = (x, masks.cut(mask, *self.left(thw, x), padding=True), *rest)
        return args, kwargs
