"""Temporal and spatial selectors: a token grid in, a smaller token grid out."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from stts_slowfast import saliency
from stts_slowfast.config import (
    between,
    ends,
    kept_frames,
    kept_window,
    nothing_left,
    window_stride,
)
from stts_slowfast.scorers import SCORERS, normalize
from stts_slowfast.topk import NAN, OPERATORS, full_precision, hard_topk, on_host

# PyTorch before 2.7 does not tell, and exports as it compiles.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


# Shares are kept in billionths: torch.compile takes a module's whole numbers for constants, but its
# floats for variables as soon as two selectors differ, and no shape can depend on those.
WHOLE = 10**9


class Choice(NamedTuple):
    """What a selector chose.

    Attributes:
        kept: indices of frames ``(B, k)``, or windows ``(B*T, 4)`` as top, left, height and width;
            in training, what the scores without noise keep.
        weights: float32 indicators over the candidates, for a soft choice; None for a hard one.
        scores: of the candidates, as the scorer gave them.
    """

    kept: Tensor
    weights: Tensor | None
    scores: Tensor | None = None


class Selector(nn.Module):
    """What both selectors share: a scorer, the operator's settings, and the last choice.

    A selector works in two steps, so that what rides along with a grid can be selected with it:
    :meth:`choose` scores the grid, :meth:`take` applies the choice. In training a choice is soft,
    in evaluation it is hard; taught by saliency it is hard always, and :meth:`teach` comes between.

    Attributes:
        kept: what the last forward kept, for people who look (``hooks.selections``); nothing that
            is computed reads it.
        sigma: 0-dim buffer, the present noise level; see ``schedule.set_progress``.
        share: low and high end of the share of what arrives that goes on.
    """

    dimension: str
    step = 1  # by which budgets shrink

    def __init__(
        self,
        scorer: nn.Module,
        block: int,
        keep: float | Sequence[float],
        sigma: float = 0.2,
        sigma_decay: str = "linear",
        shrink: float = 0.0,
        num_samples: int = 500,
        gradient: str = "exact",
        operator: str = "subset",
        teacher: str = "mixture",
    ):
        super().__init__()
        self.scorer = scorer
        self.block = block
        self.share = ends(keep)
        self.low, self.high = (round(share * WHOLE) for share in self.share)
        # Where between them; nobody has drawn from a range yet.
        self.draw = 0 if self.low == self.high else None
        # How far from there to all that arrives. Saliency needs somebody to say when it teaches.
        self.wide = None if teacher != "mixture" and list(scorer.parameters()) else 0
        self.num_samples = num_samples
        self.gradient = gradient
        self.operator = OPERATORS.get(operator)
        self.teacher = teacher
        self.initial_sigma = float(sigma)
        self.sigma_decay = sigma_decay
        self.shrink = shrink
        self.register_buffer("sigma", torch.tensor(self.initial_sigma), persistent=False)
        self.kept: Tensor | None = None
        self.nan_scores: Tensor | None = None  # on the device
        self.nan_seen: Tensor | None = None  # the same, as it arrives on the host

    def __getstate__(self) -> dict:
        return {**self.__dict__, "nan_scores": None, "nan_seen": None}

    @property
    def key(self) -> str:
        """Its name in ``model.stts``: ``time_0``, ``space_4``."""
        return f"{self.dimension.lower()}_{self.block}"

    def set_budget(self, draw: float, wide: float = 0.0) -> None:
        """What goes on in training until the next call; in evaluation it is the high end.

        Args:
            draw: 0..1 of the way through the range of sizes; a single share is no range.
            wide: 0..1 of the way from there to all that arrives.
        """
        if self.low != self.high:
            self.draw = round(draw * WHOLE)
        self.wide = round(wide * WHOLE)

    def goes_on(self, grid: Tensor, widened: bool = True) -> tuple[int, ...]:
        """How many frames, or height and width of the window, go on of ``(B, T, H, W, C)`` now.

        Not ``widened``, how many will when budgets have shrunk.
        """
        if self.draw is None:
            raise ValueError(
                f"STTS.{self.dimension}.KEEP of block {self.block} is {self.share_text}: give one "
                f'share to test (--opts STTS.{self.dimension}.KEEP "[{self.share[1]:g}]"); to '
                "train, set_progress(model, fraction) draws one before each iteration"
            )
        if self.wide is None and self.training and torch.is_grad_enabled():
            raise ValueError(
                f"STTS.TEACHER is {self.teacher}, but nobody has set a budget, and saliency "
                "teaches when all tokens pass: call set_progress(model, fraction) before each "
                "iteration of training"
            )
        thw = grid.shape[1:4]
        least = (self.low if self.training else self.high) / WHOLE
        sizes = between(
            self.sizes(thw, least), self.sizes(thw, self.high / WHOLE), self.draw / WHOLE
        )
        if min(sizes) < 1:
            raise ValueError(nothing_left(self.dimension, least, self.block, thw))
        if self.training and self.wide and widened:
            wider = between(sizes, self.sizes(thw, 1.0), self.wide / WHOLE)
            step = 1 if self.taught else self.step
            sizes = tuple(a + (b - a) // step * step for a, b in zip(sizes, wider))
        return sizes

    def forward(self, grid: Tensor) -> Tensor:
        choice = self.choose(grid)
        return self.take(self.teach(grid, choice), choice)

    @property
    def soft(self) -> bool:
        """Whether a choice is a mixture now."""
        return self.training and self.teacher != "saliency" and not self.taught

    @property
    def taught(self) -> bool:
        """Whether saliency teaches the scorer now: only if it sees all that could be dropped."""
        return self.training and self.teacher != "mixture" and self.wide == WHOLE

    def teach(self, grid: Tensor, choice: Choice) -> Tensor:
        """The ``grid`` that arrives, of which the gradient teaches the scores of a choice."""
        if not self.training or self.soft:
            return grid
        lesson = self.candidates(grid) if self.taught else None
        return saliency.teach(grid, choice.scores, lesson)

    def raise_on_nan(self) -> None:
        """Raises where a forward pass since the last call had NaN scores; waits for the device.

        Raises:
            ValueError: naming the selector.
        """
        flag, self.nan_scores, self.nan_seen = self.nan_scores, None, None
        if flag is not None and flag:
            raise ValueError(f"STTS {self.key}: {NAN}")

    def watch(self, scores: Tensor) -> None:
        """Raises for NaN scores: at once on a CPU, elsewhere without ever waiting for the device.

        There they are noted, and the first forward pass that finds the note on the host raises;
        :meth:`raise_on_nan` is for who waits for the device anyway.
        """
        if scores.is_meta or torch.jit.is_tracing() or is_exporting():
            return
        found = scores.detach().isnan().any()
        if torch.compiler.is_compiling():
            self.nan_scores = found
            return
        if on_host(scores) or (self.nan_seen is not None and self.nan_seen):
            self.nan_scores = found if on_host(scores) else self.nan_scores
            self.raise_on_nan()
            return
        earlier = self.nan_scores
        self.nan_scores = found if earlier is None else found | earlier.to(found.device)
        if self.nan_seen is None:
            self.nan_seen = torch.zeros((), dtype=torch.bool, pin_memory=scores.is_cuda)
        self.nan_seen.copy_(self.nan_scores, non_blocking=True)

    def seen(self, grid: Tensor) -> Tensor:
        """What the scorer scores. A lesson of saliency is the scorer's, not the backbone's."""
        return grid.detach() if self.training and not self.soft else grid

    def indicators(self, scores: Tensor, k: int) -> Tensor:
        """Soft choice ``(N, k, d)`` of the top ``k`` of normalised ``scores`` ``(N, d)``."""
        return self.operator(scores, k, self.sigma, self.num_samples, self.gradient)

    @property
    def share_text(self) -> str:
        """The share in words."""
        return " to ".join(f"{share:g}" for share in dict.fromkeys(self.share))

    def extra_repr(self) -> str:
        return f"block={self.block}, keep={self.share_text}"


class TemporalSelector(Selector):
    """Keeps the ``int(T * keep)`` best frames of a grid, in their order.

    Args:
        channels: channels of a token.
        block: the block in front of which the selector sits.
        keep: share of the arriving frames that goes on, or a range of it.
        scorer: what scores a frame, a name in ``scorers.SCORERS``.
        **settings: of the operator, see :class:`Selector`.

    Shapes: grid ``(B, T, H, W, C)`` in, ``(B, int(T * keep), H, W, C)`` out; ``kept`` is
    ``(B, int(T * keep))``, ascending indices into the frames that arrived.
    """

    dimension = "TIME"

    def __init__(self, channels: int, block: int, keep, scorer: str = "learned", **settings):
        super().__init__(SCORERS.get(scorer)("TIME", channels), block, keep, **settings)

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        return (kept_frames(thw[0], share),)

    def choose(self, grid: Tensor) -> Choice:
        """Indices ``(B, k)``, and in training weights ``(B, k, T)``."""
        (k,) = self.goes_on(grid)
        with full_precision(grid):
            raw = self.scorer(self.seen(grid), self.goes_on(grid, widened=not self.taught)[0])
            self.watch(raw)
            scores = normalize(raw)
            self.kept = kept = hard_topk(scores.detach(), k)
            return Choice(kept, self.indicators(scores, k) if self.soft else None, raw[..., None])

    def candidates(self, grid: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Whole frames: a window's height and width, and the tokens between two."""
        return tuple(grid.shape[2:4]), tuple(grid.shape[2:4])

    def take(self, frames: Tensor, choice: Choice) -> Tensor:
        """Applies a choice to ``frames`` ``(B, T, ...)``."""
        if choice.weights is not None:
            with full_precision(frames):
                mixed = torch.bmm(choice.weights.to(frames.dtype), frames.flatten(2))
            return mixed.unflatten(2, frames.shape[2:])
        clips = torch.arange(frames.shape[0], device=frames.device)[:, None]
        return frames[clips, choice.kept]


class SpatialSelector(Selector):
    """Crops every frame of a grid to its best window.

    Args:
        channels: channels of a token.
        block: the block in front of which the selector sits.
        keep: share of a frame's tokens that goes on, or a range of it; the window's sides are
            ``config.kept_window``'s.
        scorer: what scores a window, a name in ``scorers.SCORERS``.
        stride: tokens between neighbouring windows; 0 for ``config.window_stride``'s default.
        shared: one window for all frames of a clip, its score the mean over the frames.
        **settings: of the operator, see :class:`Selector`.

    Shapes: grid ``(B, T, H, W, C)`` in, ``(B, T, h, w, C)`` out; ``kept`` is ``(B*T, 4)``: top,
    left, height and width in tokens of the grid that arrived.
    """

    dimension = "SPACE"

    def __init__(
        self,
        channels: int,
        block: int,
        keep,
        scorer: str = "learned",
        stride: int = 0,
        shared: bool = False,
        **settings,
    ):
        super().__init__(SCORERS.get(scorer)("SPACE", channels), block, keep, **settings)
        self.stride = stride
        self.step = max(stride, 1)  # so that windows lie as they will in the end
        self.shared = shared

    def sizes(self, thw: Sequence[int], share: float) -> tuple[int, ...]:
        return kept_window(*thw[1:], share)

    def choose(self, grid: Tensor) -> Choice:
        """Windows ``(B*T, 4)``, and in training weights ``(B*T, windows)``."""
        frames, height, width = grid.shape[1:4]
        window = self.goes_on(grid, widened=not self.taught)
        steps = self._steps(grid, window)
        with full_precision(grid):
            raw = self.scorer(self.seen(grid), window, steps)  # (B*T, rows * columns)
            self.watch(raw)
            raw = raw.unflatten(0, grid.shape[:2])
            if self.shared:
                raw = raw.mean(dim=1, keepdim=True)
            scores = normalize(raw.flatten(0, 1))
            best = self._per_frame(hard_topk(scores.detach(), 1).squeeze(1), frames)  # (B*T,)
            columns = (width - window[1]) // steps[1] + 1
            top = best.div(columns, rounding_mode="floor") * steps[0]
            left = best.remainder(columns) * steps[1]
            if self.taught:  # all passes
                window, top, left = (height, width), torch.zeros_like(top), torch.zeros_like(left)
            sides = [torch.full_like(top, side) for side in window]
            self.kept = kept = torch.stack([top, left, *sides], dim=1)
            weights = None
            if self.soft:
                weights = self._per_frame(self.indicators(scores, 1).squeeze(1), frames)
            return Choice(kept, weights, raw)

    def candidates(self, grid: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """A window's height and width once budgets have shrunk, and the tokens between two."""
        window = self.goes_on(grid, widened=False)
        return window, self._steps(grid, window)

    def take(self, grid: Tensor, choice: Choice) -> Tensor:
        """Applies a choice to ``grid`` ``(B, T, H, W, C)``."""
        window = self.goes_on(grid)
        if choice.weights is not None:
            weights = choice.weights.to(grid.dtype).unflatten(0, grid.shape[:2])
            return _MixWindows.apply(grid, weights, window, self._steps(grid, window))
        batch, frames = grid.shape[:2]
        device = grid.device
        # Four index tensors that broadcast to (B, T, h, w): one copy, whatever the strides.
        clips = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        times = torch.arange(frames, device=device).view(-1, 1, 1)
        top, left = choice.kept[:, :2].view(batch, frames, 2).unbind(2)
        rows = top[:, :, None] + torch.arange(window[0], device=device)  # (B, T, h)
        columns = left[:, :, None] + torch.arange(window[1], device=device)  # (B, T, w)
        return grid[clips, times, rows[..., None], columns[..., None, :]]

    def _steps(self, grid: Tensor, window: tuple[int, int]) -> tuple[int, int]:
        rows, columns = (
            window_stride(size, side, self.stride) for size, side in zip(grid.shape[2:4], window)
        )
        return rows, columns

    def _per_frame(self, choice: Tensor, frames: int) -> Tensor:
        return choice.repeat_interleave(frames, dim=0) if self.shared else choice


class _MixWindows(torch.autograd.Function):
    """``sum_i weights[..., i] * window_i(grid)``, one window after the other into one output.

    Differentiating the plain sum would build a full-size gradient of the grid per window.
    """

    @staticmethod
    def forward(ctx, grid, weights, window, steps):
        # grid (B, T, H, W, C), weights (B, T, rows * columns)
        ctx.save_for_backward(grid, weights)
        ctx.window, ctx.steps = window, steps
        batch, frames, _, _, channels = grid.shape
        mixed = grid.new_zeros(batch, frames, *window, channels)
        for i, (rows, columns) in enumerate(_windows(grid, window, steps)):
            mixed.addcmul_(grid[:, :, rows, columns], weights[:, :, i, None, None, None])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        grid, weights = ctx.saved_tensors
        grad_grid = torch.zeros(grid.shape, dtype=grid.dtype, device=grid.device)
        grad_weights = []
        for i, (rows, columns) in enumerate(_windows(grid, ctx.window, ctx.steps)):
            grad_grid[:, :, rows, columns].addcmul_(grad_output, weights[:, :, i, None, None, None])
            overlap = grid[:, :, rows, columns] * grad_output
            grad_weights.append(overlap.sum(dim=(2, 3, 4), dtype=torch.float32))
        return grad_grid, torch.stack(grad_weights, dim=2).to(weights.dtype), None, None


def _windows(grid: Tensor, window: tuple[int, int], steps: tuple[int, int]):
    """The slices of rows and columns of every window, row by row."""
    (height, width), (side_h, side_w) = grid.shape[2:4], window
    for top in range(0, height - side_h + 1, steps[0]):
        for left in range(0, width - side_w + 1, steps[1]):
            yield slice(top, top + side_h), slice(left, left + side_w)
