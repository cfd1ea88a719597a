"""SlowFast's own models and loaders, to benchmark them beside ours."""

import os
import sys

import torch
from torch import Tensor, nn

from stts_slowfast.pyslowfast import autoload, launch
from stts_slowfast.pyslowfast.compat.flops import fairscale_checkpointing_off


def read_config(path: str, opts=()):
    """A config as SlowFast reads it, with NUM_GPUS 0: the caller moves the model.

    Raises:
        FileNotFoundError: if no checkout of SlowFast is found.
        ValueError: naming a file or key that SlowFast does not accept.
    """
    launcher = launch.find_launcher()
    if launcher is None:
        raise FileNotFoundError(
            "found no checkout of SlowFast: set SLOWFAST_ROOT to the root of one, or use "
            "--engine standalone"
        )
    root = os.path.dirname(os.path.dirname(launcher))
    if root not in sys.path:
        sys.path.insert(0, root)
    autoload.register_hooks()
    from slowfast.config.defaults import get_cfg

    cfg = get_cfg()
    try:
        cfg.merge_from_file(path)
        cfg.merge_from_list([str(word) for word in opts])
    except (AssertionError, KeyError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    cfg.NUM_GPUS = 0
    return cfg


def build(cfg) -> nn.Module:
    """SlowFast's model of a config, with selectors if STTS.ENABLE, on clips (B, 3, T, H, W)."""
    from slowfast.models import build_model

    return SingleInput(build_model(cfg), cfg)


def loader(cfg, split: str):
    """SlowFast's loader of a split."""
    from slowfast.datasets.loader import construct_loader

    return construct_loader(cfg, split)


class SingleInput(nn.Module):
    """A SlowFast model that takes clips (B, 3, T, H, W) instead of lists of pathways."""

    def __init__(self, model: nn.Module, cfg):
        super().__init__()
        self.model = model
        self.alpha = cfg.SLOWFAST.ALPHA
        self.two_pathways = cfg.MODEL.ARCH in cfg.MODEL.MULTI_PATHWAY_ARCH

    def forward(self, clips: Tensor) -> Tensor:
        inputs = self.pathways(clips) if self.two_pathways else [clips]
        if not torch.jit.is_tracing():
            return self.model(inputs)
        with fairscale_checkpointing_off():
            return self.model(inputs)

    def pathways(self, clips: Tensor) -> list[Tensor]:
        """Slow and fast, as ``datasets.utils.pack_pathway_output`` samples them."""
        frames = clips.shape[2]
        slow = torch.linspace(0, frames - 1, frames // self.alpha, device=clips.device).long()
        return [clips.index_select(2, slow), clips]
