"""TimeSformer (arXiv 2102.05095): a ViT over frames with divided, joint or space-only attention.

Written from the paper; parameters are named as in the released checkpoints. Between the blocks the
tokens are in frame order: one class token, then T*H*W tokens; ``space_only`` has a class token
before every frame.
"""

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from stts_slowfast.backbones.family import FAMILIES, Family, Format
from stts_slowfast.backbones.state_dict import State, has, patches_are, without_prefix
from stts_slowfast.backbones.timesformer_state_dict import (
    from_transformers,
    is_transformers,
    to_transformers,
)
from stts_slowfast.backbones.vit import (
    Attention,
    Block,
    LayerNorm,
    Mlp,
    drop_path_rates,
    init_xavier,
    sincos_1d,
)
from stts_slowfast.configfiles.values import check_choice


def add_config(cfg) -> None:
    """Adds the node ``TIMESFORMER``, TimeSformer-B by default; does nothing if it exists."""
    if "TIMESFORMER" in cfg:
        return
    cfg.TIMESFORMER = type(cfg)()
    # divided_space_time, joint_space_time or space_only.
    cfg.TIMESFORMER.ATTENTION_TYPE = "divided_space_time"
    # A ViT or TimeSformer checkpoint to start from; empty for random weights.
    cfg.TIMESFORMER.PRETRAINED_MODEL = ""
    # Side of a patch, in pixels.
    cfg.TIMESFORMER.PATCH_SIZE = 16
    # Width of the tokens.
    cfg.TIMESFORMER.EMBED_DIM = 768
    # Number of blocks.
    cfg.TIMESFORMER.DEPTH = 12
    # Attention heads per block.
    cfg.TIMESFORMER.NUM_HEADS = 12
    # Width of the MLP's hidden layer, in widths of the tokens.
    cfg.TIMESFORMER.MLP_RATIO = 4.0
    # Bias in the projections to queries, keys and values.
    cfg.TIMESFORMER.QKV_BIAS = True
    # Stochastic depth of the last block; earlier ones have linearly less.
    cfg.TIMESFORMER.DROPPATH_RATE = 0.1


class DividedBlock(nn.Module):
    """Attention over time at each position, then over space in each frame, then the MLP (section
    3).

    Tokens (B, 1 + T*H*W, C). A position is one in the grid that arrives: after a spatial selection,
    the same position within the frames' windows.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, drop_path: float = 0.0
    ):
        super().__init__()
        self.temporal_norm1 = LayerNorm(dim)
        self.temporal_attn = Attention(dim, num_heads, qkv_bias)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def attend_over_time(self, patches: Tensor) -> Tensor:
        b, t, positions, c = patches.shape
        x = patches.transpose(1, 2).reshape(b * positions, t, c)
        x = self.temporal_fc(self.temporal_attn(self.temporal_norm1(x)))
        return x.reshape(b, positions, t, c).transpose(1, 2)

    def attend_over_space(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        b, t, _, c = patches.shape
        # every frame attends with a copy of the class token; the copies are averaged afterwards
        x = torch.cat([cls[:, None].expand(b, t, 1, c), patches], dim=2)
        x = self.attn(self.norm1(x.flatten(0, 1))).unflatten(0, (b, t))
        return x[:, :, 0].mean(1, keepdim=True), x[:, :, 1:]

    def forward(self, x: Tensor, thw):
        t, h, w = thw
        b, _, c = x.shape
        cls = x[:, :1]
        patches = x[:, 1:].reshape(b, t, h * w, c)
        patches = patches + self.drop_path(self.attend_over_time(patches))
        out_cls, out_patches = self.attend_over_space(cls, patches)
        out = torch.cat([out_cls, out_patches.reshape(b, t * h * w, c)], dim=1)
        x = torch.cat([cls, patches.reshape(b, t * h * w, c)], dim=1) + self.drop_path(out)
        return x + self.drop_path(self.mlp(self.norm2(x))), thw


class SpaceBlock(Block):
    """A block that attends within each frame: tokens (B, T * (1 + H*W), C)."""

    def forward(self, x: Tensor, thw):
        frames = x.reshape(x.shape[0] * thw[0], 1 + thw[1] * thw[2], x.shape[2])
        return super().forward(frames, thw)[0].reshape(x.shape), thw


BLOCKS = {
    "divided_space_time": DividedBlock,
    "joint_space_time": Block,
    "space_only": SpaceBlock,
}


def resize_positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resamples learned positions (1, 1 + side*side, C) to a grid (H, W); the class token's stays.

    Bicubic, as usual for ViT; raises ValueError if the positions do not form a square.
    """
    cls, positions = embedding[:, :1], embedding[:, 1:]
    if positions.shape[1] == grid[0] * grid[1]:
        return embedding
    side = round(positions.shape[1] ** 0.5)
    if side * side != positions.shape[1]:
        raise ValueError(f"{positions.shape[1]} position embeddings do not form a square grid")
    positions = positions.transpose(1, 2).unflatten(2, (side, side))
    positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([cls, positions.flatten(2).transpose(1, 2)], dim=1)


def resize_times(embedding: Tensor, frames: int) -> Tensor:
    """Resamples learned times (1, T, C) to another number of frames, by the nearest frame."""
    if embedding.shape[1] == frames:
        return embedding
    return F.interpolate(embedding.transpose(1, 2), size=frames, mode="nearest").transpose(1, 2)


class FrameEmbed(nn.Module):
    """Cuts every frame of a clip (B, 3, T, H, W) into patches: (B, T, C, H', W')."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, clip: Tensor) -> Tensor:
        b, _, t = clip.shape[:3]
        return self.proj(clip.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t))


class TimeSformer(nn.Module):
    """Clip (B, 3, T, H, W) to logits (B, num_classes).

    ``attention_type`` is ``divided_space_time``, ``joint_space_time`` or ``space_only``. The model
    also accepts clips of another size than it was built for: positions are resampled.
    """

    def __init__(
        self,
        img_size: int = 224,
        num_frames: int = 8,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_classes: int = 400,
        attention_type: str = "divided_space_time",
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_choice("TIMESFORMER.ATTENTION_TYPE", attention_type, BLOCKS)
        self.attention_type = attention_type
        side = img_size // patch_size
        self.patch_embed = FrameEmbed(embed_dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, embed_dim))
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim))
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            BLOCKS[attention_type](embed_dim, num_heads, mlp_ratio, qkv_bias, drop_path=rate)
            for rate in rates
        )
        self.norm = LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(dropout)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Frames have different time embeddings, unless weights are an image model's."""
        init_xavier(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.attention_type != "space_only":
            frames, dim = self.time_embed.shape[1:]
            times = sincos_1d(dim, torch.arange(frames), longest=2 * frames)
            self.time_embed.data.copy_(times)

    def no_weight_decay(self) -> list[str]:
        """Names without weight decay, as in ViT."""
        return ["pos_embed", "cls_token", "time_embed"]

    def embed(self, clip: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens with their positions, and their grid [T, H, W]."""
        x = self.patch_embed(clip)  # (B, T, C, H, W)
        b, t, c, h, w = x.shape
        positions = resize_positions(self.pos_embed, (h, w))
        x = x.flatten(3).transpose(2, 3) + positions[:, None, 1:]  # (B, T, H*W, C)
        cls = self.cls_token + positions[:, :1]
        if self.attention_type == "space_only":
            x = torch.cat([cls[:, None].expand(b, t, 1, c), x], dim=2)
            return x.flatten(1, 2), [t, h, w]
        x = x + resize_times(self.time_embed, t)[:, :, None]
        return torch.cat([cls.expand(b, 1, c), x.flatten(1, 2)], dim=1), [t, h, w]

    def forward(self, clip: Tensor) -> Tensor:
        x, thw = self.embed(clip)
        for block in self.blocks:
            x, thw = block(x, thw)
        if self.attention_type == "space_only":
            # the frames' class tokens are averaged before the last norm
            cls = x.reshape(x.shape[0], thw[0], 1 + thw[1] * thw[2], x.shape[2])[:, :, 0].mean(1)
        else:
            cls = x[:, 0]
        return self.head(self.head_drop(self.norm(cls)))


def build(cfg: CfgNode) -> TimeSformer:
    """The TimeSformer of a config's TIMESFORMER, DATA and MODEL nodes."""
    node = cfg.TIMESFORMER
    return TimeSformer(
        img_size=cfg.DATA.TRAIN_CROP_SIZE,
        num_frames=cfg.DATA.NUM_FRAMES,
        patch_size=node.PATCH_SIZE,
        embed_dim=node.EMBED_DIM,
        depth=node.DEPTH,
        num_heads=node.NUM_HEADS,
        mlp_ratio=node.MLP_RATIO,
        qkv_bias=node.QKV_BIAS,
        num_classes=cfg.MODEL.NUM_CLASSES,
        attention_type=node.ATTENTION_TYPE,
        drop_path=node.DROPPATH_RATE,
        dropout=cfg.MODEL.DROPOUT_RATE,
    )


def block_grids(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """The token grid (T, H, W) that arrives at each block without selection."""
    side = cfg.DATA.TRAIN_CROP_SIZE // cfg.TIMESFORMER.PATCH_SIZE
    return [(cfg.DATA.NUM_FRAMES, side, side)] * cfg.TIMESFORMER.DEPTH


# --- checkpoints ----------------------------------------------------------------------------------


def resize_timesformer(state: State, model: TimeSformer) -> State:
    """Resamples position and time embeddings to the model's number of patches and frames."""
    state = dict(state)
    side = round((model.pos_embed.shape[1] - 1) ** 0.5)
    if "pos_embed" in state:
        state["pos_embed"] = resize_positions(state["pos_embed"], (side, side))
    if "time_embed" in state and model.attention_type != "space_only":
        state["time_embed"] = resize_times(state["time_embed"], model.time_embed.shape[1])
    return state


def init_from_image(state: State, model: TimeSformer) -> State:
    """Adds parameters that image weights lack, so that the model computes what the image model
    does.

    Time embeddings are zero; attention over time is a copy of attention over space, and its last
    layer is zero.
    """
    new = {}
    for key, value in model.state_dict().items():
        if key == "time_embed" or ".temporal_fc." in key:
            new[key] = torch.zeros_like(value, device="cpu")
        elif ".temporal_" in key:
            image = state.get(key.replace(".temporal_", "."))
            if image is not None:
                new[key] = image.clone()
    return {**state, **new}


def _has_time(state: State) -> bool:
    return has(state, r"(model\.)?(time_embed$|blocks\.\d+\.temporal_)")


def from_slowfast(state: State, model: nn.Module) -> State:
    """Positions and times at the model's size; parameters that image weights lack come last."""
    if not isinstance(model, TimeSformer):
        own = model.state_dict()
        if not is_transformers(own):
            return state
        return to_transformers(
            state, "timesformer." if "timesformer.layernorm.weight" in own else ""
        )
    state = resize_timesformer(state, model)
    return state if _has_time(state) else init_from_image(state, model)


FORMATS = {
    "timesformer": Format(
        "a TimeSformer",
        lambda state: patches_are(state, 4) and _has_time(state),
        lambda state, selectors: without_prefix(state, "model."),
        lambda state: {f"model.{key}": value for key, value in state.items()},
        "timesformer",
        "model_state",
    ),
    "timesformer-transformers": Format(
        "a TimeSformer of transformers",
        is_transformers,
        lambda state, selectors: from_transformers(state),
        to_transformers,
        "transformers",
    ),
    "vit-image": Format(
        "ViT image weights (or a space-only TimeSformer)",
        lambda state: patches_are(state, 4) and has(state, r"(model\.)?pos_embed$"),
        lambda state, selectors: without_prefix(state, "model."),
    ),
}

FAMILIES.register(
    Family(
        "TimeSformer",
        build,
        block_grids,
        add_config,
        models=(TimeSformer,),
        formats=FORMATS,
        from_slowfast=from_slowfast,
        pretrained=lambda cfg: cfg.TIMESFORMER.PRETRAINED_MODEL,
    )
)
