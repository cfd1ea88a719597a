"""Plain vision transformers as SlowFast's MVIT node describes them: no pooling, joint attention.

torchvision's MViT cannot pool the patch tokens instead of reading the class token, so the ViT-B, -L
and -H of SlowFast's ``masked_ssl`` configs are built here. Parameters are named as in SlowFast,
whose checkpoints load directly.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` for q, k, v of shape (B, heads, N, d).

    Under tracing the products are explicit, because fvcore counts them and cannot see into the
    fused kernel.
    """
    if torch.jit.is_tracing():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block: from 0 in the first, linearly, to ``last`` in the last."""
    return [last * block / max(depth - 1, 1) for block in range(depth)]


class Attention(nn.Module):
    """Multi-head self-attention over a sequence (B, N, C)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, C / heads)
        x = attend(q, k, v).transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """A pre-norm transformer block over all tokens (B, N, C); ``thw`` passes through unchanged."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, dropout)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x: Tensor, thw):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x))), thw


def init_xavier(model: nn.Module) -> None:
    """Initialises linear layers as ViT (arXiv 2010.11929), at any width; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def sincos_1d(dim: int, positions: Tensor, longest: float = 10000.0) -> Tensor:
    """Sines, then cosines, of positions (N,) at ``dim / 2`` wavelengths from 2 pi to less than
    ``longest`` times that (arXiv 1706.03762, section 3.5)."""
    rates = longest ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)  # (N, dim)


def sincos_3d(dim: int, grid: tuple[int, int, int]) -> Tensor:
    """Fixed positions (T*H*W, dim): a quarter of the channels for time, then column, then row."""
    if dim % 16:
        raise ValueError(f"sin-cos positions need a width divisible by 16, got {dim}")
    t, y, x = (i.flatten() for i in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    space = dim // 4 * 3
    parts = [sincos_1d(dim // 4, t), sincos_1d(space // 2, x), sincos_1d(space // 2, y)]
    return torch.cat(parts, dim=1).float()


class PatchEmbed(nn.Module):
    """Cuts a clip (B, 3, T, H, W) into patches and embeds each: tokens (B, T'*H'*W', C)."""

    def __init__(self, dim: int, kernel, stride, padding):
        super().__init__()
        self.proj = nn.Conv3d(3, dim, tuple(kernel), tuple(stride), tuple(padding))

    def forward(self, clip: Tensor) -> tuple[Tensor, list[int]]:
        x = self.proj(clip)
        return x.flatten(2).transpose(1, 2), list(x.shape[2:])


class ViT(nn.Module):
    """A plain vision transformer over space-time patches: clip (B, 3, T, H, W) to logits (B, K).

    Args:
        cfg: its nodes MVIT, DATA and MODEL; positions are learned for space and time apart
            (``SEP_POS_EMBED``) or a vector a token, fixed (``USE_FIXED_SINCOS_POS``), or none.
    """

    def __init__(self, cfg: CfgNode):
        super().__init__()
        node, dim = cfg.MVIT, cfg.MVIT.EMBED_DIM
        self.zero_decay_positions = node.ZERO_DECAY_POS_CLS
        self.grid, self.positions = vit_grid(cfg), _positions(node)
        self.class_token, self.mean_pooling = node.CLS_EMBED_ON, node.USE_MEAN_POOLING
        self.patch_embed = PatchEmbed(dim, node.PATCH_KERNEL, node.PATCH_STRIDE, node.PATCH_PADDING)
        if self.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self._add_positions(dim)
        self.pos_drop = nn.Dropout(node.DROPOUT_RATE)
        settings = node.NUM_HEADS, node.MLP_RATIO, node.QKV_BIAS, node.DROPOUT_RATE
        rates = drop_path_rates(node.DROPPATH_RATE, node.DEPTH)
        self.blocks = nn.ModuleList(Block(dim, *settings, rate) for rate in rates)
        self.norm = LayerNorm(dim)
        dropout = nn.Dropout(cfg.MODEL.DROPOUT_RATE)
        projection = nn.Linear(dim, cfg.MODEL.NUM_CLASSES)
        self.head = nn.Sequential(OrderedDict(dropout=dropout, projection=projection))
        self._init_weights(node.HEAD_INIT_SCALE)

    def _add_positions(self, dim: int) -> None:
        t, h, w = self.grid
        if self.positions == "separate":
            self.pos_embed_spatial = nn.Parameter(torch.zeros(1, h * w, dim))
            self.pos_embed_temporal = nn.Parameter(torch.zeros(1, t, dim))
            if self.class_token:
                self.pos_embed_class = nn.Parameter(torch.zeros(1, 1, dim))
        elif self.positions in ("joint", "sincos"):
            tokens = t * h * w + int(self.class_token)
            learned = self.positions == "joint"
            self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=learned)

    def _init_weights(self, head_init_scale: float) -> None:
        for name, parameter in self.named_parameters():
            if name.startswith(("pos_embed", "cls_token")) or name.endswith("weight"):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif not name.startswith("patch_embed"):
                nn.init.constant_(parameter, 0.02)  # SlowFast initialises every bias so
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
        if self.positions == "sincos":
            tokens = sincos_3d(self.pos_embed.shape[-1], self.grid)
            with torch.no_grad():
                self.pos_embed.zero_()[:, int(self.class_token) :] = tokens
        with torch.no_grad():
            self.head.projection.weight.mul_(head_init_scale)
            self.head.projection.bias.mul_(head_init_scale)

    def position_embedding(self) -> Tensor | float:
        """Positions that are added to the tokens, (1, [1+]T*H*W, C)."""
        if self.positions == "none":
            return 0.0
        if self.positions == "joint":
            return self.pos_embed
        if self.positions == "sincos":
            return 2 * self.pos_embed  # SlowFast adds fixed positions twice
        t, h, w = self.grid
        space = self.pos_embed_spatial.repeat(1, t, 1)
        time = self.pos_embed_temporal.repeat_interleave(h * w, dim=1)
        if not self.class_token:
            return space + time
        return torch.cat([self.pos_embed_class, space + time], dim=1)

    def no_weight_decay(self) -> list[str]:
        """Names without weight decay by ``MVIT.ZERO_DECAY_POS_CLS``."""
        names = [name for name, _ in self.named_parameters()] if self.zero_decay_positions else []
        return [name for name in names if name.startswith(("pos_embed", "cls_token"))]

    def forward(self, clip: Tensor) -> Tensor:
        x, thw = self.patch_embed(clip)
        if tuple(map(int, thw)) != self.grid:
            raise ValueError(
                f"the clip has a token grid of {tuple(map(int, thw))}, but the model was built "
                f"for {self.grid}: set DATA.NUM_FRAMES and DATA.TRAIN_CROP_SIZE to the clip's size"
            )
        if self.class_token:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = self.pos_drop(x + self.position_embedding())
        for block in self.blocks:
            x, thw = block(x, thw)
        if self.mean_pooling:
            x = self.norm(x[:, int(self.class_token) :].mean(1))
        elif self.class_token:
            x = self.norm(x)[:, 0]
        else:
            x = self.norm(x).mean(1)
        return self.head(x)


def is_plain_vit(cfg: CfgNode) -> bool:
    """Whether the MVIT node is a plain ViT: no pooling, widening or relative positions."""
    node = cfg.MVIT
    pools = node.POOL_Q_STRIDE or node.POOL_KV_STRIDE or node.POOL_KV_STRIDE_ADAPTIVE
    widens = node.DIM_MUL or node.HEAD_MUL
    others = (
        node.REL_POS_SPATIAL,
        node.REL_POS_TEMPORAL,
        node.RESIDUAL_POOLING,
        node.POOL_FIRST,
        node.SEPARATE_QKV,
        node.PATCH_2D,
        node.NORM_STEM,
        node.REV.ENABLE,
    )
    return not (pools or widens or any(others))


def vit_grid(cfg: CfgNode) -> tuple[int, int, int]:
    """The token grid (T, H, W) after the patch embedding."""
    size = (cfg.DATA.NUM_FRAMES, cfg.DATA.TRAIN_CROP_SIZE, cfg.DATA.TRAIN_CROP_SIZE)
    node = cfg.MVIT
    return tuple(
        (s + 2 * pad - kernel) // stride + 1
        for s, kernel, stride, pad in zip(
            size, node.PATCH_KERNEL, node.PATCH_STRIDE, node.PATCH_PADDING
        )
    )


def _positions(node: CfgNode) -> str:
    if not node.USE_ABS_POS:
        return "none"
    if node.SEP_POS_EMBED:
        return "separate"
    return "sincos" if node.USE_FIXED_SINCOS_POS else "joint"


def build(cfg: CfgNode) -> ViT:
    """The plain ViT of an MVIT node, see :func:`is_plain_vit`.

    Raises:
        ValueError: for ``LAYER_SCALE_INIT_VALUE``, which this ViT does not have.
    """
    node = cfg.MVIT
    if node.LAYER_SCALE_INIT_VALUE:
        raise ValueError(
            f"MVIT.LAYER_SCALE_INIT_VALUE is {node.LAYER_SCALE_INIT_VALUE}, but this ViT has no "
            "LayerScale: set it to 0.0, or run inside SlowFast"
        )
    return ViT(cfg)


def block_grids(cfg: CfgNode) -> list[tuple[int, int, int]]:
    """The token grid (T, H, W) that arrives at each block without selection."""
    return [vit_grid(cfg)] * cfg.MVIT.DEPTH
