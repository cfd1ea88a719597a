"""What hosts of video models in transformers share: sizes from the config, layers by their path."""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.hosts.host import ForeignModule, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, pair, patches


class HFVideoHost(TokenSequenceHost):
    """Clips ``(B, T, channels, H, W)`` as tubelets.

    Attributes:
        classes: the model's class is one of these, or derived from one.
        layers, embeddings: paths of both in the model without its head.
    """

    classes: tuple[str, ...]
    layers = "encoder.layer"
    embeddings = "embeddings"

    def __init__(self, model: ForeignModule):
        config = model.config
        tubelet, side = getattr(config, "tubelet_size", 1), getattr(config, "patch_size", None)
        # ViViT and VideoPrism have the whole tubelet, the others its frames.
        time, rows, columns = (tubelet, *pair(side)) if isinstance(tubelet, int) else tubelet
        self.patch = time, rows, columns
        self.sizes = patches(*self.clip_size(config), (time, rows, columns))

    @staticmethod
    def clip_size(config: ForeignModule) -> tuple[int, object]:
        """Frames, and one side or two, of the clips that a model was made for."""
        return config.num_frames, config.image_size

    @classmethod
    def blocks(cls, model: nn.Module) -> Sequence[nn.Module]:
        if not is_instance_of(model, "transformers", *cls.classes):
            return ()
        return list(inner(model).get_submodule(cls.layers))

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return self.by_frame

    def entry(self, model: nn.Module) -> nn.Module:
        return inner(model).get_submodule(self.embeddings)


def inner(model: ForeignModule) -> ForeignModule:
    """A model of transformers without its head."""
    return getattr(model, model.base_model_prefix, model)
