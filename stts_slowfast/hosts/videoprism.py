"""VideoPrism of transformers: layers over each frame, then layers over time at each position.

Selection is before the layers over each frame; the layers over time get the kept tokens. The
embeddings between them add a temporal position to each frame, and need the kept frames' indices.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stts_slowfast.hosts.hf_video import HFVideoHost
from stts_slowfast.hosts.host import ForeignModule, is_instance_of


class TemporalEmbeddingsOfKeptFrames:
    """``temporal_embeddings.forward`` after a selection: frames get their original positions."""

    def __init__(self, model: ForeignModule, module: nn.Module):
        self.model, self.module = model, module

    def __call__(
        self, features: Tensor, input_shape: Sequence[int], interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """As the original method: tokens ``(B*T, N, C)`` to ``(B*N, T, C)``, of kept frames."""
        forward: Any = type(self.module).forward
        frames = self.model.stts.calls.open_call().grid.frames
        if frames is None:
            out: Tensor = forward(self.module, features, input_shape, interpolate_pos_encoding)
            return out
        clips, times = input_shape[:2]
        count, width = features.shape[1:]
        kept = features.unflatten(0, (clips, -1))  # (B, k, N, C)
        index = frames[:, :, None, None].expand(-1, -1, count, width)
        whole = features.new_zeros(clips, times, count, width).scatter(1, index, kept)
        out = forward(self.module, whole.flatten(0, 1), input_shape, interpolate_pos_encoding)
        return out.unflatten(0, (clips, -1)).gather(2, index.transpose(1, 2)).flatten(0, 1)


class VideoPrism(HFVideoHost):
    """``VideoPrismVisionModel``, ``VideoPrismVideoModel`` and ``ForVideoClassification``."""

    classes = (
        "VideoPrismVisionModel",
        "VideoPrismVideoModel",
        "VideoPrismForVideoClassification",
    )
    by_frame = True

    @classmethod
    def blocks(cls, model: nn.Module) -> Sequence[nn.Module]:
        if not is_instance_of(model, "transformers", *cls.classes):
            return ()
        return list(_tower(model).spatial_layers)

    def entry(self, model: nn.Module) -> nn.Module:
        embeddings: nn.Module = _tower(model).spatial_embeddings
        return embeddings

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        raise ValueError("its last layers attend over time at each position of a frame")

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        module = _tower(model).temporal_embeddings
        module.forward = TemporalEmbeddingsOfKeptFrames(model, module)

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vars(_tower(model).temporal_embeddings).pop("forward", None)


def _tower(model: ForeignModule) -> ForeignModule:
    return model if hasattr(model, "spatial_layers") else model.vision_model
