"""``stts visualize``: a film strip of a video that shows which frames and windows were kept."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from stts_slowfast import backbones
from stts_slowfast.config import plan
from stts_slowfast.hooks import selections
from stts_slowfast.tools.cli import add_opts
from stts_slowfast.video import (
    Video,
    VideoError,
    clip_size,
    clip_span,
    frame_indices,
    segment_indices,
)

# Top, left, height and width as shares of the frame.
Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)


@dataclass
class Strip:
    """A row of the picture.

    Attributes:
        title: what stands above it.
        frames: (T, H, W, 3) uint8, one picture for each frame of tokens.
        kept: the frames that all selectors kept, and of each the window that went on.
        marked: frames to point at, such as those that show the class.
    """

    title: str
    frames: torch.Tensor
    kept: dict[int, Window]
    marked: Sequence[int] = field(default_factory=tuple)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts visualize``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--video", nargs="+", required=True, metavar="FILE", help="videos to show")
    parser.add_argument("--out", required=True, metavar="PNG", help="picture to write")
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights; else TEST.CHECKPOINT_FILE_PATH, else the last in OUTPUT_DIR",
    )
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Draws the middle clip of every video, as the model sees it.

    A video that cannot be read is named and left out.

    Raises:
        ValueError: where that goes for all of them.
    """
    from stts_slowfast.standalone.defaults import load_config
    from stts_slowfast.standalone.model import build_model
    from stts_slowfast.standalone.resume import load_for_test

    cfg = load_config(args.cfg, args.opts)
    if args.checkpoint:
        cfg.TEST.CHECKPOINT_FILE_PATH = args.checkpoint
    model = build_model(cfg)
    load_for_test(cfg, model)
    strips = []
    for path in args.video:
        try:
            clip = read_clip(cfg, path)
        except VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        probs = predict(model, clip)
        title = f"{os.path.basename(path)}: class {int(probs.argmax())} ({probs.max():.0%})"
        strips.append(make_strip(cfg, model, clip, title))
    if not strips:
        raise ValueError("none of the videos could be read")
    draw(strips, args.out)
    print(f"wrote {args.out}")
    return 0


def read_clip(cfg, path: str) -> torch.Tensor:
    """The middle clip and crop of a video, (3, T, H, W) float32, as in testing."""
    from stts_slowfast.standalone.transforms import prepare, view_scale, view_transform

    with Video(path) as video:
        if cfg.TEST.DATASET == "ssv2":
            indices = segment_indices(video.num_frames, cfg.DATA.NUM_FRAMES)
        else:
            data = cfg.DATA
            size = clip_size(data.NUM_FRAMES, data.SAMPLING_RATE, video.fps, data.TARGET_FPS)
            start, end = clip_span(video.num_frames, size, 0, 1, use_offset=True)
            indices = frame_indices(start, end, data.NUM_FRAMES, video.num_frames)
        frames = video.decode(indices, view_scale(cfg))
    if cfg.TEST.DATASET == "ssv2":
        frames = frames.flip(-1)  # its images are read as BGR
    return prepare(view_transform(cfg, 1)(frames.permute(0, 3, 1, 2)), cfg)


@torch.no_grad()
def predict(model: torch.nn.Module, clip: torch.Tensor) -> torch.Tensor:
    """Probabilities (num_classes,) of one clip; ``selections(model)`` is then about this clip."""
    device = next(model.parameters()).device
    return model.eval()(clip[None].to(device)).softmax(1)[0].cpu()


def make_strip(
    cfg, model: torch.nn.Module, clip: torch.Tensor, title: str, marked: Sequence[int] = ()
) -> Strip:
    """The row of a clip (3, T, H, W), the last that the model has run on, alone in its batch."""
    num_frames = backbones.block_grids(cfg)[0][0]
    # The picture of a frame of tokens is the middle one of the frames of pixels that it is of.
    middles = (torch.arange(num_frames) * 2 + 1) * clip.shape[1] // (2 * num_frames)
    if cfg.STTS.ENABLE:
        kept = kept_regions(cfg, selections(model))
    else:
        kept = dict.fromkeys(range(num_frames), WHOLE)
    return Strip(title, to_pictures(cfg, clip[:, middles]), kept, marked)


def kept_regions(cfg, kept: dict[str, torch.Tensor], item: int = 0) -> dict[int, Window]:
    """What is left of a clip after all selectors: frame -> window.

    Args:
        kept: what ``selections(model)`` returns.
        item: the clip of the batch.
    """
    grids = backbones.block_grids(cfg)
    regions = dict.fromkeys(range(grids[0][0]), WHOLE)
    for key, ((frames, height, width), _) in plan(cfg.STTS, grids).items():
        if key.startswith("time"):
            arrived = list(regions.items())
            regions = dict(arrived[index] for index in kept[key][item].tolist())
        else:
            windows = kept[key].view(-1, frames, 4)[item].tolist()
            regions = {
                frame: _inside(region, window, height, width)
                for (frame, region), window in zip(regions.items(), windows)
            }
    return regions


def _inside(region: Window, window: Sequence[int], height: int, width: int) -> Window:
    """The part of ``region`` that a window, in tokens of a height x width grid, takes of it."""
    top, left, full_height, full_width = region
    return (
        top + full_height * window[0] / height,
        left + full_width * window[1] / width,
        full_height * window[2] / height,
        full_width * window[3] / width,
    )


def to_pictures(cfg, clip: torch.Tensor) -> torch.Tensor:
    """Undoes the normalisation: (3, T, H, W) float -> (T, H, W, 3) uint8, RGB."""
    is_bgr = cfg.DATA.REVERSE_INPUT_CHANNEL ^ (cfg.TEST.DATASET == "ssv2")
    clip = clip.flip(0) if is_bgr else clip
    mean, std = (torch.tensor(value).view(3, 1, 1, 1) for value in (cfg.DATA.MEAN, cfg.DATA.STD))
    return (clip * std + mean).mul(255).round().clamp(0, 255).byte().permute(1, 2, 3, 0)


def draw(strips: Sequence[Strip], path: str) -> None:
    """Writes the picture: kept frames framed in green with their window, dropped ones dim."""
    from matplotlib.figure import Figure

    columns = max(len(strip.frames) for strip in strips)
    figure = Figure(figsize=(1.3 * columns, 1.65 * len(strips)), layout="constrained")
    rows = figure.subfigures(len(strips), 1, squeeze=False)[:, 0]
    for row, strip in zip(rows, strips):
        row.suptitle(strip.title, fontsize=9, x=0.01, ha="left")
        axes = row.subplots(1, columns, squeeze=False)[0]
        for number, axis in enumerate(axes):
            axis.set(xticks=[], yticks=[])
            axis.set_frame_on(number < len(strip.frames))
            if number < len(strip.frames):
                _draw_frame(axis, strip, number)
    legend = "green: frame kept (dim: dropped)     red: window that went on"
    if any(strip.marked for strip in strips):
        legend += "     \N{BLACK UP-POINTING TRIANGLE}: shows the class"
    figure.supxlabel(legend, fontsize=8)
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_frame(axis, strip: Strip, number: int) -> None:
    from matplotlib.patches import Rectangle

    height, width = strip.frames.shape[1:3]
    window = strip.kept.get(number)
    axis.imshow(strip.frames[number].numpy(), alpha=1.0 if window else 0.25)
    for spine in axis.spines.values():
        spine.set(color="tab:green" if window else "0.8", linewidth=3 if window else 0.5)
    if window and window != WHOLE:
        top, left, tall, wide = window
        corner, size = (left * width - 0.5, top * height - 0.5), (wide * width, tall * height)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=4))
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="tab:red", linewidth=2))
    label = f"{number} \N{BLACK UP-POINTING TRIANGLE}" if number in strip.marked else f"{number}"
    axis.set_xlabel(label, fontsize=7, labelpad=2)
