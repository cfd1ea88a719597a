"""One file a family: builds it from a SlowFast config, and says how its tokens lie."""

import importlib

from torch import nn

# MODEL.MODEL_NAME -> the family's file. Each has build(cfg), the model that maps clips
# (B, 3, T, H, W) to logits (B, MODEL.NUM_CLASSES), and block_grids(cfg), the token grid (T, H, W)
# that arrives at each block.
FAMILIES = {
    "MViT": "mvit",
    "TimeSformer": "timesformer",
    "VideoSwin": "video_swin",
}


def build(cfg) -> nn.Module:
    """Builds ``cfg.MODEL.MODEL_NAME`` without selectors, with random weights.

    Raises:
        ValueError: for an unknown name or a setting that the family cannot express.
    """
    return _family(cfg).build(cfg)


def block_grids(cfg) -> list[tuple[int, int, int]]:
    """The token grid ``(T, H, W)`` that arrives at each block when nothing is selected.

    Raises:
        ValueError: for an unknown ``MODEL.MODEL_NAME``.
    """
    return _family(cfg).block_grids(cfg)


def _family(cfg):
    name = cfg.MODEL.MODEL_NAME
    if name not in FAMILIES:
        raise ValueError(f"MODEL.MODEL_NAME is {name!r}: use one of {', '.join(FAMILIES)}")
    file = FAMILIES[name]
    if file == "mvit" and importlib.import_module(f"{__name__}.vit").is_plain_vit(cfg):
        file = "vit"  # what torchvision's MViT cannot express
    return importlib.import_module(f"{__name__}.{file}")
