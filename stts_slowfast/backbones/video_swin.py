"""Video Swin (arXiv 2106.13230) from torchvision; its stages are the blocks of ``STTS.*.BLOCKS``.

Between the stages the tokens lie on their grid, (B, T, H, W, C), without a class token. A stage's
patch merging belongs to the way to the next stage, so that a selector sees the grid its stage sees.
"""

from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d


class CroppedWindowAttention(ShiftedWindowAttention3d):
    """Window attention whose relative positions stay true where the grid is smaller than a window.

    torchvision, like Video Swin, then takes the first rows of its index, which belong to other
    places unless only frames are missing. After a spatial selection grids get that small.
    """

    def get_relative_position_bias(self, window_size: list[int]) -> Tensor:
        """The bias (1, heads, N, N) of a window of N tokens, (frames, rows, columns)."""
        t, h, w = window_size
        index = self.relative_position_index.view(*self.window_size, *self.window_size)
        index = index[:t, :h, :w, :t, :h, :w].reshape(t * h * w, t * h * w)
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None]


def _cropped_block(*args, **kwargs) -> SwinTransformerBlock:
    return SwinTransformerBlock(*args, **{**kwargs, "attn_layer": CroppedWindowAttention})


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
        block=_cropped_block if _selects_windows(cfg) else None,
    )
    # torchvision has no dropout before the head; here it changes no parameter's name
    model.avgpool = nn.Sequential(model.avgpool, nn.Dropout(cfg.MODEL.DROPOUT_RATE))
    return model


def _selects_windows(cfg: CfgNode) -> bool:
    stts = cfg.get("STTS")
    return bool(stts and stts.ENABLE and stts.TRUE_DISTANCES and stts.SPACE.BLOCKS)


def block_grids(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """The token grid (T, H, W) that arrives at each stage without selection."""
    size = (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE)
    t, h, w = (-(-s // patch) for s, patch in zip(size, cfg.VIDEO_SWIN.PATCH_SIZE))
    grids = []
    for _ in cfg.VIDEO_SWIN.DEPTHS:
        grids.append((t, h, w))
        h, w = -(-h // 2), -(-w // 2)  # patch merging pads odd sides
    return grids
