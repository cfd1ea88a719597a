"""``stts visualize``: the frames, windows and tokens kept of a video, as film strip or video."""

import argparse
import json
import os
import sys

import torch

from stts_slowfast.checkpoints.io import atomic_write, check_output_path
from stts_slowfast.tools.cli import add_checkpoint, add_config, add_force, add_opts, read_config
from stts_slowfast.tools.inspection import load_trained_model, read_views
from stts_slowfast.tools.overlay_video import ViewOverlay, write_dimmed
from stts_slowfast.video import Video, VideoError
from stts_slowfast.visualization import draw, inspect_clip, make_film_strip_row, predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts visualize``."""
    add_config(parser)
    parser.add_argument("--video", nargs="+", required=True, metavar="FILE", help="videos to show")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="picture of all videos, or .mp4: the video itself with what was dropped dimmed",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--classes", metavar="FILE", help="names: one per line, or JSON (list, or name: number)"
    )
    parser.add_argument(
        "--views", type=int, default=1, metavar="N", help="clips of a video (default: the middle)"
    )
    add_force(parser)
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Shows clips of every video, as the model sees them in its middle crop.

    A video that cannot be read is named and left out.

    Raises:
        ValueError: if none of them can be read, or the file to write exists already.
    """
    as_video = args.out.lower().endswith(".mp4")
    check_output_path(args.out, args.force, args.video)
    if as_video and len(args.video) > 1:
        raise ValueError(f"{args.out} shows one video: {len(args.video)} are given")
    if args.views < 1:
        raise ValueError(f"--views is {args.views}: give 1 at least")
    cfg = read_config(args)
    names = read_classes(args.classes, cfg.MODEL.NUM_CLASSES) if args.classes else None
    model = load_trained_model(cfg)
    rows, overlays = [], []
    for path in args.video:
        try:
            views = read_views(cfg, path, args.views)
        except VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        inspections = [inspect_clip(cfg, model, view.clip) for view in views]
        mean = torch.stack([inspection.probs for inspection in inspections]).mean(0)
        for number, (view, inspection) in enumerate(zip(views, inspections)):
            title = f"{os.path.basename(path)}: {predicted(mean, names)}" if not number else ""
            if len(views) > 1:
                of_view = f"view {number + 1} of {len(views)}: {predicted(inspection.probs, names)}"
                title = f"{title}     {of_view}".strip()
            rows.append(make_film_strip_row(cfg, view.clip, inspection, title))
            overlays.append(ViewOverlay(view, len(rows[-1].frames), inspection.kept))
    if not rows:
        raise ValueError("none of the videos could be read")
    if as_video:
        with Video(args.video[0], rotate=cfg.DATA.ROTATE) as video:
            atomic_write(args.out, lambda path: write_dimmed(path, video, overlays), args.force)
        print(rows[0].title)
    else:
        figure, kind = draw(rows), os.path.splitext(args.out)[1][1:].lower() or "png"
        atomic_write(args.out, lambda path: figure.savefig(path, dpi=120, format=kind), args.force)
    print(f"wrote {args.out}")
    return 0


def read_classes(path: str, num_classes: int) -> list[str]:
    """Names of classes by number.

    Raises:
        ValueError: if the file is neither lines nor JSON, or has another number of classes.
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
