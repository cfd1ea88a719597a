"""A model over a test list: accuracy, speed, agreement between views, and what the model keeps."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from stts_slowfast.evaluation import evaluating
from stts_slowfast.fidelity import OutputRecorder, Outputs
from stts_slowfast.standalone.annotations import VideoList
from stts_slowfast.standalone.data import UNREADABLE, build_loader
from stts_slowfast.standalone.evaluator import Evaluator
from stts_slowfast.tools.study.coverage import CoverageStats
from stts_slowfast.tools.study.oracle import Oracle
from stts_slowfast.tools.study.rows import StudyRow, load_row_model, row_config

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # clips, labels, video_index, view_index
CACHE_BYTES = 2**30


class TestClips:
    """The batches of a config's test list; kept in memory after the first pass if they fit.

    A whole pass raises ``ValueError`` for unreadable videos, as ``stts run`` does, unless
    TEST.ALLOW_MISSING.

    Args:
        cfg: a config.
        films: videos without labels, instead of the test list.

    Attributes:
        readable: (clips,) bool, which clips are of videos that can be read; after a whole pass.
    """

    def __init__(self, cfg, films: VideoList | None = None):
        self.allow_missing = cfg.TEST.ALLOW_MISSING
        self.loader = build_loader(cfg, "test", films=films)
        self.dataset = self.loader.dataset
        self.videos = self.dataset.videos
        self.cached: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if self.cached is not None:
            yield from self.cached
            return
        batches, readable, size = [], [], 0
        for batch in self.loader:
            size += batch[0].nbytes
            readable.append(batch[1] != UNREADABLE)
            if size <= CACHE_BYTES:
                batches.append(batch)
            yield batch
        self.loader.bad.require_all(self.allow_missing)
        self.readable = torch.cat(readable)
        self.cached = batches if size <= CACHE_BYTES else None

    def count(self) -> dict[str, int]:
        """Numbers of ``unreadable`` and ``damaged`` videos, after a whole pass."""
        return self.loader.bad.count()

    def only_readable(self, outputs: Outputs) -> Outputs:
        """Outputs of a whole pass, without those for unreadable videos."""
        return outputs.map(lambda rows: rows[self.readable])


class Reference:
    """The outputs of a config's model on all tokens, computed when they are first needed.

    Args:
        cfg: of the study.
        path: the checkpoint.
        clips: of its test list.

    Attributes:
        found: the outputs, once they are known.
    """

    def __init__(self, cfg, path: str, clips: TestClips):
        self.cfg, self.path, self.clips = cfg, path, clips
        self.found: Outputs | None = None

    @torch.no_grad()
    def outputs(self, device: str) -> Outputs:
        """Features and logits of all clips that can be read."""
        if self.found is None:
            model, _ = load_row_model(row_config(self.cfg, StudyRow(None, None, "all")), self.path)
            model.to(device).eval()
            evaluator = Evaluator(self.cfg, model, self.clips.dataset)
            with (
                evaluating(model, self.cfg.TEST.PRECISION, ""),  # a hook records the outputs
                OutputRecorder(model, classes=True) as recorder,
            ):
                for batch in self.clips:
                    evaluator.add(batch)
            self.found = self.clips.only_readable(recorder.outputs())
        return self.found


@torch.no_grad()
def evaluate(
    cfg,
    model: nn.Module,
    clips: TestClips,
    advance: Callable[[], None],
    oracle: Oracle | None = None,
) -> dict:
    """Runs a model over all views of a test list.

    Args:
        cfg: the model's config.
        model: on its device; with or without selectors.
        clips: of that list.
        advance: called after each batch.
        oracle: of the model, which then selects by the labels.

    Returns:
        ``top1`` and ``top5`` in percent of videos, from the views' predictions combined by
        DATA.ENSEMBLE_METHOD (None if no video has a label); ``agreement``, the share of pairs of
        views of a video that predict the same class (None for one view); ``clips_per_s`` of the
        model only, without the first batch; the keys of `CoverageStats.summary`; ``unreadable`` and
        ``damaged`` videos. An unreadable video counts as wrong in top1 and top5, and nowhere else.
        If there are any, ``top1_readable`` and ``top5_readable`` leave them out.

    Raises:
        ValueError: for unreadable videos (`TestClips`), or outputs that are not finite.
    """
    model.eval()
    evaluator, coverage = Evaluator(cfg, model, clips.dataset), CoverageStats(cfg, clips.videos)
    predicted, of_video = [], []
    with evaluating(model, cfg.TEST.PRECISION, cfg.TEST.COMPILE):
        for batch in clips:
            readable = batch[1] != UNREADABLE
            if oracle is not None:
                oracle.labels = batch[1]
            predicted.append(evaluator.add(batch)[readable].argmax(1))
            of_video.append(batch[2][readable])
            coverage("test", model, batch)
            advance()
    accuracy = evaluator.accuracies()
    return {
        **{
            name.replace("_acc", ""): value if value is None else round(value, 3)
            for name, value in accuracy.items()
        },
        "agreement": agreement(torch.cat(predicted), torch.cat(of_video)),
        "clips_per_s": None if oracle else round(evaluator.clips_per_s(), 2),
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
