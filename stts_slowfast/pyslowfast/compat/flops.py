"""Counting FLOPs, which SlowFast does before it trains or tests."""

import contextlib
import logging
import sys

from stts_slowfast.pyslowfast.compat import asks_for_us, patch
from stts_slowfast.pyslowfast.patching import wrap


@patch("flop_count")
def patch_flop_count(misc) -> bool:
    """``get_model_stats`` of a model that recomputes its activations by fairscale."""
    wrap(misc, "get_model_stats", _count_plainly)
    return False  # nothing is patched before such a model is counted


@patch("unsupported_operators")
def patch_unsupported_operators(misc) -> bool:
    """``get_model_stats``: about 100 lines of operators that fvcore does not count."""
    wrap(misc, "get_model_stats", _count_quietly)
    return False  # nothing is patched before a config asks for us


def _count_plainly(get_model_stats, *args, **kwargs):
    with recomputing_nothing():
        return get_model_stats(*args, **kwargs)


def _count_quietly(get_model_stats, model, cfg, *args, **kwargs):
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    if asks_for_us(cfg):
        logger.setLevel(logging.ERROR)
    try:
        return get_model_stats(model, cfg, *args, **kwargs)
    finally:
        logger.setLevel(level)


def recomputing_nothing():
    """A context in which fairscale's ``checkpoint_wrapper``, which no trace takes, does nothing."""
    fairscale = sys.modules.get("fairscale.nn.checkpoint.checkpoint_activations")
    if fairscale is None:
        return contextlib.nullcontext()
    return fairscale.disable_checkpointing()
