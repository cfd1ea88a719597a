"""Videos that cannot be read inside SlowFast: waited for only so long, written down, never scored.

In training and validation SlowFast takes another one. In testing it asks for the same a hundred
times and ends without its name; here black frames with the label ``UNREADABLE`` take its place, and
the test ends with the list, or with both accuracies where ``TEST.ALLOW_MISSING``.
"""

from functools import partial

import numpy as np
import torch

from stts_slowfast.pyslowfast import decoder as reader
from stts_slowfast.pyslowfast.compat import mend
from stts_slowfast.pyslowfast.wrap import wrap
from stts_slowfast.video import VideoError, within
from stts_slowfast.video.badvideos import (
    UNREADABLE,
    BadVideos,
    Finding,
    require_none,
    written,
)
from stts_slowfast.video.files import require_regular

# The dataset and the path that this process reads now; the test set that it tests by.
_now = {}
_BLACK = object()  # stands for the container of a test video that cannot be read


@mend
def mend_bad_videos(kinetics) -> bool:
    """Kinetics' opening and decoding of files (``slowfast/datasets/kinetics.py``)."""
    if hasattr(kinetics.Kinetics.__getitem__, "stock"):
        return False
    wrap(kinetics.Kinetics, "_construct_loader", _note_test_set)
    wrap(kinetics.Kinetics, "__getitem__", _get_item)
    wrap(kinetics.container, "get_video_container", _open)
    wrap(kinetics.decoder, "decode", _decode)
    return True


def wrap_meters(meters) -> None:
    """``TestMeter`` of ``slowfast/utils/meters.py``: what cannot be read counts as wrong."""
    wrap(meters.TestMeter, "update_stats", _update_stats)
    wrap(meters.TestMeter, "finalize_metrics", _finalize)


def stats(given: dict, folder: str | None) -> dict:
    """What an epoch's or a test's line of ``json_stats`` gains."""
    if given.get("split") == "test_final":
        return _now.get("accuracy", {})
    if folder and str(given.get("_type")).endswith("_epoch"):
        return {kind: len(written(folder, kind)) for kind in ("unreadable", "damaged")}
    return {}


def _note_test_set(construct_loader, dataset):
    construct_loader(dataset)
    dataset.bad = BadVideos(dataset.cfg, dataset.mode)
    dataset.unreadable = {}  # path: reason, as far as this process knows
    if dataset.mode == "test":
        _now["test"] = dataset


def _get_item(getitem, dataset, index):
    _now["dataset"] = dataset
    try:
        frames, label, *rest = getitem(dataset, index)
    finally:
        _now.pop("dataset")
    return frames, UNREADABLE if _now.get("black") else label, *rest


def _open(get_video_container, path, *args, **kwargs):
    dataset = _now.get("dataset")
    if dataset is None:
        return get_video_container(path, *args, **kwargs)
    _now.update(path=path, black=False)
    if path not in dataset.unreadable:
        try:
            require_regular(path)
            seconds = dataset.cfg.DATA.READ_TIMEOUT
            return within(seconds, path, partial(get_video_container, path, *args, **kwargs))
        except Exception as error:
            _note("unreadable", getattr(error, "reason", str(error)))
    if dataset.mode == "test":
        return _BLACK
    raise VideoError(path, dataset.unreadable[path])


def _decode(decode, container, *args, **kwargs):
    dataset = _now.get("dataset")
    if dataset is None:
        return decode(container, *args, **kwargs)
    found, path = (None, None, None), _now["path"]
    if container is not _BLACK:
        reader.finding = None
        try:
            call = partial(decode, container, *args, **kwargs)
            found = within(dataset.cfg.DATA.READ_TIMEOUT, path, call)
        except VideoError as error:
            reader.abandon()
            reader.finding = "unreadable", error.reason
        if found[0] is None and not reader.finding:
            reader.finding = "unreadable", "SlowFast's decoder gives nothing"
        if reader.finding:
            _note(*reader.finding)
    if found[0] is not None or dataset.mode != "test":
        return found
    _now["black"] = True
    side = dataset.cfg.DATA.TEST_CROP_SIZE
    frames = torch.zeros(dataset.cfg.DATA.NUM_FRAMES, side, side, 3, dtype=torch.uint8)
    return [frames], np.zeros((1, 3)), [0]


def _note(kind: str, reason: str) -> None:
    dataset, path = _now["dataset"], _now["path"]
    if kind == "unreadable":
        dataset.unreadable[path] = reason
    epoch = int(dataset.epoch) if dataset.mode == "train" else None
    index = dataset._path_to_videos.index(path)
    dataset.bad.add([Finding(index, path, kind, reason)], epoch)


def _update_stats(update_stats, meter, preds, labels, clip_ids):
    """A video that is unreadable in one view is so in all, whichever comes last."""
    videos = clip_ids // meter.num_clips
    if not hasattr(meter, "unreadable"):
        meter.unreadable = set()
    meter.unreadable |= set(videos[labels == UNREADABLE].tolist())
    gone = torch.tensor([video in meter.unreadable for video in videos.tolist()])
    meter.video_labels[videos[gone]] = UNREADABLE
    update_stats(meter, preds, labels.masked_fill(gone, UNREADABLE), clip_ids)


def _finalize(finalize_metrics, meter, ks=(1, 5)):
    missing, dataset = sorted(getattr(meter, "unreadable", ())), _now.get("test")
    if dataset is None:
        return finalize_metrics(meter, ks)
    folder, paths = dataset.cfg.OUTPUT_DIR, dataset._path_to_videos[:: meter.num_clips]
    damaged = written(folder, "damaged").keys() & set(paths)
    _now["accuracy"] = {"unreadable": len(missing), "damaged": len(damaged)}
    if missing:
        reasons = written(folder, "unreadable")
        if len(missing) == len(paths) or not dataset.cfg.TEST.ALLOW_MISSING:
            require_none({paths[n]: reasons.get(paths[n], "unknown") for n in missing}, folder)
        from slowfast.utils.metrics import topks_correct

        readable = meter.video_labels != UNREADABLE
        correct = topks_correct(meter.video_preds[readable], meter.video_labels[readable], ks)
        for k, count in zip(ks, correct):
            share = 100.0 * count / readable.sum()
            _now["accuracy"][f"top{k}_acc_readable"] = f"{share:.2f}"
    return finalize_metrics(meter, ks)
