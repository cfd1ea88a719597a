"""VideoMAE of transformers: no cls token, the grid is the config's, each layer takes tokens alone.

Its head reads the mean of the tokens that are left, or (``use_mean_pooling`` False) the first one.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.hosts import HOSTS, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, inner, pair, patches


@HOSTS.register()
class VideoMAE(TokenSequenceHost):
    """``VideoMAEModel`` and ``VideoMAEForVideoClassification``."""

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = (config.tubelet_size, *pair(config.patch_size))
        self.sizes = patches(config.num_frames, config.image_size, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        names = ("VideoMAEModel", "VideoMAEForVideoClassification")
        return inner(model).encoder.layer if is_instance_of(model, "transformers", *names) else ()

    def entry(self, model: nn.Module) -> nn.Module:
        return inner(model).embeddings
