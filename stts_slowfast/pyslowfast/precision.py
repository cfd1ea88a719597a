"""The keys of this package for precision and compilation, inside SlowFast's loops.

SlowFast trains in float32, and on GPUs in float16; it evaluates in float32.
"""

import contextlib

import torch

from stts_slowfast import evaluation
from stts_slowfast.configfiles.extra_keys import EXTRA_RANGES
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.pyslowfast import run_state
from stts_slowfast.pyslowfast.config_access import extra_key, get_value

KEY = "TRAIN.MIXED_PRECISION_DTYPE"
MATMUL, HALF, COMPILE = "MODEL.FLOAT32_MATMUL_PRECISION", "TEST.PRECISION", "TEST.COMPILE"


@contextlib.contextmanager
def autocast(cfg):
    """Context manager: ``torch.cuda.amp`` autocasts to bfloat16, if the config sets it: on GPUs and
    CPUs, without scaling gradients, because bfloat16 has float32's range.

    Raises:
        ValueError: for another type, and for float16 without a GPU.
    """
    mixed = get_value(cfg, "TRAIN.MIXED_PRECISION", False)
    dtype = extra_key(cfg, KEY) if mixed else ""
    check_choice(KEY, dtype, EXTRA_RANGES[KEY])
    if dtype == "float16" and not cfg.NUM_GPUS:
        raise ValueError(
            f"{KEY} is 'float16' and NUM_GPUS is 0, but SlowFast has float16 only on GPUs: use "
            "'bfloat16'"
        )
    if dtype != "bfloat16":
        yield
        return
    amp, device = torch.cuda.amp, "cuda" if cfg.NUM_GPUS else "cpu"
    original = amp.autocast, amp.GradScaler
    amp.autocast = lambda enabled=True: torch.autocast(device, torch.bfloat16, enabled)
    amp.GradScaler = lambda enabled=True: torch.amp.GradScaler(device, enabled=False)
    try:
        yield
    finally:
        amp.autocast, amp.GradScaler = original


@contextlib.contextmanager
def job(cfg):
    """Context manager: a job runs as `KEY` and `MATMUL` specify.

    Raises:
        ValueError: for a value that a key does not have, and for what SlowFast cannot do.
    """
    check_keys(cfg)
    with evaluation.matmul_precision(extra_key(cfg, MATMUL)), autocast(cfg):
        yield


def evaluating(cfg, model):
    """Context manager: an evaluation of SlowFast's loops runs as `HALF` and `COMPILE` specify; by
    default, as without this package."""
    check_keys(cfg)
    precision, mode = extra_key(cfg, HALF), extra_key(cfg, COMPILE)
    if precision == "float32" and not mode:
        return contextlib.nullcontext()
    return evaluation.evaluating(model, precision, mode)


def check_keys(cfg) -> None:
    """Raises ``ValueError`` for values that cannot be used."""
    for key in (MATMUL, HALF, COMPILE):
        check_choice(key, extra_key(cfg, key), EXTRA_RANGES[key])
    if extra_key(cfg, COMPILE) and get_value(cfg, "DETECTION.ENABLE", False):
        raise ValueError(
            f"{COMPILE} is {extra_key(cfg, COMPILE)!r} and DETECTION.ENABLE is True: each batch "
            f"has another number of boxes, and shapes are static; set {COMPILE} ''"
        )


def log_strict_float32(cfg) -> None:
    """Logs that matrix products of a run on GPUs are in float32 without TF32, if they are."""
    if cfg.NUM_GPUS:
        trains = run_state.is_training(cfg)
        half = cfg.TRAIN.MIXED_PRECISION if trains else extra_key(cfg, HALF) != "float32"
        evaluation.log_strict_float32(trains, half)
