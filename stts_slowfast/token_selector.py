"""The selector of single tokens: a token grid in, a set of tokens with their positions out."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stts_slowfast.budgets import Share, kept_tokens
from stts_slowfast.scorers import minmax_normalize
from stts_slowfast.selectors import Selection, Selector
from stts_slowfast.token_scorers import TOKEN_SCORERS
from stts_slowfast.topk import autocast_disabled, hard_topk
from stts_slowfast.windows import WindowSize


class Fusion(NamedTuple):
    """How the tokens that are not kept are fused into one.

    Attributes:
        slot: ``(B * groups, 1)``, the index among the kept tokens at which the fused one is.
        weights: ``(B * groups, N)`` float32, of its mean over the tokens that compete.
    """

    slot: Tensor
    weights: Tensor


class TokenSelector(Selector):
    """Keeps the ``int(N * keep)`` best of the ``N`` tokens of a clip, in their order.

    With ``rest`` "fuse" the last of them in rank is replaced by the mean of all tokens except the
    better ones, weighted by the softmax of their normalised scores (EViT, arXiv 2202.07800). It is
    at the position of the token that it replaces, so that their number, grids, masks and positions
    are the same as without. Gradients pass to all tokens, and under TEACHER mixture to all scores;
    under saliency scores learn only in iterations that keep all tokens.

    Args:
        channels: channels of a token.
        block: the block that the selector precedes.
        keep: share of the arriving tokens that is kept, or a range of shares.
        scorer: what scores a token, a name in ``token_scorers.TOKEN_SCORERS``.
        per_frame: keeps the same number of tokens of each frame.
        rest: what becomes of the other tokens, drop or fuse.
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
            best = hard_topk(scores.detach(), k)
            weights = fusion = None
            if k < scores.shape[1]:
                if self.rest == "fuse":
                    weights, fusion = self._fuse(scores, best)
                elif self.soft:
                    weights = self.soft_topk(scores, k)
            kept = best.unflatten(0, (len(grid), -1))
            starts = torch.arange(kept.shape[1], device=grid.device) * scores.shape[1]
            kept = self._record((kept + starts[:, None]).flatten(1))
            return Selection(kept, weights, raw.unflatten(1, (grid.shape[1], -1)), fusion)

    def _fuse(self, scores: Tensor, best: Tensor) -> tuple[Tensor | None, Fusion | None]:
        """Weights ``(B * groups, n, N)`` of a soft selection, or how to fuse after a hard one.

        Args:
            scores: normalised, ``(B * groups, N)``.
            best: ``(B * groups, n)``, the kept ones.
        """
        k, soft = best.shape[1], None
        # Of equal scores the lower index ranks first, as in hard_topk.
        slot = k - 1 - scores.detach().gather(1, best).flip(1).argmin(dim=1, keepdim=True)
        if not self.soft:
            scores = scores.detach()
            last = torch.arange(k, device=scores.device) == slot
            fused = torch.ones_like(scores).scatter(1, best, last.to(scores.dtype))
        elif k == 1:
            fused = torch.ones_like(scores)
        else:
            soft = self.soft_topk(scores, k - 1)
            fused = (1.0 - soft.sum(dim=1)).clamp(min=0.0)  # probability of not being kept
        weights = fused * scores.exp()
        weights = weights / weights.sum(dim=1, keepdim=True)
        if not self.soft:
            return None, Fusion(slot, weights)
        if soft is None:
            return weights[:, None], None
        rows = torch.arange(k, device=scores.device).expand(len(scores), -1)
        rows = torch.where(rows == slot, k - 1, rows - (rows > slot).long())
        soft = torch.cat([soft, weights[:, None]], dim=1)
        return soft.gather(1, rows[:, :, None].expand(-1, -1, soft.shape[2])), None

    def candidate_windows(self, grid: Tensor) -> tuple[WindowSize, WindowSize]:
        """Single tokens."""
        return (1, 1), (1, 1)

    def apply_selection(self, grid: Tensor, selection: Selection) -> Tensor:
        """The kept tokens of ``(B, T, H, W, C)``, with the fused one, or mixtures of tokens."""
        groups = grid.shape[1] if self.per_frame else 1
        tokens = grid.flatten(1, 3)
        if selection.kept.shape[1] == tokens.shape[1]:
            return grid
        if selection.weights is not None:
            with autocast_disabled(grid):
                grouped = self._grouped(tokens, grid)
                mixed = torch.bmm(selection.weights.to(grid.dtype), grouped)
            return mixed.unflatten(0, (len(grid), groups, 1))
        clips = torch.arange(len(grid), device=grid.device)[:, None]
        kept = tokens[clips, selection.kept].unflatten(1, (groups, 1, -1))
        if selection.fusion is None:
            return kept
        slot, weights = selection.fusion
        with autocast_disabled(grid):
            grouped = self._grouped(tokens, grid)
            fused = torch.bmm(weights[:, None].to(grid.dtype), grouped)  # (B * groups, 1, C)
        is_slot = torch.arange(kept.shape[3], device=grid.device) == slot
        shape = (*kept.shape[:3], -1, 1)  # is_slot as (B, groups, 1, n, 1)
        return torch.where(is_slot.view(shape), fused.view(*kept.shape[:3], 1, -1), kept)

    def _grouped(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """``(B, T*H*W, ...)`` as ``(B * groups, N, ...)``: tokens that compete."""
        if not self.per_frame:
            return tokens
        return tokens.unflatten(1, (grid.shape[1], -1)).flatten(0, 1)
