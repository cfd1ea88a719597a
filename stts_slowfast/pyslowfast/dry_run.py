"""Dry run at build time: a forward pass on ``meta`` finds models in which selection fails.

It takes milliseconds to a second, and no memory.
"""

import copy
import logging
import traceback

import torch
from torch import Tensor, nn

from stts_slowfast.hooks import selections

logger = logging.getLogger(__name__)


def check_forward(model: nn.Module, cfg) -> None:
    """Runs a copy of a model with selectors on one clip of the config's size, on ``meta``.

    Models that cannot be copied or run on ``meta`` are skipped.

    Args:
        model: takes a list of pathways, and boxes with DETECTION.ENABLE, as SlowFast's do.
        cfg: with ``DATA``; the clip has ``DATA.NUM_FRAMES`` frames of ``DATA.TRAIN_CROP_SIZE``.

    Raises:
        ValueError: raised by a selector in the forward pass, or if a selector gets no tokens.
    """
    try:
        meta = _meta_copy(model).eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            meta(*_inputs(cfg))
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by_us(error):
            raise
        logger.debug("No dry run of %s: %s: %s", type(model).__name__, type(error).__name__, error)
        return
    try:
        selections(meta)
    except ValueError as error:
        raise ValueError(
            f"a forward pass of {type(model).__name__} skips selectors ({error}): call each block "
            "once, as a module, x, thw = block(x, thw)"
        ) from None


def _meta_copy(model: nn.Module) -> nn.Module:
    memo = {}
    for tensor in (*model.parameters(), *model.buffers()):
        copied = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=False)
        memo[id(tensor)] = copied
    return copy.deepcopy(model, memo)


def _inputs(cfg) -> tuple[list[Tensor], ...]:
    side = cfg.DATA.TRAIN_CROP_SIZE
    images = "imagenet" in cfg.TRAIN.DATASET
    size = (1, 3, side, side) if images else (1, 3, cfg.DATA.NUM_FRAMES, side, side)
    clips = [torch.empty(size, device="meta")]
    if cfg.DETECTION.ENABLE:
        return clips, torch.empty(1, 5, device="meta")
    return (clips,)


def _raised_by_us(error: Exception) -> bool:
    """Whether this package raised it."""
    frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
    return frame.f_globals.get("__name__", "").startswith("stts_slowfast.")
