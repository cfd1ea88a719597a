"""Replacements in pytorchvideo's MViT, which need not be installed: classes are known by name."""

from typing import Any

from torch import Tensor, cat, nn

from stts_slowfast.fused import ops
from stts_slowfast.fused.attention import AttentionReplacement, split
from stts_slowfast.fused.blocks import BlockReplacement
from stts_slowfast.fused.pooling import find_with, is_fusible

ATTENTION = "pytorchvideo.layers.attention.MultiScaleAttention"
BLOCK = "pytorchvideo.layers.attention.MultiScaleBlock"
DROP_PATH = "pytorchvideo.layers.drop_path.DropPath"
MODEL = "pytorchvideo.models.vision_transformers.MultiscaleVisionTransformers"
POOL = "pytorchvideo.models.head.SequencePool"


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether the class of a module, or one that it derives from, has this dotted name."""
    return name in [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def _is_separate(attn: nn.Module) -> bool:
    """Whether queries, keys and values have a projection each; always so in release 0.1.5."""
    return getattr(attn, "separate_qkv", True)


class PyTorchVideoAttention(AttentionReplacement):
    """Replaces ``pytorchvideo.layers.attention.MultiScaleAttention``."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _is_a(module, ATTENTION)

    def forward(self, x: Tensor, thw_shape):
        return super().forward(x, thw_shape)

    @classmethod
    def fits(cls, attn: nn.Module) -> bool:
        if attn.pool_first:
            return False
        names = ("q", "k", "v") if _is_separate(attn) else ("qkv",)
        linears = [getattr(attn, name) for name in names]
        return all(is_fusible(linear, cls.pools(attn)) for linear in linears)

    def channels(self) -> int:
        linear = self.q if _is_separate(self) or self.pool_first else self.qkv
        return find_with(linear, "in_features").in_features

    def projections(self):
        if _is_separate(self):
            biases = [linear.bias for linear in (self.k, self.v)]
            kv = cat([self.k.weight, self.v.weight]), None if None in biases else cat(biases)
            return (self.q.weight, self.q.bias), kv
        return split(self.qkv)

    def pools(self):
        return [(getattr(self, f"pool_{x}"), getattr(self, f"norm_{x}", None)) for x in "qkv"]

    def tables(self):
        return None, None, None

    def has_cls(self) -> bool:
        return self.has_cls_embed

    def softmax_scale(self) -> float:
        return self.scale

    def residual(self) -> str:
        return "all" if getattr(self, "residual_pool", False) else "none"

    def output(self, x: Tensor) -> Tensor:
        x = ops.linear(x, self.proj.weight, self.proj.bias)
        return self.proj_drop(x) if hasattr(self, "proj_drop") else x


class PyTorchVideoBlock(BlockReplacement):
    """Replaces ``pytorchvideo.layers.attention.MultiScaleBlock``."""

    stochastic = "drop_path"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _is_a(module, BLOCK)

    def forward(self, x: Tensor, thw_shape=None):
        return super().forward(x, thw_shape)

    @classmethod
    def drops_clips(cls, module: nn.Module) -> bool:
        return type(module) is nn.Identity or _is_a(module, DROP_PATH)

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        mlp = block.mlp
        layers: list[Any] = [mlp.fc1, mlp.act, mlp.fc2]
        return layers + [part for part in mlp.children() if isinstance(part, nn.Dropout)]

    def projection(self) -> tuple[nn.Module | None, bool]:
        # Release 0.1.5 widens tokens only in the MLP and lacks the attribute.
        widens_in_attention = getattr(self, "dim_mul_in_att", False)
        return self.proj if self.dim != self.dim_out else None, widens_in_attention

    def skip_pool(self) -> nn.Module | None:
        return self.pool_skip


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that reads the last block's tokens, if the head uses only the cls token."""
    if not _is_a(model, MODEL):
        return None
    pool = getattr(model.head, "sequence_pool", None)
    cls_only = _is_a(pool, POOL) and pool.mode == "cls"
    return model.norm_embed if cls_only and type(model.norm_embed) is nn.LayerNorm else None
