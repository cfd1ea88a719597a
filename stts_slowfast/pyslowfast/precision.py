"""``TRAIN.MIXED_PRECISION_DTYPE`` inside SlowFast, whose loop has only float16, on GPUs."""

import contextlib

import torch

from stts_slowfast.configfiles.extra_keys import EXTRA_RANGES
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.pyslowfast.config_access import extra_key, get_value

KEY = "TRAIN.MIXED_PRECISION_DTYPE"


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
