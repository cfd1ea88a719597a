"""timm's ``VisionTransformer`` on video: frame by frame, or with patches of several frames.

Frame by frame the batch has the frames of all clips, ``(B*T, 3, H, W)``; the number of frames in a
clip is read in every call from ``model.num_frames``, which the user sets (without it each image is
a clip of one frame). The output has an entry for each kept frame. With tubelets the model's
``embed_layer`` takes clips, and has a ``grid_size`` of three numbers.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import masks
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs, is_instance_of
from stts_slowfast.hosts.timm_feature_maps import Intermediates
from stts_slowfast.hosts.token_sequence import TokenSequenceHost

# Transformers of timm that cannot be served, and why.
REFUSED = {
    "Beit": "its relative position bias is made for the whole grid",
    "Cait": "in its last blocks only the cls token attends, after blocks without one",
    "Hiera": "it pools by the order of its mask units, which a selection changes",
    "NaFlexVit": "it packs images of several sizes",
    "VisionTransformerRelPos": "its relative positions are made for the whole grid",
    "VisionTransformerSAM": "its blocks attend in windows of a whole grid",
    "Xcit": "its blocks convolve over the whole grid",
}


def refuse_patch_drop(model: nn.Module) -> None:
    """Raises for a model that drops tokens at random."""
    if getattr(getattr(model, "patch_drop", None), "prob", 0):
        raise ValueError(
            f"patch_drop of this {type(model).__name__} drops tokens at random before the first "
            "block: set model.patch_drop = nn.Identity()"
        )


class TimmViT(TokenSequenceHost):
    """``VisionTransformer`` and derived classes, with any number of cls and register tokens."""

    def __init__(self, model: ForeignModule):
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
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        if is_instance_of(model, "timm", "VisionTransformer"):
            refuse_patch_drop(model)
            return list(model.blocks)
        for name, why in REFUSED.items():
            if is_instance_of(model, "timm", name):
                raise ValueError(
                    f"tokens of timm's {type(model).__name__} cannot be selected: {why}; supported "
                    "timm models are VisionTransformer, Eva and their subclasses"
                )
        return ()

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return self.by_frame

    def prepare(self, model: ForeignModule, blocks: Sequence[nn.Module]) -> None:
        if self.by_frame and hasattr(model, "forward_intermediates"):
            model.forward_intermediates = Intermediates(model)

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vars(model).pop("forward_intermediates", None)

    def entry(self, model: ForeignModule) -> nn.Module:
        embeddings: nn.Module = model.patch_embed
        return embeddings

    def call_grid(self, model: ForeignModule, args: Args, kwargs: Kwargs) -> Grid:
        if not self.by_frame:
            return Grid(self.sizes)
        size = getattr(model.patch_embed, "dynamic_feat_size", None)
        image = size(first_tensor(args, kwargs).shape[-2:]) if size else self.sizes[1:]
        return Grid((getattr(model, "num_frames", 1), *image))

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        mask = kwargs.get("attn_mask")
        if thw.is_selected and mask is not None:
            kwargs = {**kwargs, "attn_mask": masks.cut(mask, *self.kept_indices(thw, args[0]))}
        return args, kwargs
