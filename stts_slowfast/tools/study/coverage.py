"""What a model keeps of a test list: frames, positions, and the share of what shows the class."""

import os
from collections.abc import Iterable

import numpy as np
from torch import Tensor, nn

from stts_slowfast import backbones, selections
from stts_slowfast.standalone.annotations import VideoList
from stts_slowfast.standalone.data import UNREADABLE
from stts_slowfast.tools.demo import make_data
from stts_slowfast.visualization import Box, KeptRegions, kept_regions


class CoverageStats:
    """Sums up which frames and positions of the grid before a config's first block are kept.

    Called as an evaluator's callback, it counts the clips of each batch.

    Attributes:
        frames: (T,) how many clips kept each frame of tokens.
        tokens: (H, W) how many kept frames have each token in their window, or keep it.
        clips: how many clips were counted.
        num_true: frames of tokens that show the class; num_hit: how many of them were kept.
        box_share: sum over those frames of the kept share of the box.
    """

    def __init__(self, cfg, videos: VideoList):
        self.cfg, self.videos, self.truth = cfg, videos, find_truth(cfg)
        num_frames, height, width = backbones.block_grids(cfg)[0]
        self.frames, self.tokens = np.zeros(num_frames), np.zeros((height, width))
        self.clips = self.num_true = self.num_hit = 0
        self.box_share = 0.0

    def __call__(self, split: str, model: nn.Module, batch: tuple[Tensor, ...]) -> None:
        _, labels, numbers, _ = batch
        kept = selections(model) if self.cfg.STTS.ENABLE else {}
        for item, (label, number) in enumerate(zip(labels.tolist(), numbers.tolist())):
            if label != UNREADABLE:
                name = os.path.basename(self.videos[number].path)
                self.add(kept_regions(self.cfg, kept, item), name)

    def add(self, regions: KeptRegions, name: str) -> None:
        """Counts what is kept of a clip of the video ``name``."""
        self.clips += 1
        for frame in regions.windows:
            self.frames[frame] += 1
            for top, left, height, width in regions.boxes(frame):
                rows, columns = (
                    slice(round(first * size), round((first + side) * size))
                    for first, side, size in zip((top, left), (height, width), self.tokens.shape)
                )
                self.tokens[rows, columns] += 1
        if name not in self.truth:
            return
        for frame, box in true_boxes(self.cfg, self.truth[name]).items():
            self.num_true += 1
            self.num_hit += frame in regions.windows
            self.box_share += sum(share_inside(box, part) for part in regions.boxes(frame))

    def summary(self) -> dict:
        """Shares in 0..1; recalls are None if the truth is not known."""
        recall = {"frame_recall": None, "box_recall": None}
        if self.num_true:
            recall["frame_recall"] = round(self.num_hit / self.num_true, 4)
            recall["box_recall"] = round(self.box_share / self.num_true, 4)
        return {
            **recall,
            "frames_kept": (self.frames / self.clips).round(4).tolist(),
            "tokens_kept": (self.tokens / self.frames.sum()).round(4).tolist(),
        }


def find_truth(cfg) -> dict[str, make_data.Truth]:
    """The truth beside videos of ``stts make-data``; {} if a clip is not a whole video."""
    folder = cfg.DATA.PATH_TO_DATA_DIR
    whole = cfg.TEST.NUM_ENSEMBLE_VIEWS == cfg.TEST.NUM_SPATIAL_CROPS == 1
    if not whole or not os.path.isfile(os.path.join(folder, "truth.json")):
        return {}
    return make_data.read_truth(folder)


def true_boxes(cfg, truth: make_data.Truth) -> dict[int, Box]:
    """What shows the class in each frame of tokens: frame -> box, in shares of the frame."""
    num_frames = backbones.block_grids(cfg)[0][0]
    step = cfg.DATA.SAMPLING_RATE * cfg.DATA.NUM_FRAMES // num_frames
    boxes: dict[int, Box] = {}
    for frame, box in zip(truth.frames, truth.boxes):
        top, left, height, width = (size / cfg.DATA.TEST_CROP_SIZE for size in box)
        boxes.setdefault(frame // step, (top, left, height, width))
    return boxes


def share_inside(box: Iterable[float], region: Iterable[float]) -> float:
    """The share of a box inside a region; both are (top, left, height, width)."""
    box, region = [*box], [*region]
    share = 1.0
    for first, size, start, length in zip(box[:2], box[2:], region[:2], region[2:]):
        overlap = min(first + size, start + length) - max(first, start)
        share *= max(overlap, 0.0) / size
    return share
