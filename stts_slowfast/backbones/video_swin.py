"""Video Swin (arXiv 2106.13230) from torchvision; its stages are the blocks of ``STTS.*.BLOCKS``.

Between the stages tokens have the shape of their grid, (B, T, H, W, C), without a class token.
Patch merging belongs to the next stage's input, so that a selector sees the grid that its stage
sees.
"""

import re

from fvcore.common.config import CfgNode
from torch import nn
from torchvision.models.video.swin_transformer import SwinTransformer3d

from stts_slowfast.backbones.family import FAMILIES, Family, Format
from stts_slowfast.backbones.state_dict import (
    HAS_AUTHORS_SCORER,
    State,
    has,
    layer_of,
    replace_prefix,
    selectors_from_authors,
    selectors_to_authors,
    swapped,
)


def add_config(cfg) -> None:
    """Adds the node ``VIDEO_SWIN``, Video Swin-T by default; does nothing if it exists."""
    if "VIDEO_SWIN" in cfg:
        return
    cfg.VIDEO_SWIN = type(cfg)()
    # Frames, height and width of a patch.
    cfg.VIDEO_SWIN.PATCH_SIZE = [2, 4, 4]
    # Width of the tokens in the first stage; it doubles from stage to stage.
    cfg.VIDEO_SWIN.EMBED_DIM = 96
    # Blocks per stage.
    cfg.VIDEO_SWIN.DEPTHS = [2, 2, 6, 2]
    # Attention heads per stage.
    cfg.VIDEO_SWIN.NUM_HEADS = [3, 6, 12, 24]
    # Frames, height and width of an attention window, in tokens.
    cfg.VIDEO_SWIN.WINDOW_SIZE = [8, 7, 7]
    # Stochastic depth of the last block; earlier ones have linearly less.
    cfg.VIDEO_SWIN.DROPPATH_RATE = 0.1


def build(cfg: CfgNode) -> SwinTransformer3d:
    """The Video Swin of a config's VIDEO_SWIN and MODEL nodes; clip (B, 3, T, H, W) to logits."""
    node = cfg.VIDEO_SWIN
    if len(node.DEPTHS) != len(node.NUM_HEADS):
        raise ValueError(
            f"VIDEO_SWIN.DEPTHS has {len(node.DEPTHS)} stages but VIDEO_SWIN.NUM_HEADS has "
            f"{len(node.NUM_HEADS)}: give one number of heads per stage"
        )
    model = SwinTransformer3d(
        patch_size=list(node.PATCH_SIZE),
        embed_dim=node.EMBED_DIM,
        depths=list(node.DEPTHS),
        num_heads=list(node.NUM_HEADS),
        window_size=list(node.WINDOW_SIZE),
        stochastic_depth_prob=node.DROPPATH_RATE,
        num_classes=cfg.MODEL.NUM_CLASSES,
    )
    # torchvision has no dropout before the head; here it changes no parameter's name
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(cfg.MODEL.DROPOUT_RATE))
    return model


def block_grids(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """The token grid (T, H, W) that arrives at each stage without selection."""
    size = (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE)
    t, h, w = (-(-s // patch) for s, patch in zip(size, cfg.VIDEO_SWIN.PATCH_SIZE))
    grids = []
    for _ in cfg.VIDEO_SWIN.DEPTHS:
        grids.append((t, h, w))
        h, w = -(-h // 2), -(-w // 2)  # patch merging pads odd sides
    return grids


# --- Video Swin: mmaction's names and torchvision's ---------------------------------------------

_SWIN_BLOCK = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
_SWIN_MERGE = re.compile(r"^layers\.(\d+)\.downsample\.(.+)$")
_FEATURES = re.compile(r"^features\.(\d+)\.(?:(\d+)\.)?(.+)$")
_SWIN_MLP = {"mlp.fc1.": "mlp.0.", "mlp.fc2.": "mlp.3."}


def swin_from_mmaction(state: State) -> State:
    """Video Swin's parameters from mmaction's names, prefixed or not, to torchvision's."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("backbone.").replace("cls_head.fc_cls.", "head.")
        if match := _SWIN_BLOCK.match(key):
            stage, block, rest = match.groups()
            key = f"features.{2 * int(stage)}.{block}.{replace_prefix(rest, _SWIN_MLP)}"
        elif match := _SWIN_MERGE.match(key):
            key = f"features.{2 * int(match.group(1)) + 1}.{match.group(2)}"
        renamed[key] = value
    return renamed


def swin_to_mmaction(state: State) -> State:
    """The inverse of :func:`swin_from_mmaction`, with mmaction's prefixes."""
    mlp = swapped(_SWIN_MLP)
    renamed = {}
    for key, value in state.items():
        match = _FEATURES.match(key)
        if match and int(match.group(1)) % 2 == 0:
            stage, block, rest = match.groups()
            key = f"layers.{int(stage) // 2}.blocks.{block}.{replace_prefix(rest, mlp)}"
        elif match:
            key = f"layers.{int(match.group(1)) // 2}.downsample.{match.group(3)}"
        head = key.startswith("head.")
        renamed[key.replace("head.", "cls_head.fc_cls.") if head else f"backbone.{key}"] = value
    return renamed


_BLOCKS = r"(backbone\.)?layers\.\d+\.blocks\."

FORMATS = {
    "authors-swin": Format(
        "an STTS authors' Video Swin",
        lambda state: has(state, _BLOCKS) and has(state, HAS_AUTHORS_SCORER),
        lambda state, selectors: selectors_from_authors(swin_from_mmaction(state), selectors),
        lambda state: swin_to_mmaction(selectors_to_authors(state)),
        "authors",
        "state_dict",
    ),
    "mmaction-swin": Format(
        "an mmaction Video Swin",
        lambda state: has(state, _BLOCKS),
        lambda state, selectors: swin_from_mmaction(state),
        swin_to_mmaction,
        "mmaction",
        "state_dict",
    ),
    "torchvision-swin": Format(
        "a torchvision Video Swin",
        lambda state: has(state, r"features\.\d+\.\d+\.attn\."),
        lambda state, selectors: state,
        dict,
        "torchvision",
    ),
}


def layer(name: str, depth: int) -> int:
    """The stage for ``SOLVER.LAYER_DECAY``; patch merging belongs to the stage after it."""
    if match := _FEATURES.match(name):
        return (int(match.group(1)) + 1) // 2 + 1
    return layer_of(name, depth)


FAMILIES.register(
    Family(
        "VideoSwin",
        build,
        block_grids,
        add_config,
        models=(SwinTransformer3d,),
        formats=FORMATS,
        layer=layer,
    )
)
