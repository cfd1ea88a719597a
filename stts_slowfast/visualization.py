"""Film strips: the frames, windows and tokens of a clip that a model keeps, as a figure."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stts_slowfast import backbones
from stts_slowfast.budgets import Sizes
from stts_slowfast.config import selection_plan
from stts_slowfast.grid import Grid
from stts_slowfast.hooks import selections
from stts_slowfast.scorers import minmax_normalize
from stts_slowfast.selectors import TemporalSelector

# Top, left, height and width as shares of the frame.
Box = tuple[float, float, float, float]
FULL_FRAME: Box = (0.0, 0.0, 1.0, 1.0)
Classify = Callable[[Tensor], Tensor]
TOP_CLASSES = 3  # in a title
DIM = 0.25  # opacity of what was dropped


class KeptRegions(NamedTuple):
    """What all selectors keep of a clip.

    Attributes:
        windows: the frames of tokens of which something is kept, with the kept window of each.
        tokens: (T, H, W) bool, the kept ones, if single tokens were selected.
    """

    windows: dict[int, Box]
    tokens: Tensor | None = None

    def boxes(self, frame: int) -> list[Box]:
        """The kept window of a frame of tokens, or a box for each kept token of it."""
        if self.tokens is not None:
            return token_boxes(self.tokens[frame])
        return [self.windows[frame]] if frame in self.windows else []


@dataclass
class FilmStripRow:
    """A row of the figure.

    Attributes:
        title: text above it.
        frames: (T, H, W, 3) uint8, one picture for each frame of tokens.
        kept: what all selectors kept.
        marked: frames to mark, such as those that show the class.
        scores: of the frames, in 0..1, if frames were scored.
    """

    title: str
    frames: Tensor
    kept: KeptRegions
    marked: Sequence[int] = field(default_factory=tuple)
    scores: Sequence[float] | None = None


@dataclass
class Inspection:
    """A model's output for a clip: probabilities (classes,), what it keeps, and the frames' scores
    in 0..1 if it scores them."""

    probs: Tensor
    kept: KeptRegions
    scores: list[float] | None


@torch.no_grad()
def inspect_clip(
    cfg, model: nn.Module, clip: Tensor, classify: Classify | None = None
) -> Inspection:
    """Runs a model, in evaluation, on a clip (3, T, H, W).

    Args:
        classify: from clips (1, 3, T, H, W) to probabilities (1, classes); by default the softmax
            of the logits.
    """
    clips = clip[None].to(next(model.parameters()).device)
    model.eval()
    with _frame_scores(model) as scores:
        probs = (classify(clips) if classify else model(clips).softmax(1))[0].float().cpu()
    kept = kept_regions(cfg, selections(model) if cfg.STTS.ENABLE else {})
    return Inspection(probs, kept, scores[0] if scores else None)


@contextmanager
def _frame_scores(model: nn.Module) -> Iterator[list[list[float]]]:
    """Collects the scores of a clip's frames from the first selector of frames."""
    scores: list[list[float]] = []
    first = next((m for m in model.modules() if isinstance(m, TemporalSelector)), None)
    if first is None:
        yield scores
        return

    def record(scorer, args, output):
        scores.append(minmax_normalize(output.float())[0].tolist())

    handle = first.scorer.register_forward_hook(record)
    try:
        yield scores
    finally:
        handle.remove()


def make_film_strip_row(
    cfg, clip: Tensor, what: Inspection, title: str, marked: Sequence[int] = ()
) -> FilmStripRow:
    """The row of a clip (3, T, H, W)."""
    num_frames = backbones.block_grids(cfg)[0][0]
    # A frame of tokens is shown by the middle one of its frames of pixels.
    middles = (torch.arange(num_frames) * 2 + 1) * clip.shape[1] // (2 * num_frames)
    pictures = to_pictures(cfg, clip[:, middles])
    return FilmStripRow(title, pictures, what.kept, marked, what.scores)


def kept_regions(cfg, kept: dict[str, Tensor], item: int = 0) -> KeptRegions:
    """What all selectors keep of a clip.

    Args:
        kept: from ``selections(model)``; empty for all frames.
        item: index of the clip in the batch.
    """
    grids = backbones.block_grids(cfg)
    windows = dict.fromkeys(range(grids[0][0]), FULL_FRAME)
    if not kept:
        return KeptRegions(windows)
    for key, ((frames, height, width), _) in selection_plan(cfg.STTS, grids).items():
        if key.startswith("time"):
            arrived = list(windows.items())
            windows = dict(arrived[index] for index in kept[key][item].tolist())
        elif key.startswith("space"):
            parts = kept[key].view(-1, frames, 4)[item].tolist()
            windows = {
                frame: _inside(window, part, height, width)
                for (frame, window), part in zip(windows.items(), parts)
            }
    if not any(key.startswith("tokens") for key in kept):
        return KeptRegions(windows)
    tokens = _mark_tokens(grids[0], kept, item)  # so in all blocks: these models do not pool
    return KeptRegions({frame: w for frame, w in windows.items() if tokens[frame].any()}, tokens)


def _mark_tokens(sizes: Sizes, kept: dict[str, Tensor], item: int) -> Tensor:
    """Which tokens of a clip with a grid of ``sizes`` all selectors keep: (T, H, W) bool."""
    grid = Grid(sizes)
    for key, value in kept.items():
        if key.startswith("time"):
            grid = grid.keep_frames(value[item : item + 1].cpu())
        elif key.startswith("space"):
            windows = value.view(-1, grid[0], 4)[item].cpu()
            grid = grid.crop(windows, (int(windows[0, 2]), int(windows[0, 3])))
        elif value.shape[1] < math.prod(grid):
            grid = grid.keep_tokens(value[item : item + 1].cpu())
    marks = torch.zeros(math.prod(sizes), dtype=torch.bool)
    marks[grid.positions(1)[0]] = True
    return marks.view(sizes)


def token_boxes(tokens: Tensor) -> list[Box]:
    """The boxes of the kept tokens (H, W) of a frame."""
    height, width = tokens.shape
    return [
        (row / height, column / width, 1 / height, 1 / width)
        for row, column in tokens.nonzero().tolist()
    ]


def _inside(region: Box, window: Sequence[int], height: int, width: int) -> Box:
    """The part of ``region`` in a window, given in tokens of a height x width grid of it."""
    top, left, full_height, full_width = region
    return (
        top + full_height * window[0] / height,
        left + full_width * window[1] / width,
        full_height * window[2] / height,
        full_width * window[3] / width,
    )


def to_pictures(cfg, clip: Tensor) -> Tensor:
    """Undoes the normalisation: (3, T, H, W) float -> (T, H, W, 3) uint8, RGB."""
    is_bgr = cfg.DATA.REVERSE_INPUT_CHANNEL ^ (cfg.TEST.DATASET == "ssv2")
    clip = clip.flip(0) if is_bgr else clip
    mean, std = (torch.tensor(value).view(-1, 1, 1, 1) for value in (cfg.DATA.MEAN, cfg.DATA.STD))
    return (clip * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 3, 0)


def predicted(probs: Tensor, names: Sequence[str] | None) -> str:
    """The most probable classes as text."""
    best = probs.topk(min(TOP_CLASSES, len(probs)))
    return ", ".join(
        f"{names[number] if names else f'class {number}'} {share:.0%}"
        for share, number in zip(best.values.tolist(), best.indices.tolist())
    )


# ---- drawing --------------------------------------------------------------------------------


def draw(strips: Sequence[FilmStripRow]):
    """The matplotlib ``Figure``: kept frames with a green border and their window, what was dropped
    dim."""
    from matplotlib.figure import Figure

    columns = max(len(strip.frames) for strip in strips)
    figure = Figure(figsize=(1.3 * columns, 1.75 * len(strips)), layout="constrained", dpi=120)
    rows = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for row, strip in zip(rows, strips):
        title = row.suptitle(_printable(strip.title), fontsize=9, x=0.01, ha="left")
        title.set_parse_math(False)  # file names may have dollar signs
        axes, bars = row.subplots(2, columns, squeeze=False, height_ratios=[10, 1])
        for number, (axis, bar) in enumerate(zip(axes, bars)):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(number < len(strip.frames))
            bar.set_axis_off()
            if number < len(strip.frames):
                _draw_frame(axis, strip, number)
                if strip.scores is not None:
                    bar.barh(0, 1, color="0.9")
                    bar.barh(0, strip.scores[number], color="tab:blue")
                    bar.set_xlim(0, 1)
    legend = "green: frame kept (dim: dropped)     red: window kept"
    if any(strip.kept.tokens is not None for strip in strips):
        legend = "green: frame with kept tokens     full colour: tokens kept (pale: dropped)"
    if any(strip.scores is not None for strip in strips):
        legend += "     blue: score of the frame"
    if any(strip.marked for strip in strips):
        legend += "     \N{BLACK UP-POINTING TRIANGLE}: shows the class"
    figure.supxlabel(legend, fontsize=8)
    return figure


def _draw_frame(axis, strip: FilmStripRow, number: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = strip.frames.shape[1:3]
    window, tokens = strip.kept.windows.get(number), strip.kept.tokens
    picture = strip.frames[number].numpy()
    if tokens is None:
        axis.imshow(picture, alpha=1.0 if window else DIM)
    else:
        axis.imshow(dim_tokens(picture, tokens[number]))
    for spine in axis.spines.values():
        spine.set(color="tab:green" if window else "0.8", linewidth=3 if window else 0.5)
    if window and window != FULL_FRAME:
        top, left, tall, wide = window
        corner, size = (left * width - 0.5, top * height - 0.5), (wide * width, tall * height)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=4))
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:red", linewidth=2))
    label = f"{number} \N{BLACK UP-POINTING TRIANGLE}" if number in strip.marked else f"{number}"
    axis.set_xlabel(label, fontsize=7, labelpad=2)


def dim_tokens(picture: np.ndarray, tokens: Tensor) -> np.ndarray:
    """A picture (H, W, 3) uint8 on white, transparent but for the kept tokens (rows, columns)."""
    height, width = picture.shape[:2]
    bright = np.zeros((height, width, 1), bool)
    for top, left, tall, wide in token_boxes(tokens):
        rows = slice(round(top * height), round((top + tall) * height))
        bright[rows, round(left * width) : round((left + wide) * width)] = True
    return np.where(bright, picture, (255 - DIM * (255.0 - picture)).astype(np.uint8))


def _printable(text: str) -> str:
    """Text without line breaks and invalid bytes, which file names may have."""
    text = text.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def film_strip_figure(
    cfg, model: nn.Module, clips: Sequence[Tensor], classify: Classify | None = None
):
    """The figure of validation clips (3, T, H, W), for TensorBoard."""
    strips = []
    for clip in clips:
        seen = inspect_clip(cfg, model, clip, classify)
        strips.append(make_film_strip_row(cfg, clip.cpu(), seen, predicted(seen.probs, None)))
    return draw(strips)
