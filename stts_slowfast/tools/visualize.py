"""``stts visualize``: which frames and windows of a video were kept, as film strip or as video."""

import argparse
import json
import os
import sys
from dataclasses import dataclass

import torch

from stts_slowfast.tools.cli import add_checkpoint, add_opts
from stts_slowfast.tools.overlay_video import ViewOverlay, center_crop, write_dimmed
from stts_slowfast.video import (
    Video,
    VideoError,
    clip_frames,
    segment_indices,
)
from stts_slowfast.visualization import Window, draw, inspect_clip, make_film_strip_row, predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts visualize``."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of the model")
    parser.add_argument("--video", nargs="+", required=True, metavar="FILE", help="videos to show")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="picture of all videos, or .mp4: the video itself with what was dropped dimmed",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--classes", metavar="FILE", help="names: a line each, or JSON (list, or name: number)"
    )
    parser.add_argument(
        "--views", type=int, default=1, metavar="N", help="clips of a video; 1: its middle"
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Shows clips of every video, as the model sees them in its middle crop.

    A video that cannot be read is named and left out.

    Raises:
        ValueError: where that goes for all of them, or the file to write is there already.
    """
    from stts_slowfast.checkpoints.io import atomic_write, check_output_path
    from stts_slowfast.standalone.checkpointing import load_for_test
    from stts_slowfast.standalone.config import load_config
    from stts_slowfast.standalone.model import build_model

    film = args.out.lower().endswith(".mp4")
    check_output_path(args.out, args.force, args.video)
    if film and len(args.video) > 1:
        raise ValueError(f"{args.out} shows one video: {len(args.video)} are given")
    if args.views < 1:
        raise ValueError(f"--views is {args.views}: give 1 at least")
    cfg = load_config(args.cfg, args.opts)
    names = read_classes(args.classes, cfg.MODEL.NUM_CLASSES) if args.classes else None
    if args.checkpoint:
        cfg.TEST.CHECKPOINT_FILE_PATH = args.checkpoint
    model = build_model(cfg)
    load_for_test(cfg, model)
    strips, shown = [], []
    for path in args.video:
        try:
            views = read_views(cfg, path, args.views)
        except VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        looks = [inspect_clip(cfg, model, view.clip) for view in views]
        mean = torch.stack([each.probs for each in looks]).mean(0)
        for number, (view, each) in enumerate(zip(views, looks)):
            title = f"{os.path.basename(path)}: {predicted(mean, names)}" if not number else ""
            if len(views) > 1:
                of = f"view {number + 1} of {len(views)}: {predicted(each.probs, names)}"
                title = f"{title}     {of}".strip()
            strips.append(make_film_strip_row(cfg, view.clip, each, title))
            shown.append(ViewOverlay(view.indices, len(strips[-1].frames), each.kept, view.crop))
    if not strips:
        raise ValueError("none of the videos could be read")
    if film:
        with Video(args.video[0], rotate=cfg.DATA.ROTATE) as video:
            atomic_write(args.out, lambda path: write_dimmed(path, video, shown), args.force)
        print(strips[0].title)
    else:
        ending = os.path.splitext(args.out)[1][1:].lower() or "png"
        figure = draw(strips)
        atomic_write(
            args.out, lambda path: figure.savefig(path, dpi=120, format=ending), args.force
        )
    print(f"wrote {args.out}")
    return 0


def read_classes(path: str, num_classes: int) -> list[str]:
    """Names of classes by number.

    Raises:
        ValueError: where the file is neither, or has another number of classes.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    if path.endswith(".json"):
        try:
            names = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(names, dict):
            numbers = {str(value): key for key, value in names.items()}  # name: number, or
            numbers = numbers if "0" in numbers else names  # number: name
            names = [numbers.get(str(number)) for number in range(len(numbers))]
    else:
        names = text.splitlines()
    if not isinstance(names, list) or len(names) != num_classes or None in names:
        count = len(names) if isinstance(names, list) else "no"
        raise ValueError(
            f"{path} names {count} classes but MODEL.NUM_CLASSES is {num_classes}: give one name "
            f"for each number 0 .. {num_classes - 1}"
        )
    return [str(name) for name in names]


# ---- clips ----------------------------------------------------------------------------------


@dataclass
class View:
    """A clip (3, T, H, W) float32 as in testing, the video's frames and the part that it shows."""

    clip: torch.Tensor
    indices: list[int]
    crop: Window


def read_clip(cfg, path: str) -> torch.Tensor:
    """The middle clip and crop of a video, (3, T, H, W) float32, as in testing."""
    return read_views(cfg, path, 1)[0].clip


def read_views(cfg, path: str, number: int) -> list[View]:
    """Clips of a video from its first to its last frames, or the middle one; middle crops."""
    from stts_slowfast.standalone.transforms import (
        decode_short_side,
        normalize_clips,
        view_scale,
        view_transform,
    )

    data, ssv2 = cfg.DATA, cfg.TEST.DATASET == "ssv2"
    scale = view_scale(cfg)
    with Video(path, rotate=data.ROTATE) as video:
        if ssv2:  # every view would be the same
            clips = [segment_indices(video.num_frames, data.NUM_FRAMES)]
        else:
            rule = video.num_frames, video.fps, data.NUM_FRAMES, data.SAMPLING_RATE, data.TARGET_FPS
            offset = number == 1 or data.USE_OFFSET_SAMPLING
            clips = [
                video.frames_at(clip_frames(*rule, view, number, offset, video.ticks))
                for view in range(number)
            ]
        wanted = sorted(set().union(*clips))
        frames = video.decode(wanted, decode_short_side(cfg, scale))
    frames = frames.flip(-1) if ssv2 else frames  # its images are read as BGR
    crop = center_crop(*frames.shape[1:3], scale, data.TEST_CROP_SIZE)
    transform = view_transform(cfg, 1)
    views = []
    for indices in clips:
        chosen = frames[[wanted.index(index) for index in indices]]
        views.append(
            View(normalize_clips(transform(chosen.permute(0, 3, 1, 2)), cfg), indices, crop)
        )
    return views
