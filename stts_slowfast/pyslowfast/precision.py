"""``TRAIN.MIXED_PRECISION_DTYPE`` inside SlowFast, whose loop has float16 on GPUs alone."""

import contextlib

import torch

from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.pyslowfast.config_access import ours, value

DTYPES = ("", "float16", "bfloat16")


@contextlib.contextmanager
def autocast(cfg):
    """While a job runs, what its loop knows as autocast and GradScaler are those of bfloat16, where
    that is asked for: with float32's range, so that no gradient is scaled, and on CPUs too.

    Raises:
        ValueError: for another type, and for float16 without a GPU.
    """
    mixed = value(cfg, "TRAIN.MIXED_PRECISION", False)
    dtype = ours(cfg, "TRAIN.MIXED_PRECISION_DTYPE") if mixed else ""
    check_choice("TRAIN.MIXED_PRECISION_DTYPE", dtype, DTYPES)
    if dtype == "float16" and not cfg.NUM_GPUS:
        raise ValueError(
            "TRAIN.MIXED_PRECISION_DTYPE is 'float16' and NUM_GPUS is 0, but SlowFast has float16 "
            "on GPUs alone: use 'bfloat16'"
        )
    if dtype != "bfloat16":
        yield
        return
    amp, device = torch.cuda.amp, "cuda" if cfg.NUM_GPUS else "cpu"
    stock = amp.autocast, amp.GradScaler
    amp.autocast = lambda enabled=True: torch.autocast(device, torch.bfloat16, enabled)
    amp.GradScaler = lambda enabled=True: torch.amp.GradScaler(device, enabled=False)
    try:
        yield
    finally:
        amp.autocast, amp.GradScaler = stock
