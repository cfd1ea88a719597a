"""A model over a test list: accuracy, speed, agreement between views, and which places it keeps."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from stts_slowfast import backbones, selections
from stts_slowfast.standalone.data import UNREADABLE, build_loader
from stts_slowfast.standalone.evaluator import Evaluator
from stts_slowfast.tools.demo import make_data
from stts_slowfast.visualization import FULL_FRAME, kept_regions

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # clips, labels, video_index, view_index
CACHE_BYTES = 2**30


class TestClips:
    """The batches of a config's test list; what fits in memory is read once.

    A whole pass raises ``ValueError`` for videos that cannot be read, as ``stts run`` does, unless
    TEST.ALLOW_MISSING.
    """

    def __init__(self, cfg):
        self.allow_missing = cfg.TEST.ALLOW_MISSING
        self.loader = build_loader(cfg, "test")
        self.dataset = self.loader.dataset
        self.videos = self.dataset.videos
        self.cached: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.cached is not None:
            yield from self.cached
            return
        batches, size = [], 0
        for batch in self.loader:
            size += batch[0].nbytes
            if size <= CACHE_BYTES:
                batches.append(batch)
            yield batch
        self.loader.bad.require_all(self.allow_missing)
        self.cached = batches if size <= CACHE_BYTES else None

    def count(self) -> dict[str, int]:
        """How many videos are ``unreadable`` and ``damaged``, after a whole pass."""
        return self.loader.bad.count()


@dataclass
class CoverageStats:
    """Sums up which places of a clip go on.

    Attributes:
        frames: (T,) how many clips kept each frame of tokens.
        tokens: (H, W) how many kept frames have each token in their window.
        shown, found: frames of tokens that show the class, and how many of them were kept.
        inside: share of each of those frames' box that went on, summed up.
        clips: how many there were.
    """

    frames: np.ndarray
    tokens: np.ndarray
    clips: int = 0
    shown: int = 0
    found: int = 0
    inside: float = 0.0
    truth: dict[str, make_data.Truth] = field(default_factory=dict)

    @classmethod
    def of(cls, cfg) -> "CoverageStats":
        """Nothing yet, of the grid that arrives at a config's first block."""
        frames, height, width = backbones.block_grids(cfg)[0]
        return cls(np.zeros(frames), np.zeros((height, width)), truth=find_truth(cfg))

    def add(self, cfg, regions: dict, name: str) -> None:
        """Counts a clip of video ``name``: ``regions`` as `pictures.kept_regions` gives them."""
        self.clips += 1
        for frame, region in regions.items():
            self.frames[frame] += 1
            rows, columns = (
                slice(round(first * size), round((first + side) * size))
                for first, side, size in zip(region[:2], region[2:], self.tokens.shape)
            )
            self.tokens[rows, columns] += 1
        for frame, box in shown_boxes(cfg, self.truth[name]).items() if self.truth else ():
            self.shown += 1
            if frame in regions:
                self.found += 1
                self.inside += share_inside(box, regions[frame])

    def summary(self) -> dict:
        """Shares in 0..1; recalls are None where the truth is not known."""
        recall = {"frame_recall": None, "box_recall": None}
        if self.shown:
            recall["frame_recall"] = round(self.found / self.shown, 4)
            recall["box_recall"] = round(self.inside / self.shown, 4)
        return {
            **recall,
            "frames_kept": (self.frames / self.clips).round(4).tolist(),
            "tokens_kept": (self.tokens / self.frames.sum()).round(4).tolist(),
        }


def find_truth(cfg) -> dict[str, make_data.Truth]:
    """The truth beside videos of ``stts make-data``; {} where a clip is not a whole video."""
    folder = cfg.DATA.PATH_TO_DATA_DIR
    whole = cfg.TEST.NUM_ENSEMBLE_VIEWS == cfg.TEST.NUM_SPATIAL_CROPS == 1
    if not whole or not os.path.isfile(os.path.join(folder, "truth.json")):
        return {}
    return make_data.read_truth(folder)


def shown_boxes(cfg, truth: make_data.Truth) -> dict[int, tuple[float, float, float, float]]:
    """What shows the class in each frame of tokens: frame -> box, in shares of the frame."""
    tokens = backbones.block_grids(cfg)[0][0]
    step = cfg.DATA.SAMPLING_RATE * cfg.DATA.NUM_FRAMES // tokens
    side = cfg.DATA.TEST_CROP_SIZE
    boxes = {}
    for frame, box in zip(truth.frames, truth.boxes):
        boxes.setdefault(frame // step, tuple(size / side for size in box))
    return boxes


def share_inside(box, region) -> float:
    """How much of a box lies in a region; both (top, left, height, width)."""
    share = 1.0
    for first, size, start, length in zip(box[:2], box[2:], region[:2], region[2:]):
        overlap = min(first + size, start + length) - max(first, start)
        share *= max(overlap, 0.0) / size
    return share


@torch.no_grad()
def evaluate(cfg, model: nn.Module, clips: TestClips, advance: Callable[[], None]) -> dict:
    """Runs a model over all views of a test list.

    Args:
        cfg: its config.
        model: on the device that it shall run on; with or without selectors.
        clips: of that list.
        advance: called after each batch.

    Returns:
        ``top1`` and ``top5`` in percent of videos, the views' predictions put together as
        DATA.ENSEMBLE_METHOD says; ``agreement``, the share of pairs of views of a video that
        predict the same class (None for one view); ``clips_per_s`` through the model alone, the
        first batch left out; what `Places` sums up; ``unreadable`` and ``damaged`` videos. An
        unreadable video counts as wrong, and for nothing else: ``top1_readable`` and
        ``top5_readable``, which are there if there are such videos, leave it out.

    Raises:
        ValueError: for unreadable videos (`TestClips`), or outputs that are not finite.
    """
    model.eval()
    places, evaluator = CoverageStats.of(cfg), Evaluator(cfg, model, clips.dataset)
    whole = dict.fromkeys(range(len(places.frames)), FULL_FRAME)
    predicted, of_video = [], []
    for batch in clips:
        readable, numbers = batch[1] != UNREADABLE, batch[2]
        predicted.append(evaluator.add(batch)[readable].argmax(1))
        of_video.append(numbers[readable])
        kept = selections(model) if cfg.STTS.ENABLE else None
        for item in torch.nonzero(readable).flatten().tolist():
            regions = whole if kept is None else kept_regions(cfg, kept, item)
            places.add(cfg, regions, os.path.basename(clips.videos[int(numbers[item])].path))
        advance()
    accuracy = evaluator.accuracies()
    return {
        **{name.replace("_acc", ""): round(value, 3) for name, value in accuracy.items()},
        "agreement": agreement(torch.cat(predicted), torch.cat(of_video)),
        "clips_per_s": round(evaluator.clips_per_s(), 2),
        **places.summary(),
        **clips.count(),
    }


def agreement(predicted: Tensor, videos: Tensor) -> float | None:
    """Share of pairs of views of one video that predict the same class, mean over the videos."""
    shares = []
    for video in videos.unique():
        classes = predicted[videos == video]
        pairs = len(classes) * (len(classes) - 1)
        if pairs:
            same = (classes[:, None] == classes).sum().item() - len(classes)
            shares.append(same / pairs)
    return round(float(np.mean(shares)), 4) if shares else None
