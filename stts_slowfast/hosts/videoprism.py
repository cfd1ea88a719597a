"""VideoPrism of transformers: layers over each frame, then layers over time at each place.

Selection is before the layers over each frame; the layers over time get what is left. The
embeddings between them add a position to each frame, and must know which frames those are.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from stts_slowfast.hosts import HOSTS, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, patches


class TimesOfFrames:
    """``temporal_embeddings.forward`` behind a selection: frames get the positions they had."""

    def __init__(self, model: nn.Module, module: nn.Module):
        self.model, self.module = model, module

    def __call__(self, features: Tensor, input_shape, interpolate_pos_encoding: bool = False):
        """As the stock method: tokens ``(B*T, N, C)`` to ``(B*N, T, C)``, of the frames left."""
        forward = type(self.module).forward
        frames = self.model.stts.calls.open_call().grid.frames
        if frames is None:
            return forward(self.module, features, input_shape, interpolate_pos_encoding)
        clips, times = input_shape[:2]
        count, width = features.shape[1:]
        left = features.unflatten(0, (clips, -1))  # (B, k, N, C)
        index = frames[:, :, None, None].expand(-1, -1, count, width)
        whole = features.new_zeros(clips, times, count, width).scatter(1, index, left)
        out = forward(self.module, whole.flatten(0, 1), input_shape, interpolate_pos_encoding)
        return out.unflatten(0, (clips, -1)).gather(2, index.transpose(1, 2)).flatten(0, 1)


@HOSTS.register()
class VideoPrism(TokenSequenceHost):
    """``VideoPrismVisionModel``, ``VideoModel`` and ``ForVideoClassification``."""

    by_frame = True

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = tuple(config.tubelet_size)
        self.sizes = patches(config.num_frames, config.image_size, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        names = ("VisionModel", "VideoModel", "ForVideoClassification")
        names = [f"VideoPrism{name}" for name in names]
        return _tower(model).spatial_layers if is_instance_of(model, "transformers", *names) else ()

    def entry(self, model: nn.Module) -> nn.Module:
        return _tower(model).spatial_embeddings

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        module = _tower(model).temporal_embeddings
        module.forward = TimesOfFrames(model, module)

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vars(_tower(model).temporal_embeddings).pop("forward", None)


def _tower(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "spatial_layers") else model.vision_model
