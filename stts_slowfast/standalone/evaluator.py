"""Testing by several views of every video: the loop, and how their predictions become one."""

import logging
import os
import pickle

import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn

from stts_slowfast.standalone import run_logger
from stts_slowfast.standalone.annotations import NO_LABEL
from stts_slowfast.standalone.data import UNREADABLE, VideoErrorLog, build_loader, normalize_clips
from stts_slowfast.standalone.fabric import Fabric
from stts_slowfast.standalone.predictions import predict
from stts_slowfast.standalone.run_logger import RunLogger, Timer
from stts_slowfast.standalone.signals import SignalState

logger = logging.getLogger(__name__)


def run_test(
    cfg, fabric: Fabric, model: nn.Module, board: RunLogger, stop: SignalState, watch
) -> dict:
    """Tests with each of TEST.NUM_TEMPORAL_CLIPS, else TEST.NUM_ENSEMBLE_VIEWS, clips of a video.

    Args:
        cfg: is changed.
        model: on its device, in evaluation.
        watch: see ``engine.Watch``.

    Returns:
        See ``engine.test``.
    """
    for number in test_clip_counts(cfg):
        cfg.TEST.NUM_ENSEMBLE_VIEWS = number
        loader = build_loader(cfg, "test", fabric.global_rank, fabric.world_size)
        loader.set_epoch(0)
        data = loader.dataset
        counts = len(data.videos), data.num_views, cfg.TEST.BATCH_SIZE
        logger.info("test: %d videos x %d views, batches of %d", *counts)
        views, busy = ViewEnsemble(cfg, len(data.videos), data.num_views), []
        timer, length = Timer(), len(loader)
        batches = board.progress(loader, "testing", length)
        for iteration, batch in enumerate(timer.timed(batches)):
            stop.check()
            batch = fabric.to_device(batch)
            with torch.no_grad():
                logits = predict(model, normalize_clips(batch[0], cfg), data.videos, batch[2])
            views.add(logits.softmax(-1).cpu(), *(part.cpu() for part in batch[1:]))
            timer.toc()
            busy.append((len(batch[0]), timer.stats()["dt_net"]))
            if fabric.is_global_zero and (iteration + 1) % cfg.LOG_PERIOD == 0:
                stats = {
                    "split": "test_iter",
                    "cur_iter": str(iteration + 1),
                    "eta": timer.eta(length - iteration - 1),
                    "time_diff": timer.stats()["dt"],
                }
                run_logger.log_json_stats(stats)
            if watch:
                watch("test", model, batch)
        views.gather(fabric)
        result = _result(cfg, fabric, views, loader.bad, data.videos.labels)
        busy = busy[1:] or busy  # the first batch is a warm-up
        result["clips_per_s"] = sum(clips for clips, _ in busy) / sum(s for _, s in busy)
    return result


def test_clip_counts(cfg) -> list[int]:
    """The numbers of clips to test with, one after the other."""
    numbers = list(cfg.TEST.NUM_TEMPORAL_CLIPS) or [cfg.TEST.NUM_ENSEMBLE_VIEWS]
    return [1, 3, 5, 7, 10] if numbers == [-1] else numbers


class ViewEnsemble:
    """The predictions of all views of all videos, put together as DATA.ENSEMBLE_METHOD says.

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
        """Puts together what the processes have seen; each view went to one of them."""

        def reduce(tensor: Tensor, how: str) -> Tensor:
            return fabric.all_reduce(fabric.to_device(tensor), reduce_op=how).cpu()

        self.seen = reduce(self.seen.int(), "sum") > 0
        self.labels = reduce(self.labels, "max")
        self.predictions = reduce(self.predictions, self.method)


def _result(cfg, fabric: Fabric, views: ViewEnsemble, bad: VideoErrorLog, listed) -> dict:
    missing = int((~views.seen).sum())
    if missing:
        logger.warning("%d of %d views were not tested", missing, views.seen.numel())
    require_readable(cfg, views.labels)
    bad.require_all(cfg.TEST.ALLOW_MISSING)
    found = bad.count()
    # What has no class is not wrong, even if it cannot be read.
    views.labels[torch.from_numpy(listed == NO_LABEL)] = NO_LABEL
    accuracy = accuracies(views.predictions, views.labels)
    if unlabelled := int((views.labels == NO_LABEL).sum()):
        found["unlabelled"] = unlabelled
    if fabric.is_global_zero:
        write_scores(cfg, views, accuracy)
        stats = {name: f"{value:.2f}" for name, value in accuracy.items() if value is not None}
        run_logger.log_json_stats({"split": "test_final", **stats, **found}, cfg.OUTPUT_DIR)
    videos, num_views = views.seen.shape
    return {**accuracy, **found, "num_videos": videos, "num_views": num_views}


def require_readable(cfg, labels: Tensor) -> None:
    """Raises ``ValueError`` if no video has another label than ``UNREADABLE``."""
    if bool((labels == UNREADABLE).all()):
        raise ValueError(
            f"none of the {len(labels)} test videos can be read: is DATA.PATH_PREFIX "
            f"({cfg.DATA.PATH_PREFIX!r}) right?"
        )


def accuracies(predictions: Tensor, labels: Tensor) -> dict[str, float | None]:
    """``top1_acc`` and ``top5_acc`` in percent of the videos that have a label; None if none has.

    An unreadable one counts as wrong. If there are any, ``top1_acc_readable`` and
    ``top5_acc_readable`` leave them out.
    """
    labelled = labels != NO_LABEL
    parts = {"": labelled}
    if bool((labels == UNREADABLE).any()):
        parts["_readable"] = labelled & (labels != UNREADABLE)
    found = {}
    for ending, part in parts.items():
        errors = (
            run_logger.errors(predictions[part], labels[part]) if bool(part.any()) else [None] * 2
        )
        for name, error in zip(("top1_acc", "top5_acc"), errors):
            found[name + ending] = None if error is None else 100.0 - error.item()
    return found


def write_scores(cfg, views: ViewEnsemble, accuracy: dict) -> None:
    """Writes the pickle ``[predictions, labels]``, if asked for or if there is no accuracy."""
    name = cfg.TEST.SAVE_RESULTS_PATH
    if not name and accuracy["top1_acc"] is None:
        name = "scores.pkl"
        logger.warning(
            "the test list has no labels, so there is no accuracy: the videos' scores are in %s",
            os.path.join(cfg.OUTPUT_DIR, name),
        )
    if name:
        labels = views.labels.clamp(min=-1)  # both kinds of videos without a class
        with g_pathmgr.open(os.path.join(cfg.OUTPUT_DIR, name), "wb") as file:
            pickle.dump([views.predictions, labels], file)
