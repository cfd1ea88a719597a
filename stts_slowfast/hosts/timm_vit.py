"""timm's ``VisionTransformer`` on video: frame by frame, or with patches of several frames.

Frame by frame the batch holds the frames of all clips, ``(B*T, 3, H, W)``, and how many make a clip
stands in ``model.num_frames``, which the user sets (without it each image is a clip of one frame).
What comes out then has an entry for each frame that is left. With tubelets the model's
``embed_layer`` takes clips, and has a ``grid_size`` of three numbers.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.hosts import HOSTS, is_a
from stts_slowfast.hosts.tokens_alone import TokensAlone


@HOSTS.register()
class TimmViT(TokensAlone):
    """``VisionTransformer`` and what comes from it, with any number of cls and register tokens."""

    def __init__(self, model: nn.Module):
        size = model.patch_embed.grid_size
        if size is None:
            raise ValueError(
                "the patch_embed of this VisionTransformer has no grid_size: give it an img_size"
            )
        self.by_frame = len(size) == 2
        frames = getattr(model, "num_frames", 1)
        self.sizes = (frames, *size) if self.by_frame else tuple(size)
        self.prefix = model.num_prefix_tokens

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        return model.blocks if is_a(model, "timm", "VisionTransformer") else ()
