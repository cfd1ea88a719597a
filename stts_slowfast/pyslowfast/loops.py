"""Wraps the functions of SlowFast's ``tools/train_net.py`` and ``test_net.py``.

A file of the same name that does not belong to a checkout of SlowFast is not changed.
"""

import contextlib
import inspect

from stts_slowfast.pyslowfast import error_log, run_state
from stts_slowfast.pyslowfast.compat import patch, switched_off
from stts_slowfast.pyslowfast.compat.tools import is_tool_file
from stts_slowfast.pyslowfast.patching import replaced_methods, wrap

# Function to its arguments for the loader and the meter, and its split.
LOOPS = {
    "train_epoch": ("train_loader", "train_meter", "train"),
    "eval_epoch": ("val_loader", "val_meter", "val"),
    "perform_test": ("test_loader", "test_meter", "test"),
}


def wrap_jobs(tool) -> None:
    """``train`` and ``test``, which notebooks call without the launcher."""
    for name in ("train", "test"):
        job = getattr(tool, name, None)
        if _is_loop_file(tool) and job and list(inspect.signature(job).parameters) == ["cfg"]:
            wrap(tool, name, _run_job)


def wrap_evaluation(tool) -> None:
    """Validations and tests run as TEST.PRECISION and TEST.COMPILE specify."""
    for name in ("eval_epoch", "perform_test"):
        if _is_loop_file(tool) and hasattr(tool, name):
            wrap(tool, name, _evaluate)


@patch("bad_videos")
def patch_bad_videos(tool) -> bool:
    """The loops over ``Kinetics`` keep track of videos that cannot be read."""
    for name in LOOPS:
        if _is_loop_file(tool) and hasattr(tool, name):
            wrap(tool, name, _track_errors)
    return False  # reported by the patch of the dataset


@patch("cuda_synchronize")
def patch_cuda_synchronize(train_net) -> bool:
    """``train_epoch`` calls ``torch.cuda.synchronize()`` in every iteration, also on a CPU."""
    import torch

    has_loop = _is_loop_file(train_net) and hasattr(train_net, "train_epoch")
    if torch.cuda.is_available() or not has_loop:
        return False
    wrap(train_net, "train_epoch", _train_epoch)
    return True


@patch("ava_test")
def patch_ava_test(test_net) -> bool:
    """``perform_test`` updates AVA's meter twice in each iteration, the second time wrongly."""
    if not (_is_loop_file(test_net) and hasattr(test_net, "perform_test")):
        return False
    wrap(test_net, "perform_test", _perform_test)
    return True


def _is_loop_file(tool) -> bool:
    path = getattr(tool, "__file__", None)
    return is_tool_file(path, "train_net") or is_tool_file(path, "test_net")


def _arguments(function, args, kwargs) -> dict:
    return inspect.signature(function).bind(*args, **kwargs).arguments


@contextlib.contextmanager
def skip_cuda_synchronize(cfg):
    """Context manager: ``torch.cuda.synchronize()`` does nothing with NUM_GPUS 0 and no CUDA."""
    import torch

    if cfg.NUM_GPUS or "cuda_synchronize" in switched_off() or torch.cuda.is_available():
        yield
        return
    original = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = original


def _run_job(function, cfg):
    with run_state.enter_job(cfg, function), skip_cuda_synchronize(cfg):
        return function(cfg)


def _evaluate(loop, *args, **kwargs):
    from stts_slowfast.pyslowfast import precision

    call = _arguments(loop, args, kwargs)
    with precision.evaluating(call["cfg"], call["model"]):
        return loop(*args, **kwargs)


def _track_errors(loop, *args, **kwargs):
    loader, meter, split = LOOPS[loop.__name__]
    call = _arguments(loop, args, kwargs)
    with error_log.track_errors(call[loader], call[meter], split):
        return loop(*args, **kwargs)


def _train_epoch(train_epoch, *args, **kwargs):
    with skip_cuda_synchronize(_arguments(train_epoch, args, kwargs)["cfg"]):
        return train_epoch(*args, **kwargs)


def _perform_test(perform_test, *args, **kwargs):
    call = _arguments(perform_test, args, kwargs)
    if not call["cfg"].DETECTION.ENABLE:
        return perform_test(*args, **kwargs)
    with replaced_methods(call["test_meter"], _AVA_METER):
        return perform_test(*args, **kwargs)


def _iter_toc(iter_toc, meter):
    if not meter.iter_timer.is_paused():
        iter_toc()


def _log_iter_stats(log_iter_stats, meter, *args):
    if len(args) > 1:  # the second call lacks the epoch
        log_iter_stats(*args)


def _update_stats(update_stats, meter, preds, ori_boxes, metadata):
    # Boxes have a video and a second: (boxes, 2). The second call has video indices (videos,).
    if metadata.dim() > 1:
        update_stats(preds, ori_boxes, metadata)


_AVA_METER = {
    "iter_toc": _iter_toc,
    "log_iter_stats": _log_iter_stats,
    "update_stats": _update_stats,
}
