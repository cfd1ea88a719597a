"""The selector of single tokens: a token grid in, a set of tokens with their positions out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.budgets import Share, kept_tokens
from stts_slowfast.scorers import minmax_normalize
from stts_slowfast.selectors import Selection, Selector
from stts_slowfast.token_scorers import TOKEN_SCORERS
from stts_slowfast.topk import autocast_disabled, hard_topk
from stts_slowfast.windows import WindowSize


class TokenSelector(Selector):
    """Keeps the ``int(N * keep)`` best of the ``N`` tokens of a clip, in their order.

    With ``rest`` "merge" each kept token becomes the mean of itself and of the other tokens that
    are most similar to it (:func:`merge`). Number and positions of the kept tokens, and so grids
    and masks, are the same as without. Gradients pass to all tokens; scores get none from it.

    Args:
        channels: channels of a token.
        block: the block that the selector precedes.
        keep: share of the arriving tokens that is kept, or a range of shares.
        scorer: what scores a token, a name in ``token_scorers.TOKEN_SCORERS``.
        per_frame: keeps the same number of tokens of each frame.
        rest: what becomes of the other tokens, drop or merge.
        **settings: ``sigma``, ``sigma_decay``, ``shrink``, ``num_samples``, ``gradient``,
            ``operator`` and ``teacher``, as in the node; ``both`` is ``saliency``.

    Shapes: grid ``(B, T, H, W, C)`` in; ``(B, 1, 1, n, C)`` out or, ``per_frame``,
    ``(B, T, 1, n, C)``; the grid itself if all tokens are kept. ``kept`` is ``(B, n)`` or
    ``(B, T*n)``, ascending flat indices in the grid that arrived.
    """

    dimension = "TOKENS"

    def __init__(
        self,
        channels: int,
        block: int,
        keep: Share,
        scorer: str = "learned",
        per_frame: bool = False,
        rest: str = "drop",
        **settings: Any,
    ):
        if settings.get("teacher") == "both":
            # A mixture of tokens from anywhere is like none of them, and costs O(N n).
            settings["teacher"] = "saliency"
        super().__init__(TOKEN_SCORERS.get(scorer)(channels), block, keep, **settings)
        self.per_frame, self.rest = per_frame, rest

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        """How many tokens, of the clip or ``per_frame``, a share keeps of ``(T, H, W)``."""
        frames, height, width = thw
        return (kept_tokens(height * width * (1 if self.per_frame else frames), share),)

    def select(
        self, grid: Tensor, block: nn.Module | None = None, cls: Tensor | None = None
    ) -> Selection:
        """Indices ``(B, groups * n)``, and in training weights ``(B * groups, n, N)``.

        Args:
            grid: ``(B, T, H, W, C)``.
            block: that the tokens are for; only for scorers that read it.
            cls: its cls tokens, ``(B, m, C)`` or ``(B, T, m, C)``; likewise.
        """
        self.check_schedule()
        (k,) = self.output_size(grid)
        (scored_k,) = self.output_size(grid, widened=not self.taught)
        more = {"block": block, "cls": cls} if hasattr(self.scorer, "bind") else {}
        with autocast_disabled(grid):
            raw = self.scorer(self.scorer_input(grid), scored_k, self.per_frame, **more)
            scores = minmax_normalize(self._grouped(raw, grid))  # (B * groups, N)
            self.check_finite(scores)
            groups = grid.shape[1] if self.per_frame else 1
            kept = hard_topk(scores.detach(), k).unflatten(0, (len(grid), groups))
            starts = torch.arange(groups, device=grid.device) * scores.shape[1]
            kept = self._record((kept + starts[:, None]).flatten(1))
            soft = self.soft and k < scores.shape[1]
            weights = self.soft_topk(scores, k) if soft else None
            return Selection(kept, weights, raw.unflatten(1, (grid.shape[1], -1)))

    def candidate_windows(self, grid: Tensor) -> tuple[WindowSize, WindowSize]:
        """Single tokens."""
        return (1, 1), (1, 1)

    def apply_selection(self, grid: Tensor, selection: Selection) -> Tensor:
        """The kept tokens of ``(B, T, H, W, C)``, also merged with others, or mixtures."""
        groups = grid.shape[1] if self.per_frame else 1
        tokens = grid.flatten(1, 3)
        if selection.kept.shape[1] == tokens.shape[1]:
            # What teach returned may not be changed in place, as a block may do.
            return grid.clone() if self.training and grid.requires_grad else grid
        if selection.weights is not None:
            with autocast_disabled(grid):
                grouped = self._grouped(tokens, grid)
                mixed = torch.bmm(selection.weights.to(grid.dtype), grouped)
            return mixed.unflatten(0, (len(grid), groups, 1))
        if self.rest == "merge":
            with autocast_disabled(grid):
                grouped = self._grouped(tokens, grid)
                kept = selection.kept.unflatten(1, (groups, -1)).flatten(0, 1)
                kept = kept.remainder(grouped.shape[1])
                return merge(grouped, kept).unflatten(0, (len(grid), groups, 1))
        clips = torch.arange(len(grid), device=grid.device)[:, None]
        return tokens[clips, selection.kept].unflatten(1, (groups, 1, -1))

    def _grouped(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """``(B, T*H*W, ...)`` as ``(B * groups, N, ...)``: tokens that compete."""
        if not self.per_frame:
            return tokens
        return tokens.unflatten(1, (grid.shape[1], -1)).flatten(0, 1)


def merge(tokens: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens ``(N, n, C)``, each the mean of itself and of those most similar to it.

    Similarity is the cosine (as ToMe, arXiv 2210.09461, merges tokens, but without sizes). It is
    computed in parts, none of which is larger than the tokens.

    Args:
        tokens: ``(N, d, C)``.
        kept: LongTensor ``(N, n)``, indices of those that are kept.
    """
    d, width, n = int(tokens.shape[1]), int(tokens.shape[2]), int(kept.shape[1])
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    with torch.no_grad():
        unit = F.normalize(x, dim=2)
        centres = unit.gather(1, kept[:, :, None].expand(-1, -1, width)).transpose(1, 2)
        parts = unit.split(max(d * width // n, 1), dim=1)
        nearest = torch.cat([(part @ centres).argmax(dim=2) for part in parts], dim=1)
        own = torch.arange(n, device=kept.device).expand(len(kept), -1)
        nearest = nearest.scatter(1, kept, own)[:, :, None]  # (N, d, 1)
        counts = x.new_zeros(len(x), n, 1).scatter_add(1, nearest, torch.ones_like(x[:, :, :1]))
    sums = x.new_zeros(len(x), n, width).scatter_add(1, nearest.expand(-1, -1, width), x)
    return (sums / counts).to(tokens.dtype)
