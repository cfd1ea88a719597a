"""Videos that cannot be read inside SlowFast: waited for only so long, written down, never scored.

In training and validation SlowFast takes another one. In testing it asks for the same a hundred
times and ends without its name; here black frames take its place, the meter hears of it, and the
test ends with the list, or with both accuracies if ``TEST.ALLOW_MISSING``. Each loop over
SlowFast's ``Kinetics`` has an account of its own, which ends with it. If a run asks for STTS,
outputs that are no numbers are refused, and videos with the label -1 are in no accuracy.
"""

import contextlib
import inspect
import logging
import os
import pickle
from contextvars import ContextVar, copy_context
from functools import partial

import numpy as np
import torch
from iopath.common.file_io import g_pathmgr

from stts_slowfast.pyslowfast import read_context
from stts_slowfast.pyslowfast.compat import asks_for_us, patch
from stts_slowfast.pyslowfast.config_access import ours
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.video import VideoError, run_with_timeout
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
# How a worker tells the meter, through the batch: no list holds this label, which is taken out
# again before SlowFast sees it.
NOT_READ = torch.iinfo(torch.int64).min
_BLACK = object()  # stands for the container of a test video that cannot be read

_reads: "ContextVar[Reads | None]" = ContextVar("stts_reads", default=None)


class Reads:
    """What the loop over a dataset finds about its videos, in all its workers.

    Attributes:
        kinds: (items,) uint8 in shared memory, a sum of `KINDS` for each item of the dataset.
        known: path to reason, of the unreadable ones that this process met.
        line: what the epoch's or the test's line of ``json_stats`` gains.
    """

    def __init__(self, dataset):
        self.cfg, self.mode, self.dataset = dataset.cfg, dataset.mode, dataset
        self.paths = dataset._path_to_videos
        # Without STTS a label of -1 is what SlowFast makes of it.
        self.asked = asks_for_us(dataset.cfg)
        self.unlabelled = torch.tensor(
            [self.asked and label == UNLABELLED for label in dataset._labels], dtype=torch.bool
        )
        self.kinds = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self.bad = VideoErrorLog(dataset.cfg, dataset.mode)
        self.known: dict[str, str] = {}
        self.line: dict = {}

    def note(self, path: str, kind: str, reason: str) -> None:
        """Writes down what was found about a file."""
        if kind == "unreadable":
            self.known[path] = reason
        index = self.paths.index(path)
        self.kinds[index] |= KINDS[kind]
        epoch = int(self.dataset.epoch) if self.mode == "train" else None
        self.bad.add([VideoIssue(index, path, kind, reason)], epoch)

    def settle(self, item: read_context.Item, found):
        """What ``__getitem__`` returns, with the label `NOT_READ` for black frames.

        Raises:
            VideoError: if SlowFast has given up, after a hundred videos.
        """
        if found is None:
            reason = self.known.get(item.path, "SlowFast gives up")
            raise VideoError(item.path, f"{reason}; nor could {len(self.known) - 1} others")
        if not item.blank:
            return found
        frames, _, *rest = found
        return frames, NOT_READ, *rest

    def everywhere(self) -> dict[str, set[str]]:
        """Paths by kind, of all processes of the run. Each of them must call it."""
        own = {
            kind: {self.paths[n] for n in torch.nonzero(self.kinds & bit).flatten().tolist()}
            for kind, bit in KINDS.items()
        }
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return own
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
        return {kind: set().union(*(part[kind] for part in parts)) for kind in KINDS}

    def count(self) -> None:
        """Puts into `line` how many videos of each kind there are, if there are any."""
        self.line = {kind: len(paths) for kind, paths in self.everywhere().items() if paths}


@patch("bad_videos")
def patch_bad_videos(kinetics) -> bool:
    """Kinetics' opening and decoding of files (``slowfast/datasets/kinetics.py``)."""
    read_context.wrap_items(kinetics)
    wrap(kinetics.container, "get_video_container", _open)
    wrap(kinetics.decoder, "decode", _decode)
    return True


def stats(given: dict) -> dict:
    """What an epoch's or a test's line of ``json_stats`` gains."""
    reads = _reads.get()
    if reads is None:
        return {}
    ends = given.get("split") == "test_final" or str(given.get("_type")).endswith("_epoch")
    return reads.line if ends else {}


@contextlib.contextmanager
def account(loader, meter, mode: str):
    """While a loop of SlowFast's reads a dataset, what cannot be read is accounted for.

    Args:
        loader: of any dataset; that of others than ``Kinetics`` itself is left alone.
        meter: what the loop counts with; its methods are SlowFast's again afterwards.
        mode: ``train``, ``val`` or ``test``.
    """
    dataset = getattr(loader, "dataset", None)
    if not read_context.is_kinetics(dataset) or dataset.mode != mode:
        yield
        return
    if mode == "test" and getattr(meter, "multi_label", True):
        yield
        return
    reads = dataset.stts_reads = Reads(dataset)
    token = _reads.set(reads)
    methods = {"log_epoch_stats": _log_epoch}
    if mode == "test":
        reads.missing = set()
        methods = {"update_stats": _update_stats, "finalize_metrics": _finalize}
    for name, method in methods.items():
        setattr(meter, name, partial(method, getattr(meter, name), meter, reads))
    try:
        yield
    finally:
        _reads.reset(token)
        del dataset.stts_reads
        for name in methods:
            vars(meter).pop(name, None)


def _open(get_video_container, path, *args, **kwargs):
    item = read_context.item()
    if item is None or item.reads is None:
        return get_video_container(path, *args, **kwargs)
    reads, item.path, item.blank, item.finding = item.reads, path, False, None
    if path not in reads.known:
        try:
            require_regular(path)
            seconds = ours(reads.cfg, "DATA.READ_TIMEOUT")
            return run_with_timeout(
                seconds, path, partial(get_video_container, path, *args, **kwargs)
            )
        except Exception as error:
            reads.note(path, "unreadable", getattr(error, "reason", str(error)))
    if reads.mode == "test":
        return _BLACK
    raise VideoError(path, reads.known[path])


def _decode(decode, container, *args, **kwargs):
    item = read_context.item()
    if item is None or item.reads is None:
        return decode(container, *args, **kwargs)
    found, cfg = (None, None, None), item.reads.cfg
    if container is not _BLACK:
        try:
            # The thread that reads gets the item too.
            call = partial(copy_context().run, decode, container, *args, **kwargs)
            found = run_with_timeout(ours(cfg, "DATA.READ_TIMEOUT"), item.path, call)
        except VideoError as error:
            item.leave_file()  # to the thread that still waits for it
            item.finding = "unreadable", error.reason
        if found[0] is None and not item.finding:
            item.finding = "unreadable", "SlowFast's decoder gives nothing"
        if item.finding:
            item.reads.note(item.path, *item.finding)
    if found[0] is not None or item.reads.mode != "test":
        return found
    item.blank = True
    side = cfg.DATA.TEST_CROP_SIZE
    frames = torch.zeros(cfg.DATA.NUM_FRAMES, side, side, 3, dtype=torch.uint8)
    return [frames], np.zeros((1, 3)), [0]


def _log_epoch(log_epoch_stats, meter, reads, cur_epoch):
    reads.count()
    return log_epoch_stats(cur_epoch)


def _update_stats(update_stats, meter, reads, preds, labels, clip_ids):
    """A video that is unreadable in one view is so in all, whichever comes last: it has no label,
    so that no prediction is right."""
    videos = clip_ids // meter.num_clips
    finite = preds.isfinite().flatten(1).all(1) | (labels == NOT_READ)
    if reads.asked and not bool(finite.all()):
        path = reads.paths[int(clip_ids[~finite][0])]
        raise ValueError(f"the model's outputs for {path} are no numbers: are its weights sound?")
    reads.missing |= set(videos[labels == NOT_READ].tolist())
    gone = torch.tensor([video in reads.missing for video in videos.tolist()], dtype=torch.bool)
    meter.video_labels[videos[gone]] = UNREADABLE
    return update_stats(preds, labels.masked_fill(gone, UNREADABLE), clip_ids)


def _finalize(finalize_metrics, meter, reads, *args, **kwargs):
    """Refuses unreadable videos, or gives both accuracies; of videos that have a label."""
    call = inspect.signature(finalize_metrics).bind(*args, **kwargs)
    call.apply_defaults()
    ks = call.arguments.get("ks", (1, 5))
    reads.count()
    missing, paths = sorted(reads.missing), reads.paths[:: meter.num_clips]
    labelled = ~reads.unlabelled[:: meter.num_clips]
    if missing:
        folder = reads.cfg.OUTPUT_DIR
        reasons = read_log(folder, "unreadable")
        if len(missing) == len(paths) or not ours(reads.cfg, "TEST.ALLOW_MISSING"):
            raise_if_unreadable(
                {paths[n]: reasons.get(paths[n], "unknown") for n in missing}, folder
            )
        readable = labelled.clone()
        readable[missing] = False
        for k, count in zip(ks, _correct(meter, readable, ks) if readable.any() else ()):
            share = 100.0 * count / readable.sum()
            reads.line[f"top{k}_acc_readable"] = f"{share:.2f}"
    if bool(labelled.all()):
        return finalize_metrics(*args, **kwargs)
    reads.line["unlabelled"] = int((~labelled).sum())
    if not bool(labelled.any()):
        return _finalize_without_labels(meter, reads, ks)
    names = "video_preds", "video_labels", "clip_count"
    whole = {name: getattr(meter, name) for name in names}
    try:
        for name, values in whole.items():
            setattr(meter, name, values[labelled])
        return finalize_metrics(*args, **kwargs)
    finally:
        for name, values in whole.items():
            setattr(meter, name, values)


def _correct(meter, part: torch.Tensor, ks) -> list:
    from slowfast.utils.metrics import topks_correct

    return topks_correct(meter.video_preds[part], meter.video_labels[part], ks)


def _finalize_without_labels(meter, reads, ks) -> None:
    """Scores and no accuracy; what prints the accuracies afterwards prints that there is none."""
    from slowfast.utils import logging as slowfast_logging

    name = reads.cfg.TEST.SAVE_RESULTS_PATH
    if not name and (not torch.distributed.is_initialized() or not torch.distributed.get_rank()):
        name = "scores.pkl"
        with g_pathmgr.open(os.path.join(reads.cfg.OUTPUT_DIR, name), "wb") as file:
            pickle.dump([meter.video_preds, meter.video_labels], file)
    logger.warning(
        "the test list has no labels, so there is no accuracy: the videos' scores are in %s",
        os.path.join(reads.cfg.OUTPUT_DIR, name or "scores.pkl"),
    )
    slowfast_logging.log_json_stats({"split": "test_final"})
    meter.stats = {"split": "test_final", **{f"top{k}_acc": "none" for k in ks}}
