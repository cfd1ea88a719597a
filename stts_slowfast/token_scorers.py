"""Scorers of single tokens: learned, uniform, random, change, norm, attention and unique."""

import math
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.constants import sized_constant
from stts_slowfast.projections import Projections, find_projections
from stts_slowfast.scorers import ScoreNetwork, frame_difference

# By the names of STTS.TOKENS.SCORER: what makes a scorer of the channels of a token, a module
# called as (grid (B, T, H, W, C), keep, per_frame) -> (B, T*H*W), row by row, where keep is
# the number of tokens kept of a clip or, per_frame, of each frame. A set of tokens has H = 1.
# Scores are float32 and in any range: the selector normalises them. A scorer with a method
# bind(block) is bound to its block by attach, and also called with that block and its cls tokens
# (B, n, C) or (B, T, n, C), or None.
TOKEN_SCORERS = Registry("TOKEN_SCORERS")


class LearnedTokenScorer(nn.Module):
    """A network scores every token; each score depends on the mean over all tokens of the clip.

    Args:
        channels: channels of a token.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.network = ScoreNetwork(channels)

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        scores: Tensor = self.network(grid.flatten(1, 3))
        return scores


class FixedTokenScorer(nn.Module):
    """Base of scorers without parameters."""

    def __init__(self, channels: int):
        super().__init__()


class UniformTokenScorer(FixedTokenScorer):
    """Evenly spaced tokens: at 1/4 every second row and column of each frame.

    Positions of a frame have a fixed order, of which any first part is evenly spaced; a clip's
    tokens are taken in this order, each position in all frames before the next.
    """

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        like = grid.new_empty((), dtype=torch.float32)
        return _spread_scores(like, *grid.shape[1:4]).expand(len(grid), -1)


@sized_constant
def _spread_scores(
    frames: int, height: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Scores ``(T*H*W,)`` of which the highest ``n`` are evenly spaced, for any ``n``."""
    space, time = spread_order(height, width, device), spread_order(1, frames, device)
    ranks = space.flatten() * frames + time.flatten()[:, None]  # (T, H*W)
    return -ranks.flatten().to(dtype)


def spread_order(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The index of each position ``(H, W)`` in an order of which any first part is evenly spaced.

    Bits of row and column are interleaved and read backwards, as in a van der Corput sequence: the
    first half is a checkerboard, the first quarter every second row and column.
    """
    height, width = int(height), int(width)  # while a model is traced, sizes are tensors
    rows = torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device)
    bits = max(height, width).bit_length()
    key = torch.zeros(height, width, dtype=torch.long, device=device)
    for bit in range(bits):
        odd = (rows >> bit & 1) ^ (columns >> bit & 1)
        key = (key * 2 + odd) * 2 + (rows >> bit & 1)
    order = key.flatten().argsort(stable=True)
    return order.argsort().view(height, width)


class RandomTokenScorer(FixedTokenScorer):
    """Samples every token's score, also in evaluation."""

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        return torch.rand(len(grid), math.prod(grid.shape[1:4]), device=grid.device)


class TokenDifferenceScorer(FixedTokenScorer):
    """Scores a token by its difference from the same position one frame before.

    In the first frame, from the same position one frame later.
    """

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        if grid.shape[1] == 1:
            return torch.zeros(len(grid), math.prod(grid.shape[1:4]), device=grid.device)
        scores = frame_difference(grid)
        return torch.cat([scores[:, :1], scores], dim=1).flatten(1)


class NormTokenScorer(FixedTokenScorer):
    """Scores a token by its Euclidean norm."""

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        scores: Tensor = grid.flatten(1, 3).float().norm(dim=2)
        return scores


class UniqueTokenScorer(FixedTokenScorer):
    """Scores a token by one minus the cosine to its most similar other token.

    Tokens are compared with those of the clip or, ``per_frame``, of the frame. The score of
    LookWhen (arXiv 2605.06809).
    """

    def forward(self, grid: Tensor, keep: int, per_frame: bool) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        tokens = grid.flatten(2, 3).flatten(0, 1) if per_frame else grid.flatten(1, 3)
        tokens = F.normalize(tokens.float(), dim=2)
        itself = 4.0 * torch.eye(tokens.shape[1], device=grid.device)  # a cosine is at most 1
        nearest = (tokens @ tokens.transpose(1, 2) - itself).amax(dim=2)
        return (1.0 - nearest).view(len(grid), -1)


class AttentionTokenScorer(FixedTokenScorer):
    """Scores a token by the attention that it gets in the block, mean over the heads.

    The query is that of the cls tokens (EViT, arXiv 2202.07800), or the mean query of all tokens in
    a model without. Queries and keys are those of the block's own projections, without positions.
    """

    projections: Projections

    def bind(self, block: nn.Module) -> None:
        """Finds the projections of the block before which tokens are selected.

        Raises:
            ValueError: if it has none under the usual names.
        """
        self.projections = find_projections(block)

    def forward(
        self,
        grid: Tensor,
        keep: int,
        per_frame: bool,
        block: nn.Module,
        cls: Tensor | None,
    ) -> Tensor:
        """Scores ``(B, T*H*W)`` of the tokens of ``(B, T, H, W, C)``."""
        by_frame = cls is not None and cls.dim() == 4
        x = grid.flatten(2, 3).flatten(0, 1) if by_frame else grid.flatten(1, 3)
        cls = cls.flatten(0, 1) if cls is not None and by_frame else cls
        query, key = self.projections(block, x if cls is None else torch.cat([cls, x], dim=1))
        count = 0 if cls is None else cls.shape[1]
        # (b, heads, 1, D), (b, heads, n, D)
        query = (query[:, :, :1] if count else query).mean(dim=2, keepdim=True)
        logits: Any = query @ key[:, :, count:].transpose(2, 3) * key.shape[3] ** -0.5
        scores: Tensor = logits.float().softmax(dim=3).mean(dim=1)
        return scores.reshape(len(grid), -1)


for _name, _scorer in (
    ("learned", LearnedTokenScorer),
    ("uniform", UniformTokenScorer),
    ("random", RandomTokenScorer),
    ("change", TokenDifferenceScorer),
    ("norm", NormTokenScorer),
    ("unique", UniqueTokenScorer),
    ("attention", AttentionTokenScorer),
):
    TOKEN_SCORERS._do_register(_name, _scorer)
