"""V-JEPA 2 of transformers: no cls token, and rotary positions that must know what is left.

Its layers count tokens to tell where they lie, unless they get a ``position_mask`` (B, N) with the
place of each in the clip. The encoder passes None, so behind a selection every layer is told.
"""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, inner, pair, patches


def refuse(*args, **kwargs):
    """Instead of the ``forward`` of the predictor of ``VJEPA2Model``."""
    raise ValueError(
        "the predictor of VJEPA2Model predicts hidden tokens by their place among all, and some "
        "are dropped by a selection: call the model with skip_predictor=True"
    )


@HOSTS.register()
class VJEPA2(TokenSequenceHost):
    """``VJEPA2ForVideoClassification``, and ``VJEPA2Model`` as an encoder; clips of any sizes."""

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = (config.tubelet_size, *pair(config.patch_size))
        self.sizes = patches(config.frames_per_clip, config.crop_size, self.patch)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        names = ("VJEPA2Model", "VJEPA2ForVideoClassification")
        return inner(model).encoder.layer if is_instance_of(model, "transformers", *names) else ()

    def entry(self, model: nn.Module) -> nn.Module:
        return inner(model).encoder.embeddings

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        if is_instance_of(model, "transformers", "VJEPA2Model"):
            model.predictor.forward = refuse

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vars(inner(model).predictor).pop("forward", None)

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
