"""V-JEPA 2 of transformers: no cls token, and rotary positions that must know what is left.

Its layers count tokens to tell where they lie, unless they get a ``position_mask`` (B, N) with the
place of each in the clip. The encoder passes None, so behind a selection every layer is told.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, Tokens, is_a
from stts_slowfast.hosts.tokens_alone import TokensAlone, patches


@HOSTS.register()
class VJEPA2(TokensAlone):
    """``VJEPA2ForVideoClassification``, for clips of any number of frames."""

    tells_every_block = True

    def __init__(self, model: nn.Module):
        config = model.config
        self.sizes = patches(
            config.frames_per_clip, config.crop_size, config.tubelet_size, config.patch_size
        )

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

    def grid(self, x: Tensor) -> Grid:
        thw = super().grid(x)
        if thw.frames is None and thw.windows is None:
            thw = Grid((x.shape[1] // (thw[1] * thw[2]), *thw[1:]))
        return thw

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        (x, _, *rest), kwargs = super().write(tokens, args, kwargs)
        return (x, self.places(tokens), *rest), kwargs

    def places(self, tokens: Tokens) -> Tensor:
        """Where each token lies among all that a clip has, ``(B, T*H*W)``, counted row by row."""
        batch, (frames, height, width) = len(tokens.grid), tokens.thw
        times, windows = tokens.thw.frames, tokens.thw.windows
        device = tokens.grid.device
        if times is None:
            times = torch.arange(frames, device=device).expand(batch, -1)
        rows = torch.arange(height, device=device).expand(batch, frames, -1)
        columns = torch.arange(width, device=device).expand(batch, frames, -1)
        if windows is not None:
            rows, columns = rows + windows[..., :1], columns + windows[..., 1:2]
        _, all_rows, all_columns = self.sizes
        places = (times[..., None] * all_rows + rows)[..., None] * all_columns
        return (places + columns[:, :, None]).flatten(1)  # (B, T, H, W) -> (B, T*H*W)
