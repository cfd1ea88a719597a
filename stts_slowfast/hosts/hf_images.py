"""Image transformers of transformers on video, frame by frame: SigLIP, CLIP, DINOv2 and DINOv3.

The batch has the frames of all clips, ``(B*T, 3, H, W)``; the number of frames in a clip is read in
every call from ``model.num_frames``, which the user sets (without it each image is a clip of one
frame). The output has an entry for each kept frame.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import masks
from stts_slowfast.hosts.hf_video import inner
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, pair, patches

HEADS = {
    "Siglip": ("VisionModel", "ForImageClassification"),
    "CLIP": ("VisionModel", "VisionModelWithProjection", "ForImageClassification"),
    "Dinov2": ("Model", "ForImageClassification"),
    "Dinov2WithRegisters": ("Model", "ForImageClassification"),
    "DINOv3ViT": ("Model",),
}
NAMES = tuple(name + head for name, heads in HEADS.items() for head in heads)

# Models of the same families that cannot be served, and why.
REFUSED = {
    "Siglip2VisionModel": "it pads images of several sizes to one length; checkpoints of SigLIP 2 "
    "with a fixed size are SiglipVisionModel, which can be served",
    "Dinov2Backbone": "it makes maps of whole images; attach to Dinov2Model",
    "Dinov2WithRegistersBackbone": "it makes maps of whole images; attach to "
    "Dinov2WithRegistersModel",
    "DINOv3ViTBackbone": "it makes maps of whole images; attach to DINOv3ViTModel",
}


class HFImages(TokenSequenceHost):
    """Vision models without a text part, with any number of cls and register tokens."""

    by_frame = True

    def __init__(self, model: ForeignModule):
        tower = _tower(model)
        config = tower.config
        self.rows, self.columns = pair(config.patch_size)
        patch = (1, self.rows, self.columns)
        self.sizes = patches(getattr(model, "num_frames", 1), config.image_size, patch)
        cls = 0 if is_instance_of(tower, "transformers", "SiglipVisionModel") else 1
        self.prefix = cls + getattr(config, "num_register_tokens", 0)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        for name, why in REFUSED.items():
            if is_instance_of(model, "transformers", name):
                raise ValueError(f"tokens of transformers' {name} cannot be selected: {why}")
        if not is_instance_of(model, "transformers", *NAMES):
            return ()
        tower = _tower(model)
        encoder: ForeignModule = (
            tower.encoder if hasattr(tower, "encoder") else getattr(tower, "model", tower)
        )
        return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return self.by_frame

    def entry(self, model: nn.Module) -> nn.Module:
        embeddings: nn.Module = _tower(model).embeddings
        return embeddings

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Grid:
        height, width = first_tensor(args, kwargs).shape[-2:]
        return Grid((getattr(model, "num_frames", 1), height // self.rows, width // self.columns))

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Cuts masks, and DINOv3's rotary positions ``(N, D)``, to those of the kept tokens."""
        if not thw.is_selected:
            return args, kwargs
        x, *rest = args
        entries, indices = self.kept_indices(thw, x)
        if rest and rest[0] is not None:
            rest[0] = masks.cut(rest[0], entries, indices)
        if (mask := kwargs.get("attention_mask")) is not None:
            kwargs = {**kwargs, "attention_mask": masks.cut(mask, entries, indices)}
        if kwargs.get("position_embeddings") is not None:
            indices = indices[:, None, self.prefix :] - self.prefix  # (b, 1, n): for all heads
            rotary = tuple(part[indices] for part in kwargs["position_embeddings"])
            kwargs = {**kwargs, "position_embeddings": rotary}
        return (x, *rest), kwargs


def _tower(model: ForeignModule) -> ForeignModule:
    """The module with embeddings and encoder, without head or projection."""
    if hasattr(model, "embeddings"):
        return model
    return getattr(model, "vision_model", None) or inner(model)
