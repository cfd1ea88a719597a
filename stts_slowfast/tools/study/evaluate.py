"""A model over a test list: accuracy, speed, agreement between views, and what the model keeps."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from stts_slowfast.standalone.data import UNREADABLE, build_loader, normalize_clips
from stts_slowfast.standalone.evaluator import ViewEnsemble, accuracies, require_readable
from stts_slowfast.standalone.predictions import predict
from stts_slowfast.tools.study.coverage import CoverageStats

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # clips, labels, video_index, view_index
CACHE_BYTES = 2**30


class TestClips:
    """The batches of a config's test list; kept in memory after the first pass if they fit.

    A whole pass raises ``ValueError`` for unreadable videos, as ``stts run`` does, unless
    TEST.ALLOW_MISSING.
    """

    def __init__(self, cfg):
        self.allow_missing = cfg.TEST.ALLOW_MISSING
        self.loader = build_loader(cfg, "test")
        self.videos = self.loader.dataset.videos
        self.num_views = self.loader.dataset.num_views
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
        """Numbers of ``unreadable`` and ``damaged`` videos, after a whole pass."""
        return self.loader.bad.count()


@torch.no_grad()
def evaluate(cfg, model: nn.Module, clips: TestClips, advance: Callable[[], None]) -> dict:
    """Runs a model over all views of a test list.

    Args:
        cfg: the model's config.
        model: on its device; with or without selectors.
        clips: of that list.
        advance: called after each batch.

    Returns:
        ``top1`` and ``top5`` in percent of videos, from the views' predictions combined by
        DATA.ENSEMBLE_METHOD; ``agreement``, the share of pairs of views of a video that predict
        the same class (None for one view); ``clips_per_s`` of the model alone, without the first
        batch; the keys of `CoverageStats.summary`; ``unreadable`` and ``damaged`` videos. An
        unreadable video counts as wrong in top1 and top5, and nowhere else. If there are any,
        ``top1_readable`` and ``top5_readable`` leave them out.

    Raises:
        ValueError: for unreadable videos (`TestClips`), or outputs that are not finite.
    """
    device = next(model.parameters()).device
    model.eval()
    coverage, busy = CoverageStats(cfg, clips.videos), []
    views = ViewEnsemble(cfg, len(clips.videos), clips.num_views)
    predicted, of_video = [], []
    for clip, labels, numbers, view in clips:
        scores = torch.zeros(len(clip), cfg.MODEL.NUM_CLASSES)
        readable = labels != UNREADABLE
        if bool(readable.any()):
            inputs, seen = normalize_clips(clip[readable].to(device), cfg), numbers[readable]
            start = _now(device)
            logits = predict(model, inputs, clips.videos, seen)
            busy.append((len(inputs), _now(device) - start))
            scores[readable] = logits.softmax(1).cpu()
            predicted.append(scores[readable].argmax(1))
            of_video.append(seen)
            coverage("test", model, (inputs, labels[readable], seen, view[readable]))
        views.add(scores, labels, numbers, view)
        advance()
    require_readable(cfg, views.labels)
    accuracy = accuracies(views.predictions, views.labels)
    busy = busy[1:] or busy
    return {
        **{name.replace("_acc", ""): round(value, 3) for name, value in accuracy.items()},
        "agreement": agreement(torch.cat(predicted), torch.cat(of_video)),
        "clips_per_s": round(sum(n for n, _ in busy) / sum(seconds for _, seconds in busy), 2),
        **coverage.summary(),
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


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
