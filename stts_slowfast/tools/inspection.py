"""A trained model, the clips of a video as testing reads them, and film strips of test videos."""

import math
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from stts_slowfast.checkpoints.io import read_checkpoint
from stts_slowfast.standalone.checkpointing import load_for_test
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.transforms import (
    UniformCrop,
    decode_short_side,
    make_test_views,
    normalize_clips,
    view_scale,
)
from stts_slowfast.tools.study.coverage import find_truth, true_boxes
from stts_slowfast.video import Video, clip_frames, segment_indices
from stts_slowfast.visualization import Box, draw, inspect_clip, make_film_strip_row, predicted

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_trained_model(cfg) -> nn.Module:
    """The model of a config with the weights that a test takes, on the CPU."""
    model = build_model(cfg)
    load_for_test(cfg, model)
    return model


def stored_config(checkpoint: str):
    """The config stored in a checkpoint of either engine, to test that checkpoint on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        with open(path, "w") as file:
            file.write(read_checkpoint(checkpoint)["cfg"])
        return load_config(path, ["TEST.CHECKPOINT_FILE_PATH", checkpoint, "NUM_GPUS", 0])


@dataclass
class View:
    """A clip of a video.

    Attributes:
        clip: (3, T, H, W) float32, normalised as in testing.
        indices: the video's frames that the clip is of, ascending.
        crop: the part of the video's frame that the clip shows.
    """

    clip: Tensor
    indices: list[int]
    crop: Box


def read_clip(cfg, path: str) -> Tensor:
    """The middle clip and crop of a video, (3, T, H, W) float32, as in testing."""
    return read_views(cfg, path, 1)[0].clip


def read_views(cfg, path: str, number: int) -> list[View]:
    """The centre crops of ``number`` clips of a video, from its first to its last frames; the
    middle clip if ``number`` is 1."""
    data, is_ssv2 = cfg.DATA, cfg.TEST.DATASET.lower() == "ssv2"
    crop = UniformCrop(view_scale(cfg), data.TEST_CROP_SIZE, position=1)
    with Video(path, rotate=data.ROTATE) as video:
        if is_ssv2:  # every clip would be the same
            clips = [segment_indices(video.num_frames, data.NUM_FRAMES)]
        else:
            rule = video.num_frames, video.fps, data.NUM_FRAMES, data.SAMPLING_RATE, data.TARGET_FPS
            offset = number == 1 or data.USE_OFFSET_SAMPLING
            clips = [
                video.frames_at(clip_frames(*rule, view, number, offset, video.ticks))
                for view in range(number)
            ]
        wanted = sorted(set().union(*clips))
        images = list(video.iter_frames(wanted, decode_short_side(cfg, crop.scale)))
    height, width = images[0].shape[:2]
    if is_ssv2:
        images = [image[..., ::-1] for image in images]  # SlowFast reads SSv2's images as BGR
    positions = [[wanted.index(index) for index in indices] for indices in clips]
    views = normalize_clips(make_test_views(cfg, images, positions, [crop]), cfg)
    window = crop_window(height, width, crop.scale, crop.size)
    return [View(clip, indices, window) for clip, indices in zip(views, clips)]


def crop_window(height: int, width: int, scale: int, size: int) -> Box:
    """The square of ``size`` in the middle of a frame whose short side is scaled to ``scale``."""
    short = min(height, width)
    scaled_height, scaled_width = (math.floor(side * scale / short) for side in (height, width))
    top, left = math.ceil((scaled_height - size) / 2), math.ceil((scaled_width - size) / 2)
    return top / scaled_height, left / scaled_width, size / scaled_height, size / scaled_width


def draw_test_videos(cfg, model: nn.Module, number: int) -> "Figure":
    """Film strips of the first ``number`` test videos; frames that show the class are marked if
    the truth is known."""
    videos, truth = ClipDataset(cfg, "test").videos, find_truth(cfg)
    rows = []
    for index in range(min(number, len(videos))):
        path, label = videos[index].path, videos[index].label
        clip, name = read_clip(cfg, path), os.path.basename(path)
        seen = inspect_clip(cfg, model, clip)
        title = f"{name}, class {label}: {predicted(seen.probs, None)}"
        marked = sorted(true_boxes(cfg, truth[name])) if name in truth else ()
        rows.append(make_film_strip_row(cfg, clip, seen, title, marked))
    return draw(rows)
