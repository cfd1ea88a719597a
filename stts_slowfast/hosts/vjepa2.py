"""V-JEPA 2 of transformers: no cls token, and rotary positions that must know what is left.

Its layers count tokens to tell where they lie, unless they get a ``position_mask`` (B, N) with the
place of each in the clip. The encoder passes None, so behind a selection every layer is told.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.calls import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, is_a
from stts_slowfast.hosts.tokens_alone import TokensAlone, pair, patches


@HOSTS.register()
class VJEPA2(TokensAlone):
    """``VJEPA2ForVideoClassification``, for clips of any sizes."""

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = (config.tubelet_size, *pair(config.patch_size))
        self.sizes = patches(config.frames_per_clip, config.crop_size, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        if is_a(model, "transformers", "VJEPA2Model"):
            raise ValueError(
                "VJEPA2Model predicts hidden tokens by their place among all: "
                "select tokens in VJEPA2ForVideoClassification"
            )
        if not is_a(model, "transformers", "VJEPA2ForVideoClassification"):
            return ()
        return model.vjepa2.encoder.layer

    def entry(self, model: nn.Module) -> nn.Module:
        return model.vjepa2.encoder.embeddings

    def call_grid(self, model: nn.Module, args: tuple, kwargs: dict) -> Grid:
        frames = first_tensor(args, kwargs).shape[1]
        grid = super().call_grid(model, args, kwargs)
        # Fewer frames than make a tubelet are each repeated to one.
        return grid if frames >= self.patch[0] else Grid((frames, *grid[1:]))

    def adapt_call(self, block: nn.Module, thw: Grid, args: tuple, kwargs: dict):
        x, _, *rest = args
        if thw.is_selected:
            args = (x, thw.positions(len(x), x.device), *rest)
        return args, kwargs
