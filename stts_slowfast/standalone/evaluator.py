"""Testing by several views of every video: their predictions, combined, become the accuracy."""

import logging
import os
import pickle
import time
from typing import Any

import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn

from stts_slowfast.standalone import run_logger
from stts_slowfast.standalone.data import ClipDataset, build_loader
from stts_slowfast.standalone.fabric import Fabric
from stts_slowfast.standalone.predictions import Predictions
from stts_slowfast.standalone.run_logger import RunLogger, Timer
from stts_slowfast.standalone.signals import SignalState
from stts_slowfast.video.accuracy import NO_LABEL, video_accuracies
from stts_slowfast.video.error_log import UNREADABLE, VideoErrorLog

logger = logging.getLogger(__name__)


class Evaluator:
    """A model over batches of a test list: accuracy of its videos, and speed.

    Attributes:
        views: the predictions so far.
    """

    def __init__(self, cfg, model: nn.Module, dataset: ClipDataset):
        self.cfg, self.model, self.videos = cfg, model, dataset.videos
        self.device = next(model.parameters()).device
        self.views = ViewEnsemble(cfg, len(dataset.videos), dataset.num_views)
        self.predictions = Predictions(
            model, cfg, dataset.videos, lambda logits, _: logits.softmax(-1)
        )
        self._timings: list[tuple[int, Any, Any]] = []  # of each batch: clips, beginning and end

    @torch.no_grad()
    def launch(self, batch: tuple[Tensor, ...]) -> None:
        """Runs the model on a batch ``(clips, labels, video_index, view_index)``; :meth:`read` gets
        its outputs.

        Args:
            batch: clips on any device, the others on the CPU, so that nothing is read from it.
        """
        clips = batch[0].to(self.device, non_blocking=True)
        labels, videos, views = (part.cpu() for part in batch[1:])
        start = self._now()
        self.predictions.add(clips, labels, videos, labels, views)
        self._timings.append((len(clips), start, self._now()))

    def read(self, is_last: bool = True) -> list[Tensor]:
        """Adds the outputs of the batches that are done to ``views``.

        Args:
            is_last: wait for the last batch too.

        Returns:
            Class probabilities (B, classes) of each of these batches, on the CPU; of unreadable
            videos, which the loader replaces by black frames, they mean nothing.
        """
        done = []
        for scores, videos, labels, views in self.predictions.read(is_last):
            self.views.add(scores, labels, videos, views)
            done.append(scores)
        return done

    def add(self, batch: tuple[Tensor, ...]) -> Tensor:
        """:meth:`launch` and :meth:`read`: the class probabilities of a batch."""
        self.launch(batch)
        return self.read()[-1]

    def clips_per_s(self) -> float:
        """Clips per second of the model only, without the first batch, a warm-up."""
        timings = self._timings[1:] or self._timings
        if self.device.type == "cuda":
            timings[-1][2].synchronize()
            seconds = [start.elapsed_time(end) / 1000 for _, start, end in timings]
        else:
            seconds = [end - start for _, start, end in timings]
        return sum(count for count, *_ in timings) / sum(seconds)

    def accuracies(self) -> dict[str, float | None]:
        """See ``video_accuracies``; of all views that were added.

        Raises:
            ValueError: if no video can be read.
        """
        labels = self.views.labels
        if bool((labels == UNREADABLE).all()):
            raise ValueError(
                f"none of the {len(labels)} test videos can be read: is DATA.PATH_PREFIX "
                f"({self.cfg.DATA.PATH_PREFIX!r}) right?"
            )
        # A video without a label is not wrong, even if it cannot be read.
        labels[torch.from_numpy(self.videos.labels == NO_LABEL)] = NO_LABEL
        return video_accuracies(self.views.predictions, labels)

    def _now(self) -> Any:
        """This point in time; on a device, when it comes here."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class ViewEnsemble:
    """The predictions of all views of all videos, combined by DATA.ENSEMBLE_METHOD.

    Attributes:
        seen: (videos, views) whether a view was tested.
        predictions: (videos, classes).
        labels: (videos,); ``UNREADABLE`` if a video cannot be read, ``NO_LABEL`` if it has none.
    """

    def __init__(self, cfg, num_videos: int, num_views: int):
        self.method = cfg.DATA.ENSEMBLE_METHOD
        self.seen = torch.zeros(num_videos, num_views, dtype=torch.bool)
        self.predictions = torch.zeros(num_videos, cfg.MODEL.NUM_CLASSES)
        self.labels = torch.full((num_videos,), torch.iinfo(torch.int64).min)

    def add(self, predictions: Tensor, labels: Tensor, videos: Tensor, views: Tensor) -> None:
        """Adds predictions (B, classes) for (B,) labels, videos and views."""
        new = ~self.seen[videos, views]  # a view counts once, however often it comes
        videos, views, predictions = videos[new], views[new], predictions[new]
        self.seen[videos, views] = True
        self.labels[videos] = labels[new]
        if self.method == "sum":
            self.predictions.index_add_(0, videos, predictions)
        else:
            index = videos[:, None].expand_as(predictions)
            self.predictions.scatter_reduce_(0, index, predictions, "amax")

    def gather(self, fabric: Fabric) -> None:
        """Combines what all processes have added; each view went to one of them."""

        def reduce(tensor: Tensor, how: str) -> Tensor:
            return fabric.all_reduce(fabric.to_device(tensor), reduce_op=how).cpu()

        self.seen = reduce(self.seen.int(), "sum") > 0
        self.labels = reduce(self.labels, "max")
        self.predictions = reduce(self.predictions, self.method)


# --- the test of a run ----------------------------------------------------------------------------


def run_test(
    cfg, fabric: Fabric, model: nn.Module, run_log: RunLogger, signals: SignalState, watch
) -> dict:
    """Tests with each of TEST.NUM_TEMPORAL_CLIPS, else TEST.NUM_ENSEMBLE_VIEWS, clips of a video.

    Args:
        cfg: is changed.
        model: on its device, in evaluation.
        watch: see ``engine.BatchCallback``.

    Returns:
        See ``engine.test``.
    """
    for number in test_clip_counts(cfg):
        cfg.TEST.NUM_ENSEMBLE_VIEWS = number
        loader = build_loader(cfg, "test", fabric.global_rank, fabric.world_size)
        loader.set_epoch(0)
        dataset, length = loader.dataset, len(loader)
        counts = len(dataset.videos), dataset.num_views, cfg.TEST.BATCH_SIZE
        logger.info("test: %d videos x %d views, batches of %d", *counts)
        evaluator, timer = Evaluator(cfg, model, dataset), Timer()
        batches = run_log.progress(loader, "testing", length)
        for iteration, batch in enumerate(timer.timed(batches)):
            signals.check()
            evaluator.launch(batch)
            evaluator.read(is_last=iteration + 1 == length)
            timer.toc()
            if fabric.is_global_zero and (iteration + 1) % cfg.LOG_PERIOD == 0:
                stats = {
                    "split": "test_iter",
                    "cur_iter": str(iteration + 1),
                    "eta": timer.eta(length - iteration - 1),
                    "time_diff": timer.stats()["dt"],
                }
                run_logger.log_json_stats(stats)
            if watch:
                watch("test", model, fabric.to_device(batch))
        evaluator.views.gather(fabric)
        result = _result(cfg, fabric, evaluator, loader.bad)
        result["clips_per_s"] = evaluator.clips_per_s()
    return result


def test_clip_counts(cfg) -> list[int]:
    """The numbers of clips of a video to test with, one after the other."""
    numbers = list(cfg.TEST.NUM_TEMPORAL_CLIPS) or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    return [1, 3, 5, 7, 10] if numbers == [-1] else numbers


def _result(cfg, fabric: Fabric, evaluator: Evaluator, errors: VideoErrorLog) -> dict:
    views = evaluator.views
    missing = int((~views.seen).sum())
    if missing:
        logger.warning("%d of %d views were not tested", missing, views.seen.numel())
    accuracy = evaluator.accuracies()
    errors.require_all(cfg.TEST.ALLOW_MISSING)
    counts = errors.count()
    if unlabelled := int((views.labels == NO_LABEL).sum()):
        counts["unlabelled"] = unlabelled
    if fabric.is_global_zero:
        _write_scores(cfg, views, accuracy)
        stats = {name: f"{value:.2f}" for name, value in accuracy.items() if value is not None}
        run_logger.log_json_stats({"split": "test_final", **stats, **counts}, cfg.OUTPUT_DIR)
    videos, num_views = views.seen.shape
    return {**accuracy, **counts, "num_videos": videos, "num_views": num_views}


def _write_scores(cfg, views: ViewEnsemble, accuracy: dict) -> None:
    """Writes the pickle ``[predictions, labels]``, if asked for or if there is no accuracy."""
    name = cfg.TEST.SAVE_RESULTS_PATH
    if not name and accuracy["top1_acc"] is None:
        name = "scores.pkl"
        logger.warning(
            "the test list has no labels, so there is no accuracy: the videos' scores are in %s",
            os.path.join(cfg.OUTPUT_DIR, name),
        )
    if name:
        labels = views.labels.clamp(min=-1)  # both marks of videos without a class
        with g_pathmgr.open(os.path.join(cfg.OUTPUT_DIR, name), "wb") as file:
            pickle.dump([views.predictions, labels], file)
