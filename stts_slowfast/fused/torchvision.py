"""Replacements in torchvision's MViT."""

from torch import Tensor, arange, nn
from torchvision.models.video.mvit import MultiscaleAttention, MultiscaleBlock, MViT
from torchvision.ops import MLP, StochasticDepth

from stts_slowfast.fused import ops
from stts_slowfast.fused.attention import AttentionReplacement, split
from stts_slowfast.fused.blocks import BlockReplacement
from stts_slowfast.fused.pooling import find_with, is_fusible


class TorchvisionAttention(AttentionReplacement):
    """Replaces ``torchvision.models.video.mvit.MultiscaleAttention``."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, MultiscaleAttention)

    @classmethod
    def fits(cls, attn: nn.Module) -> bool:
        pools = [pool for pool in (attn.pool_q, attn.pool_k, attn.pool_v) if pool is not None]
        if any(pool.norm_before_pool or len(pool.norm_act or ()) > 1 for pool in pools):
            return False
        return is_fusible(attn.qkv, cls.pools(attn))

    def channels(self) -> int:
        return find_with(self.qkv, "in_features").in_features

    def projections(self):
        return split(self.qkv)

    def pools(self):
        pools = (self.pool_q, self.pool_k, self.pool_v)
        return [
            (None, None)
            if pool is None
            else (pool.pool, pool.norm_act[0] if pool.norm_act else None)
            for pool in pools
        ]

    def tables(self):
        return self.rel_pos_t, self.rel_pos_h, self.rel_pos_w

    def has_cls(self) -> bool:
        return True

    def softmax_scale(self) -> float:
        return self.scaler

    def residual(self) -> str:
        if not self.residual_pool:
            return "none"
        return "all" if self.residual_with_cls_embed else "patches"

    def output(self, x: Tensor) -> Tensor:
        linear, *dropout = self.project
        x = ops.linear(x, linear.weight, linear.bias)
        return dropout[0](x) if dropout else x

    def project_and_pool(self, x: Tensor, thw: tuple):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, D)
        grid = tuple(thw)
        k, k_thw = (k, grid) if self.pool_k is None else self.pool_k(k, grid)
        v = v if self.pool_v is None else self.pool_v(v, grid)[0]
        q, q_thw = (q, grid) if self.pool_q is None else self.pool_q(q, grid)
        return *(t.transpose(1, 2) for t in (q, k, v)), q_thw, k_thw

    def finish(self, x: Tensor) -> Tensor:
        return self.project(x)

    @staticmethod
    def distances(q_size: int, k_size: int, device) -> Tensor:
        """``_add_rel_pos``'s rows, in its order of float operations, before truncation."""
        q_ratio, k_ratio = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
        q = arange(q_size, device=device)[:, None] * q_ratio
        return q - (arange(k_size, device=device) + (1.0 - k_size)) * k_ratio


class TorchvisionBlock(BlockReplacement):
    """Replaces ``torchvision.models.video.mvit.MultiscaleBlock``."""

    stochastic = "stochastic_depth"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, MultiscaleBlock)

    @classmethod
    def drops_clips(cls, module: nn.Module) -> bool:
        return type(module) is StochasticDepth

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        layers = list(block.mlp) if isinstance(block.mlp, MLP) else []
        dropouts = [layer for layer in layers if isinstance(layer, nn.Dropout)]
        return [layer for layer in layers if not isinstance(layer, nn.Dropout)] + dropouts

    def projection(self) -> tuple[nn.Module | None, bool]:
        return self.project, self.proj_after_attn

    def skip_pool(self) -> nn.Module | None:
        return self.pool_skip and self.pool_skip.pool


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm that reads the last block's tokens, of which ``MViT`` keeps only the cls token."""
    return model.norm if type(model) is MViT and "forward" not in vars(model) else None
