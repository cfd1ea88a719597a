"""Selectors of frames and windows: a token grid in, a smaller token grid out."""

from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stts_slowfast import saliency
from stts_slowfast.budgets import (
    Share,
    empty_selection_error,
    interpolate_sizes,
    kept_frames,
    kept_window,
    window_stride,
)
from stts_slowfast.call_context import Calls, in_backward
from stts_slowfast.config import Settings
from stts_slowfast.scorers import SCORERS, minmax_normalize
from stts_slowfast.selector_state import KEEP_SCALE, SelectorState
from stts_slowfast.topk import OPERATORS, autocast_disabled, hard_topk
from stts_slowfast.windows import WindowSize, crop_windows, mix_windows


class Selection(NamedTuple):
    """What a selector chose.

    Attributes:
        kept: indices of frames ``(B, k)`` or tokens ``(B, n)``, or windows ``(B*T, 4)`` as top,
            left, height and width; in training, what the scores without noise keep.
        weights: float32 weights of the candidates, for a soft selection; None for a hard one.
        scores: of the candidates, as the scorer gave them.
    """

    kept: Tensor
    weights: Tensor | None
    scores: Tensor


class Selector(SelectorState):
    """What all selectors share: a scorer, the operator's settings, and the last selection.

    A selector works in steps, so that tokens beside the grid can be selected with it:
    :meth:`select` scores the grid, then :meth:`teach`; :meth:`apply_selection` applies the result.

    Attributes:
        kept: what the last forward pass kept, for ``hooks.selections``; no computation reads it.
    """

    size_multiple = 1  # of tokens, in which budget annealing widens

    def __init__(
        self,
        scorer: nn.Module,
        block: int,
        keep: Share,
        num_samples: int = 500,
        gradient: str = "exact",
        operator: str = "subset",
        **state: Any,
    ):
        super().__init__(block, keep, **state)
        self.scorer = scorer
        self.num_samples = num_samples
        self.gradient = gradient
        self.operator = OPERATORS.get(operator)
        self.kept: Tensor | None = None

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        """How many frames or tokens, or the window's sides, a share keeps of ``(T, H, W)``."""
        raise NotImplementedError

    def select(self, grid: Tensor) -> Selection:
        """Scores a grid ``(B, T, H, W, C)`` and selects."""
        raise NotImplementedError

    def candidate_windows(self, grid: Tensor) -> tuple[WindowSize, WindowSize]:
        """A candidate's height and width at the budget without widening, and its stride."""
        raise NotImplementedError

    def apply_selection(self, grid: Tensor, selection: Selection) -> Tensor:
        """The kept part of a grid."""
        raise NotImplementedError

    def output_size(self, grid: Tensor, widened: bool = True) -> tuple[int, ...]:
        """How many frames or tokens, or the window's sides, are kept of ``(B, T, H, W, C)``.

        Args:
            widened: with the widening of budget annealing; False for the size at its end.

        Raises:
            ValueError: if the budget is a range of which nothing was sampled, or keeps nothing.
        """
        if self.sample is None:
            raise ValueError(
                f"STTS.{self.dimension}.KEEP of block {self.block} is {self.share_text}: give one "
                f'share to test (--opts STTS.{self.dimension}.KEEP "[{self.share[1]:g}]"); to '
                "train, set_progress(model, fraction) draws one before each iteration"
            )
        thw = grid.shape[1:4]
        least = (self.low if self.training else self.high) / KEEP_SCALE
        sizes = interpolate_sizes(
            self.sizes(thw, least),
            self.sizes(thw, self.high / KEEP_SCALE),
            self.sample / KEEP_SCALE,
        )
        if min(sizes) < 1:
            about = self.dimension, least, self.block, thw, self.per_frame
            raise ValueError(empty_selection_error(*about))
        if self.training and self.widening and widened:
            wider = interpolate_sizes(sizes, self.sizes(thw, 1.0), self.widening / KEEP_SCALE)
            unit = 1 if self.taught else self.size_multiple
            sizes = tuple(a + (b - a) // unit * unit for a, b in zip(sizes, wider))
        return sizes

    def forward(self, grid: Tensor) -> Tensor:
        selection = self.select(grid)
        return self.apply_selection(self.teach(grid, selection), selection)

    @property
    def soft(self) -> bool:
        """Whether a selection is a weighted mean of candidates now."""
        return self.training and self.teacher != "saliency" and not self.taught

    @property
    def taught(self) -> bool:
        """Whether saliency teaches the scorer now: only if all tokens are kept."""
        return self.training and self.teacher != "mixture" and self.widening == KEEP_SCALE

    def teach(self, grid: Tensor, selection: Selection) -> Tensor:
        """Returns the ``grid`` that arrives, whose gradient then teaches the selection's scores."""
        if not (self.training and selection.scores.requires_grad) or selection.weights is not None:
            return grid
        candidates = self.candidate_windows(grid) if self.taught else None
        return saliency.teach(grid, selection.scores, candidates)

    def scorer_input(self, grid: Tensor) -> Tensor:
        """What the scorer scores; saliency trains only the scorer, not the backbone before it."""
        return grid.detach() if self.training and not self.soft else grid

    def _record(self, kept: Tensor) -> Tensor:
        """Records what was kept, but not if checkpointing runs an earlier pass again."""
        if not in_backward():
            self.kept = kept
        return kept

    def soft_topk(self, scores: Tensor, k: int) -> Tensor:
        """Soft selection ``(N, k, d)`` of the top ``k`` of normalised ``scores`` ``(N, d)``."""
        sigma = self._sigma_tensor.to(scores.device)
        return self.operator(scores, k, sigma, self.num_samples, self.gradient)

    def extra_repr(self) -> str:
        return f"block={self.block}, keep={self.share_text}"


class TemporalSelector(Selector):
    """Keeps the ``int(T * keep)`` best frames of a grid, in their order.

    Args:
        channels: channels of a token.
        block: the block that the selector precedes.
        keep: share of the arriving frames that is kept, or a range of shares.
        scorer: what scores a frame, a name in ``scorers.SCORERS``.
        **settings: ``sigma``, ``sigma_decay``, ``shrink``, ``num_samples``, ``gradient``,
            ``operator`` and ``teacher``, as in the node.

    Shapes: grid ``(B, T, H, W, C)`` in, ``(B, int(T * keep), H, W, C)`` out; ``kept`` is
    ``(B, int(T * keep))``, ascending indices of the frames that arrived.
    """

    dimension = "TIME"

    def __init__(
        self, channels: int, block: int, keep: Share, scorer: str = "learned", **settings: Any
    ):
        super().__init__(SCORERS.get(scorer)("TIME", channels), block, keep, **settings)

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        return (kept_frames(thw[0], share),)

    def select(self, grid: Tensor) -> Selection:
        """Indices ``(B, k)``, and in training weights ``(B, k, T)``."""
        self.check_schedule()
        (k,) = self.output_size(grid)
        (scored_k,) = self.output_size(grid, widened=not self.taught)
        with autocast_disabled(grid):
            raw = self.scorer(self.scorer_input(grid), scored_k)
            scores = minmax_normalize(raw)
            self.check_finite(scores)
            kept = self._record(hard_topk(scores.detach(), k))
            return Selection(kept, self.soft_topk(scores, k) if self.soft else None, raw[..., None])

    def candidate_windows(self, grid: Tensor) -> tuple[WindowSize, WindowSize]:
        """Whole frames."""
        frame = grid.shape[2], grid.shape[3]
        return frame, frame

    def apply_selection(self, grid: Tensor, selection: Selection) -> Tensor:
        """The kept frames of ``(B, T, ...)``, or mixtures of frames: ``(B, k, ...)``."""
        if selection.weights is not None:
            with autocast_disabled(grid):
                mixed = torch.bmm(selection.weights.to(grid.dtype), grid.flatten(2))
            return mixed.unflatten(2, grid.shape[2:])
        clips = torch.arange(grid.shape[0], device=grid.device)[:, None]
        return grid[clips, selection.kept]


class SpatialSelector(Selector):
    """Crops every frame of a grid to its best window.

    Args:
        channels: channels of a token.
        block: the block that the selector precedes.
        keep: share of a frame's tokens that is kept, or a range of shares; sides of the window
            are those of ``budgets.kept_window``.
        scorer: what scores a window, a name in ``scorers.SCORERS``.
        stride: tokens between neighbouring windows; 0 for the default of ``budgets.window_stride``.
        shared: one window for all frames of a clip, scored by its mean over the frames.
        **settings: ``sigma``, ``sigma_decay``, ``shrink``, ``num_samples``, ``gradient``,
            ``operator`` and ``teacher``, as in the node.

    Shapes: grid ``(B, T, H, W, C)`` in, ``(B, T, h, w, C)`` out; ``kept`` is ``(B*T, 4)``: top,
    left, height and width in tokens of the grid that arrived.
    """

    dimension = "SPACE"

    def __init__(
        self,
        channels: int,
        block: int,
        keep: Share,
        scorer: str = "learned",
        stride: int = 0,
        shared: bool = False,
        **settings: Any,
    ):
        super().__init__(SCORERS.get(scorer)("SPACE", channels), block, keep, **settings)
        self.stride = stride
        # So that window positions match those of the final budget.
        self.size_multiple = max(stride, 1)
        self.shared = shared

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        _, height, width = thw
        return kept_window(height, width, share)

    def select(self, grid: Tensor) -> Selection:
        """Windows ``(B*T, 4)``, and in training weights ``(B*T, windows)``."""
        self.check_schedule()
        frames, height, width = grid.shape[1:4]
        window = self._window(grid, widened=not self.taught)
        stride = self._stride(grid, window)
        with autocast_disabled(grid):
            raw = self.scorer(self.scorer_input(grid), window, stride)  # (B*T, rows * columns)
            raw = raw.unflatten(0, grid.shape[:2])
            if self.shared:
                raw = raw.mean(dim=1, keepdim=True)
            scores = minmax_normalize(raw.flatten(0, 1))
            self.check_finite(scores)
            best = self._per_frame(hard_topk(scores.detach(), 1).squeeze(1), frames)  # (B*T,)
            columns = (width - window[1]) // stride[1] + 1
            top = best.div(columns, rounding_mode="floor") * stride[0]
            left = best.remainder(columns) * stride[1]
            if self.taught:  # all tokens are kept
                window, top, left = (height, width), torch.zeros_like(top), torch.zeros_like(left)
            sides = [torch.full_like(top, side) for side in window]
            kept = self._record(torch.stack([top, left, *sides], dim=1))
            weights = None
            if self.soft:
                weights = self._per_frame(self.soft_topk(scores, 1).squeeze(1), frames)
            return Selection(kept, weights, raw)

    def candidate_windows(self, grid: Tensor) -> tuple[WindowSize, WindowSize]:
        window = self._window(grid, widened=False)
        return window, self._stride(grid, window)

    def apply_selection(self, grid: Tensor, selection: Selection) -> Tensor:
        """The kept window of each frame, or the mixture of its windows: ``(B, T, h, w, C)``."""
        window = self._window(grid)
        if selection.weights is not None:
            weights = selection.weights.to(grid.dtype).unflatten(0, grid.shape[:2])
            return mix_windows(grid, weights, window, self._stride(grid, window))
        return crop_windows(grid, selection.kept[:, :2], window)

    def _window(self, grid: Tensor, widened: bool = True) -> WindowSize:
        height, width = self.output_size(grid, widened)
        return height, width

    def _stride(self, grid: Tensor, window: WindowSize) -> WindowSize:
        """Tokens between neighbouring windows along both axes."""
        rows, columns = (
            window_stride(size, side, self.stride) for size, side in zip(grid.shape[2:4], window)
        )
        return rows, columns

    def _per_frame(self, choice: Tensor, frames: int) -> Tensor:
        return choice.repeat_interleave(frames, dim=0) if self.shared else choice


class Selectors(nn.Module):
    """A model's selectors by their keys, in the order in which they run: ``model.stts``.

    It is like a dict. Peft refuses to save an ``nn.ModuleDict`` (``modules_to_save=["stts"]``).

    Attributes:
        settings: the requested ones.
        calls: of the model; None if grids travel in the blocks' calls.
        hooks: those on the model's blocks, by number, for graphs that torch.fx traces.
        reached: sizes, frames, windows, tokens and whole sizes of the grid behind the last pass's
            selections, for ``dense_features.positions``; of packed clips, a list.
        frozen: parameters of the model whose gradients ``frozen_gradients`` has turned off.
    """

    _modules: dict[str, Any]

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.calls: Calls | None = None
        self.hooks: dict[int | str, Any] = {}
        self.reached: tuple[Any, ...] | list[tuple[Any, ...]] | None = None
        self.frozen: list[Tensor] = []

    def __setitem__(self, key: str, selector: Selector) -> None:
        self.add_module(key, selector)

    def __getitem__(self, key: str) -> Selector:
        return self._modules[key]

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> KeysView[str]:
        return self._modules.keys()

    def values(self) -> ValuesView[Selector]:
        return self._modules.values()

    def items(self) -> ItemsView[str, Selector]:
        return self._modules.items()
