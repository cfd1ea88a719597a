"""FLOP counting, which SlowFast does before it trains or tests."""

import contextlib
import logging
import sys

from stts_slowfast.pyslowfast.compat import patch, uses_stts
from stts_slowfast.pyslowfast.patching import wrap


@patch("flop_count")
def patch_flop_count(misc) -> bool:
    """``get_model_stats`` cannot trace fairscale's activation checkpointing."""
    wrap(misc, "get_model_stats", _without_checkpointing)
    return False  # it has no effect on other models


@patch("unsupported_operators")
def patch_unsupported_operators(misc) -> bool:
    """``get_model_stats`` logs about 100 lines of operators that fvcore does not count."""
    wrap(misc, "get_model_stats", _without_warnings)
    return False  # it has no effect on runs without STTS


def _without_checkpointing(get_model_stats, *args, **kwargs):
    with fairscale_checkpointing_off():
        return get_model_stats(*args, **kwargs)


def _without_warnings(get_model_stats, model, cfg, *args, **kwargs):
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    if uses_stts(cfg):
        logger.setLevel(logging.ERROR)
    try:
        return get_model_stats(model, cfg, *args, **kwargs)
    finally:
        logger.setLevel(level)


def fairscale_checkpointing_off():
    """Context in which fairscale's ``checkpoint_wrapper``, which cannot be traced, does nothing."""
    fairscale = sys.modules.get("fairscale.nn.checkpoint.checkpoint_activations")
    if fairscale is None:
        return contextlib.nullcontext()
    return fairscale.disable_checkpointing()
