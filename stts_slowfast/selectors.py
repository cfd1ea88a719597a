"""Temporal and spatial selectors: a token grid in, a smaller token grid out."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stts_slowfast import saliency
from stts_slowfast.call_context import in_backward
from stts_slowfast.config import (
    empty_selection_error,
    interpolate_sizes,
    keep_range,
    kept_frames,
    kept_window,
    window_stride,
)
from stts_slowfast.scorers import SCORERS, minmax_normalize
from stts_slowfast.selector_state import SelectorState
from stts_slowfast.topk import OPERATORS, autocast_disabled, hard_topk
from stts_slowfast.window_sums import mix_windows

# Shares are kept in billionths: torch.compile takes a module's whole numbers for constants, but its
# floats for variables as soon as two selectors differ, and no shape can depend on those.
KEEP_SCALE = 10**9


UNSCHEDULED = (
    "selectors train without a schedule: sigma stays at its first value, and of a range or while "
    "budgets shrink KEEP is kept from the start; before each iteration call step(epoch) of "
    "stts_slowfast.Schedule(model, optimizer, ...), or stts_slowfast.set_progress(model, fraction)"
)


class Selection(NamedTuple):
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


class Selector(SelectorState):
    """What both selectors share: a scorer, the operator's settings, and the last choice.

    A selector works in two steps, so that what rides along with a grid can be selected with it:
    :meth:`select` scores the grid, :meth:`apply` applies the choice. In training a choice is soft,
    in evaluation it is hard; taught by saliency it is hard always, and :meth:`teach` comes between.

    Attributes:
        kept: what the last forward kept, for people who look (``hooks.selections``); nothing that
            is computed reads it.
        sigma: the present noise level; see ``schedule.set_progress``.
        share: low and high end of the share of what arrives that goes on.
        scheduled: whether progress was set (``schedule.set_progress``), or its lack warned about.
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
        super().__init__(sigma)
        self.scorer = scorer
        self.block = block
        self.share = keep_range(keep)
        self.low, self.high = (round(share * KEEP_SCALE) for share in self.share)
        # Where between them; nobody has drawn from a range yet.
        self.sample = 0 if self.low == self.high else None
        self.widening = 0  # how far from there to all that arrives
        self.num_samples = num_samples
        self.gradient = gradient
        self.operator = OPERATORS.get(operator)
        self.teacher = teacher
        self.sigma_decay = sigma_decay
        self.shrink = shrink
        self.scheduled = False
        self.kept: Tensor | None = None

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
            self.sample = round(draw * KEEP_SCALE)
        self.widening = round(wide * KEEP_SCALE)

    def reset(self) -> None:
        """What holds before the first step of a schedule: KEEP (of a range, its high end) at the
        initial sigma."""
        self.sigma = self.initial_sigma
        self.set_budget(1.0)

    def output_size(self, grid: Tensor, widened: bool = True) -> tuple[int, ...]:
        """How many frames, or height and width of the window, go on of ``(B, T, H, W, C)`` now.

        Not ``widened``, how many will when budgets have shrunk.
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
            raise ValueError(empty_selection_error(self.dimension, least, self.block, thw))
        if self.training and self.widening and widened:
            wider = interpolate_sizes(sizes, self.sizes(thw, 1.0), self.widening / KEEP_SCALE)
            step = 1 if self.taught else self.step
            sizes = tuple(a + (b - a) // step * step for a, b in zip(sizes, wider))
        return sizes

    def forward(self, grid: Tensor) -> Tensor:
        choice = self.select(grid)
        return self.apply_selection(self.teach(grid, choice), choice)

    @property
    def soft(self) -> bool:
        """Whether a choice is a mixture now."""
        return self.training and self.teacher != "saliency" and not self.taught

    @property
    def taught(self) -> bool:
        """Whether saliency teaches the scorer now: only if it sees all that could be dropped."""
        return self.training and self.teacher != "mixture" and self.widening == KEEP_SCALE

    def teach(self, grid: Tensor, choice: Selection) -> Tensor:
        """The ``grid`` that arrives, of which the gradient teaches the scores of a choice."""
        if not self.training or self.soft:
            return grid
        lesson = self.candidate_windows(grid) if self.taught else None
        return saliency.teach(grid, choice.scores, lesson)

    def _note(self, kept: Tensor) -> Tensor:
        """Notes what was kept, but not where checkpointing runs an earlier pass again."""
        if not in_backward():
            self.kept = kept
        return kept

    def check_schedule(self) -> None:
        """Warns once if a selector trains and nobody has set its progress.

        Raises:
            ValueError: if saliency shall teach, which needs to know when.
        """
        if self.scheduled or not self.training or not torch.is_grad_enabled():
            return
        if self.teacher != "mixture" and any(True for _ in self.parameters()):
            raise ValueError(
                f"STTS.TEACHER is {self.teacher}, but nobody has set a budget, and saliency "
                "teaches when all tokens pass: before each iteration call step(epoch) of "
                "stts_slowfast.Schedule(model, optimizer, ...), or "
                "stts_slowfast.set_progress(model, fraction)"
            )
        self.scheduled = True
        if self.sample is None:
            self.set_budget(1.0)
        if self.sigma_decay == "constant" and not self.shrink and self.low == self.high:
            return
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime  # runs as the graph is made

            comptime(lambda _: warnings.warn(UNSCHEDULED, stacklevel=1))
        elif not torch.jit.is_tracing():
            warnings.warn(UNSCHEDULED, stacklevel=1)

    def seen(self, grid: Tensor) -> Tensor:
        """What the scorer scores. A lesson of saliency is the scorer's, not the backbone's."""
        return grid.detach() if self.training and not self.soft else grid

    def soft_topk(self, scores: Tensor, k: int) -> Tensor:
        """Soft choice ``(N, k, d)`` of the top ``k`` of normalised ``scores`` ``(N, d)``."""
        sigma = self._sigma_tensor.to(scores.device)
        return self.operator(scores, k, sigma, self.num_samples, self.gradient)

    @property
    def share_text(self) -> str:
        """The share in words."""
        return " to ".join(f"{share:g}" for share in dict.fromkeys(self.share))

    def extra_repr(self) -> str:
        return f"block={self.block}, keep={self.share_text}"


class Selectors(nn.Module):
    """A model's selectors by their keys, in the order in which they run: ``model.stts``.

    It is read as a dict is. It is no ``nn.ModuleDict`` since peft refuses to save one beside an
    adapter (``modules_to_save=["stts"]``).

    Attributes:
        settings: what was asked for, ``config.Settings``.
        calls: ``calls.Calls`` of the model; None if grids travel in the blocks' calls.
        hooks: those on the model's blocks, by number, for graphs that torch.fx traces.
        reached: the grid behind the last pass's selections, for ``dense.positions``.
    """

    def __init__(self, settings=None):
        super().__init__()
        self.settings = settings
        self.calls, self.hooks, self.reached = None, {}, None

    def __setitem__(self, key: str, selector: Selector) -> None:
        self.add_module(key, selector)

    def __getitem__(self, key: str) -> Selector:
        return self._modules[key]

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def __iter__(self):
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self):
        return self._modules.keys()

    def values(self):
        return self._modules.values()

    def items(self):
        return self._modules.items()


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

    def select(self, grid: Tensor) -> Selection:
        """Indices ``(B, k)``, and in training weights ``(B, k, T)``."""
        self.check_schedule()
        (k,) = self.output_size(grid)
        with autocast_disabled(grid):
            raw = self.scorer(self.seen(grid), self.output_size(grid, widened=not self.taught)[0])
            scores = minmax_normalize(raw)
            self.check_finite(scores)
            kept = self._note(hard_topk(scores.detach(), k))
            return Selection(kept, self.soft_topk(scores, k) if self.soft else None, raw[..., None])

    def candidate_windows(self, grid: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Whole frames: a window's height and width, and the tokens between two."""
        return tuple(grid.shape[2:4]), tuple(grid.shape[2:4])

    def apply_selection(self, frames: Tensor, choice: Selection) -> Tensor:
        """Applies a choice to ``frames`` ``(B, T, ...)``."""
        if choice.weights is not None:
            with autocast_disabled(frames):
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

    def select(self, grid: Tensor) -> Selection:
        """Windows ``(B*T, 4)``, and in training weights ``(B*T, windows)``."""
        self.check_schedule()
        frames, height, width = grid.shape[1:4]
        window = self.output_size(grid, widened=not self.taught)
        steps = self._steps(grid, window)
        with autocast_disabled(grid):
            raw = self.scorer(self.seen(grid), window, steps)  # (B*T, rows * columns)
            raw = raw.unflatten(0, grid.shape[:2])
            if self.shared:
                raw = raw.mean(dim=1, keepdim=True)
            scores = minmax_normalize(raw.flatten(0, 1))
            self.check_finite(scores)
            best = self._per_frame(hard_topk(scores.detach(), 1).squeeze(1), frames)  # (B*T,)
            columns = (width - window[1]) // steps[1] + 1
            top = best.div(columns, rounding_mode="floor") * steps[0]
            left = best.remainder(columns) * steps[1]
            if self.taught:  # all passes
                window, top, left = (height, width), torch.zeros_like(top), torch.zeros_like(left)
            sides = [torch.full_like(top, side) for side in window]
            kept = self._note(torch.stack([top, left, *sides], dim=1))
            weights = None
            if self.soft:
                weights = self._per_frame(self.soft_topk(scores, 1).squeeze(1), frames)
            return Selection(kept, weights, raw)

    def candidate_windows(self, grid: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """A window's height and width once budgets have shrunk, and the tokens between two."""
        window = self.output_size(grid, widened=False)
        return window, self._steps(grid, window)

    def apply_selection(self, grid: Tensor, choice: Selection) -> Tensor:
        """Applies a choice to ``grid`` ``(B, T, H, W, C)``."""
        window = self.output_size(grid)
        if choice.weights is not None:
            weights = choice.weights.to(grid.dtype).unflatten(0, grid.shape[:2])
            return mix_windows(grid, weights, window, self._steps(grid, window))
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
