"""Videos that cannot be read inside SlowFast: read with a time limit, logged, never scored.

In training and validation SlowFast takes another video. In testing it tries the same one a hundred
times and fails without its name; here black frames replace it, and the test raises an error with
all such videos, or gives both accuracies if ``TEST.ALLOW_MISSING``. If a run uses STTS, it also
refuses outputs that are not finite, and leaves videos with the label -1 out of all accuracies.
"""

import contextlib
import inspect
import logging
import os
import pickle
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import partial

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr

from stts_slowfast.pyslowfast import read_context
from stts_slowfast.pyslowfast.compat import patch, uses_stts
from stts_slowfast.pyslowfast.config_access import extra_key
from stts_slowfast.pyslowfast.patching import replaced_methods, wrap
from stts_slowfast.video import VideoError, accuracy, run_with_timeout
from stts_slowfast.video.error_log import (
    UNREADABLE,
    VideoErrorLog,
    VideoIssue,
    raise_if_unreadable,
    read_log,
)
from stts_slowfast.video.io import require_regular
from stts_slowfast.video.list_lines import UNLABELLED

logger = logging.getLogger(__name__)

KINDS = {"unreadable": 1, "damaged": 2}
# The label by which a worker marks black frames in a batch; the meter removes it again.
UNREAD_LABEL = torch.iinfo(torch.int64).min
_BLACK = object()  # container of a test video that cannot be read

_errors: "ContextVar[ReadErrors | None]" = ContextVar("stts_errors", default=None)


class ReadErrors:
    """What is wrong with the videos of a dataset, found by all workers while a loop reads it.

    Attributes:
        log: writes ``bad_videos.jsonl``, logs each video once, and counts.
        kinds: (items,) uint8 in shared memory: a sum of `KINDS` for each item of the dataset.
        unreadable: path to reason, of the videos that this process could not read.
        line: what is added to the epoch's or the test's line of ``json_stats``.
        missing: numbers of the test videos that could not be read.
    """

    def __init__(self, dataset):
        self.cfg, self.mode, self.dataset = dataset.cfg, dataset.mode, dataset
        self.paths = dataset._path_to_videos
        # Without STTS a label of -1 and outputs that are not finite are left to SlowFast.
        self.strict = uses_stts(dataset.cfg)
        self.labelled = torch.tensor(
            [not (self.strict and label == UNLABELLED) for label in dataset._labels],
            dtype=torch.bool,
        )
        self.log = VideoErrorLog(dataset.cfg, dataset.mode)
        self.kinds = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self.unreadable: dict[str, str] = {}
        self.line: dict = {}
        self.missing: set[int] = set()

    def add(self, path: str, kind: str, reason: str) -> None:
        """Logs what is wrong with a file."""
        if kind == "unreadable":
            self.unreadable[path] = reason
        index = self.paths.index(path)
        self.kinds[index] |= KINDS[kind]
        epoch = int(self.dataset.epoch) if self.mode == "train" else None
        self.log.add([VideoIssue(index, path, kind, reason)], epoch)

    def check_item(self, context: read_context.ReadContext, item):
        """What ``__getitem__`` returns, with the label `UNREAD_LABEL` for black frames.

        Raises:
            VideoError: if SlowFast has given up, after a hundred videos.
        """
        if item is None:
            reason = self.unreadable.get(context.path, "SlowFast gives up")
            others = len(self.unreadable) - 1
            raise VideoError(
                context.path, f"{reason}; {others} other videos could not be read either"
            )
        if not context.is_black:
            return item
        frames, _, *rest = item
        return frames, UNREAD_LABEL, *rest

    def count(self) -> None:
        """Sets `line` to the number of videos of each kind over all processes; all must call it."""
        for kind, bit in KINDS.items():
            for index in torch.nonzero(self.kinds & bit).flatten().tolist():
                issue = VideoIssue(index, self.paths[index], kind, "")
                self.log.epoch.setdefault((index, kind), issue)
        self.line = {kind: number for kind, number in self.log.count().items() if number}


@patch("bad_videos")
def patch_bad_videos(kinetics) -> bool:
    """How ``Kinetics`` opens and decodes files (``slowfast/datasets/kinetics.py``)."""
    read_context.track_items(kinetics)
    wrap(kinetics.container, "get_video_container", _get_video_container)
    wrap(kinetics.decoder, "decode", _decode)
    return True


def epoch_stats(stats: dict) -> dict:
    """What is added to a line of ``json_stats``, if it is an epoch's or a test's."""
    errors = _errors.get()
    if errors is None:
        return {}
    ends = stats.get("split") == "test_final" or str(stats.get("_type")).endswith("_epoch")
    return errors.line if ends else {}


@contextlib.contextmanager
def track_errors(loader, meter, mode: str):
    """Context manager: a SlowFast loop keeps track of videos that cannot be read.

    Args:
        loader: of any dataset; datasets other than ``Kinetics`` itself are not changed.
        meter: of the loop; afterwards its methods are SlowFast's again.
        mode: ``train``, ``val`` or ``test``.
    """
    dataset = getattr(loader, "dataset", None)
    if (
        not read_context.is_kinetics(dataset)
        or dataset.mode != mode
        or (mode == "test" and getattr(meter, "multi_label", True))
    ):
        yield
        return
    errors = dataset.stts_errors = ReadErrors(dataset)
    token = _errors.set(errors)
    methods: dict[str, Callable] = {"log_epoch_stats": _log_epoch_stats}
    if mode == "test":
        methods = {"update_stats": _update_stats, "finalize_metrics": _finalize_metrics}
    methods = {name: partial(_with_errors, errors, method) for name, method in methods.items()}
    try:
        with replaced_methods(meter, methods):
            yield
    finally:
        _errors.reset(token)
        del dataset.stts_errors


def _with_errors(errors, method, original, meter, *args, **kwargs):
    return method(original, meter, errors, *args, **kwargs)


def _get_video_container(get_video_container, path, *args, **kwargs):
    context = read_context.current()
    if context is None or context.errors is None:
        return get_video_container(path, *args, **kwargs)
    errors, context.path, context.is_black, context.issue = context.errors, path, False, None
    if path not in errors.unreadable:
        try:
            require_regular(path)
            seconds = extra_key(errors.cfg, "DATA.READ_TIMEOUT")
            return run_with_timeout(
                seconds, path, partial(get_video_container, path, *args, **kwargs)
            )
        except Exception as error:
            errors.add(path, "unreadable", getattr(error, "reason", str(error)))
    if errors.mode == "test":
        return _BLACK
    raise VideoError(path, errors.unreadable[path])


def _decode(decode, container, *args, **kwargs):
    context = read_context.current()
    if context is None or context.errors is None:
        return decode(container, *args, **kwargs)
    decoded, cfg = (None, None, None), context.errors.cfg
    if container is not _BLACK:
        try:
            # copy_context: the thread that decodes gets the ReadContext too.
            call = partial(copy_context().run, decode, container, *args, **kwargs)
            decoded = run_with_timeout(extra_key(cfg, "DATA.READ_TIMEOUT"), context.path, call)
        except VideoError as error:
            context.abandon_file()
            context.issue = "unreadable", error.reason
        if decoded[0] is None and not context.issue:
            context.issue = "unreadable", "SlowFast's decoder returns nothing"
        if context.issue:
            context.errors.add(context.path, *context.issue)
    if decoded[0] is not None or context.errors.mode != "test":
        return decoded
    context.is_black = True
    side = cfg.DATA.TEST_CROP_SIZE
    frames = torch.zeros(cfg.DATA.NUM_FRAMES, side, side, 3, dtype=torch.uint8)
    return [frames], np.zeros((1, 3)), [0]


def _log_epoch_stats(log_epoch_stats, meter, errors, cur_epoch):
    errors.count()
    return log_epoch_stats(cur_epoch)


def _update_stats(update_stats, meter, errors, preds, labels, clip_ids):
    """A video that is unreadable in one view is so in all views: it gets a label that no prediction
    equals."""
    videos = clip_ids // meter.num_clips
    finite = preds.isfinite().flatten(1).all(1) | (labels == UNREAD_LABEL)
    if errors.strict and not bool(finite.all()):
        path = errors.paths[int(clip_ids[~finite][0])]
        raise ValueError(f"the model's outputs for {path} are not finite: check its weights")
    errors.missing |= set(videos[labels == UNREAD_LABEL].tolist())
    missing = torch.tensor([video in errors.missing for video in videos.tolist()]).bool()
    meter.video_labels[videos[missing]] = UNREADABLE
    return update_stats(preds, labels.masked_fill(missing, UNREADABLE), clip_ids)


def _finalize_metrics(finalize_metrics, meter, errors, *args, **kwargs):
    """Refuses unreadable videos or gives both accuracies, over the videos that have a label."""
    call = inspect.signature(finalize_metrics).bind(*args, **kwargs)
    call.apply_defaults()
    ks = call.arguments.get("ks", (1, 5))
    errors.count()
    missing, paths = sorted(errors.missing), errors.paths[:: meter.num_clips]
    labelled = errors.labelled[:: meter.num_clips]
    if missing:
        folder = errors.cfg.OUTPUT_DIR
        reasons = read_log(folder, "unreadable")
        if len(missing) == len(paths) or not extra_key(errors.cfg, "TEST.ALLOW_MISSING"):
            raise_if_unreadable(
                {paths[n]: reasons.get(paths[n], "unknown") for n in missing}, folder
            )
        labels = torch.where(labelled, meter.video_labels, accuracy.NO_LABEL)
        for name, value in accuracy.video_accuracies(meter.video_preds, labels, ks).items():
            if name.endswith("_readable") and value is not None:
                errors.line[name] = f"{value:.2f}"
    if bool(labelled.all()):
        return finalize_metrics(*args, **kwargs)
    errors.line["unlabelled"] = int((~labelled).sum())
    if not bool(labelled.any()):
        return _finalize_without_labels(meter, errors, ks)
    names = "video_preds", "video_labels", "clip_count"
    all_videos = {name: getattr(meter, name) for name in names}
    try:
        for name, values in all_videos.items():
            setattr(meter, name, values[labelled])
        return finalize_metrics(*args, **kwargs)
    finally:
        for name, values in all_videos.items():
            setattr(meter, name, values)


def _finalize_without_labels(meter, errors, ks) -> None:
    """Saves the scores; the loop that prints accuracies afterwards prints ``none``."""
    from slowfast.utils import logging as slowfast_logging

    name = errors.cfg.TEST.SAVE_RESULTS_PATH
    if not name and (not torch.distributed.is_initialized() or not torch.distributed.get_rank()):
        name = "scores.pkl"
        with g_pathmgr.open(os.path.join(errors.cfg.OUTPUT_DIR, name), "wb") as file:
            pickle.dump([meter.video_preds, meter.video_labels], file)
    logger.warning(
        "the test list has no labels, so there is no accuracy: the videos' scores are in %s",
        os.path.join(errors.cfg.OUTPUT_DIR, name or "scores.pkl"),
    )
    slowfast_logging.log_json_stats({"split": "test_final"})
    meter.stats = {"split": "test_final", **{f"top{k}_acc": "none" for k in ks}}
