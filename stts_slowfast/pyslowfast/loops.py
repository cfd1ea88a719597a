"""The functions of SlowFast's ``tools/train_net.py`` and ``test_net.py``, each with its patches.

They have everything at hand that a loop needs: loader, model, meter and config. A file of the same
name that is none of a checkout of SlowFast is left alone.
"""

import contextlib
import inspect
from functools import partial

from stts_slowfast.pyslowfast import error_log, run_state
from stts_slowfast.pyslowfast.compat import patch
from stts_slowfast.pyslowfast.compat.devices import quiet_synchronize
from stts_slowfast.pyslowfast.compat.tools import is_a_tool
from stts_slowfast.pyslowfast.patching import wrap

# Functions, with the names of their loader and their meter and the split that they go through.
LOOPS = {
    "train_epoch": ("train_loader", "train_meter", "train"),
    "eval_epoch": ("val_loader", "val_meter", "val"),
    "perform_test": ("test_loader", "test_meter", "test"),
}


def wrap_jobs(tool) -> None:
    """``train`` and ``test``, which notebooks call without the launcher."""
    for name in ("train", "test"):
        job = getattr(tool, name, None)
        if _is_slowfasts(tool) and job and list(inspect.signature(job).parameters) == ["cfg"]:
            wrap(tool, name, _run_job)


@patch("bad_videos")
def patch_bad_videos(tool) -> bool:
    """The loops over ``Kinetics``: what cannot be read is accounted for."""
    for name in LOOPS:
        if _is_slowfasts(tool) and hasattr(tool, name):
            wrap(tool, name, _keep_account)
    return False  # what cannot be read is noted by what opens the files


@patch("cuda_synchronize")
def patch_cuda_synchronize(train_net) -> bool:
    """``torch.cuda.synchronize()`` after every iteration, whatever ``NUM_GPUS`` is."""
    import torch

    here = _is_slowfasts(train_net) and hasattr(train_net, "train_epoch")
    if torch.cuda.is_available() or not here:
        return False
    wrap(train_net, "train_epoch", _train_quietly)
    return True


@patch("ava_test")
def patch_ava_test(test_net) -> bool:
    """AVA's meter in testing: ``perform_test`` ends each iteration for it a second time."""
    if not (_is_slowfasts(test_net) and hasattr(test_net, "perform_test")):
        return False
    wrap(test_net, "perform_test", _test_detection)
    return True


def _is_slowfasts(tool) -> bool:
    path = getattr(tool, "__file__", None)
    return is_a_tool(path, "train_net") or is_a_tool(path, "test_net")


def _arguments(function, args, kwargs) -> dict:
    return inspect.signature(function).bind(*args, **kwargs).arguments


def _run_job(function, cfg):
    with run_state.started(cfg, function), quiet_synchronize(cfg):
        return function(cfg)


def _keep_account(loop, *args, **kwargs):
    loader, meter, mode = LOOPS[loop.__name__]
    call = _arguments(loop, args, kwargs)
    with error_log.account(call[loader], call[meter], mode):
        return loop(*args, **kwargs)


def _train_quietly(train_epoch, *args, **kwargs):
    with quiet_synchronize(_arguments(train_epoch, args, kwargs)["cfg"]):
        return train_epoch(*args, **kwargs)


def _test_detection(perform_test, *args, **kwargs):
    call = _arguments(perform_test, args, kwargs)
    with _asked_once(call["test_meter"]) if call["cfg"].DETECTION.ENABLE else _as_it_is():
        return perform_test(*args, **kwargs)


_as_it_is = contextlib.nullcontext


@contextlib.contextmanager
def _asked_once(meter):
    """The second time an iteration ends, the meter's timers stand already, the epoch is missing,
    and what it is to collect are indices of videos, where it collects boxes."""
    methods = {"iter_toc": _pause_once, "log_iter_stats": _log, "update_stats": _collect_boxes}
    for name, ours in methods.items():
        setattr(meter, name, partial(ours, getattr(meter, name), meter))
    try:
        yield
    finally:
        for name in methods:
            vars(meter).pop(name, None)


def _pause_once(iter_toc, meter):
    if not meter.iter_timer.is_paused():
        iter_toc()


def _log(log_iter_stats, meter, *args):
    if len(args) > 1:
        log_iter_stats(*args)


def _collect_boxes(update_stats, meter, preds, ori_boxes, metadata):
    # A box has its video and its second: (boxes, 2). Indices of videos are (videos,).
    if metadata.dim() > 1:
        update_stats(preds, ori_boxes, metadata)
