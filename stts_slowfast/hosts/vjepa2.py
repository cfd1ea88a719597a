"""V-JEPA 2 of transformers: no cls token, and rotary positions that depend on the kept tokens.

Its layers compute positions from the order of tokens, unless they get a ``position_mask`` (B, N)
with the position of each token in the clip. The encoder passes None; after a selection each layer
gets one.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts.hf_video import HFVideoHost, inner
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs, is_instance_of


def refuse(*args: Any, **kwargs: Any) -> None:
    """Replaces the ``forward`` of the predictor of ``VJEPA2Model``."""
    raise ValueError(
        "the predictor of VJEPA2Model predicts hidden tokens by their positions among all tokens, "
        "and a selection drops some: call the model with skip_predictor=True"
    )


class PositionsOfOneHead:
    """``get_position_ids`` of an attention: positions from a mask as ``(B, 1, N)``, for all heads.

    The original repeats them for each head, and with them the sines and cosines of rotations.
    """

    def __init__(self, attention: ForeignModule):
        self.attention = attention

    def __call__(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, ...]:
        """As the original method: frame, row and column of each token."""
        attention = self.attention
        found: tuple[Tensor, ...] = type(attention).get_position_ids(attention, x, masks)
        return found if masks is None else tuple(part[:, :1] for part in found)


class VJEPA2(HFVideoHost):
    """``VJEPA2ForVideoClassification``, and ``VJEPA2Model`` as an encoder; clips of any size."""

    classes = ("VJEPA2Model", "VJEPA2ForVideoClassification")
    embeddings = "encoder.embeddings"

    @staticmethod
    def clip_size(config: ForeignModule) -> tuple[int, object]:
        return config.frames_per_clip, config.crop_size

    def prepare(self, model: ForeignModule, blocks: Sequence[ForeignModule]) -> None:
        for block in blocks:
            block.attention.get_position_ids = PositionsOfOneHead(block.attention)
        if is_instance_of(model, "transformers", "VJEPA2Model"):
            model.predictor.forward = refuse

    def restore(self, model: nn.Module, blocks: Sequence[ForeignModule]) -> None:
        for block in blocks:
            vars(block.attention).pop("get_position_ids", None)
        vars(inner(model).predictor).pop("forward", None)

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Grid | None:
        grid = super().call_grid(model, args, kwargs)
        frames = first_tensor(args, kwargs).shape[1]
        if grid is None or self.patch is None or frames >= self.patch[0]:
            return grid
        # If a clip has fewer frames than a tubelet, each frame is repeated to fill one.
        return Grid((frames, *grid[1:]))

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        x, _, *rest = args
        if thw.is_selected:
            args = (x, thw.positions(len(x), x.device), *rest)
        return args, kwargs
