"""Fused replacements of the attention and blocks of SlowFast's MViT."""

from torch import Tensor, arange, nn

from stts_slowfast.fused.pytorchvideo import PyTorchVideoAttention, PyTorchVideoBlock
from stts_slowfast.fused.registry import BLOCKS, FINAL_NORMS, SUBMODULES

# The imported modules `slowfast.models.attention`; there may be several by different names.
_attention_modules = []


def register_attention(attention_module) -> None:
    """Makes the classes of ``slowfast.models.attention`` known to ``fused.fuse_model``."""
    if attention_module not in _attention_modules:
        _attention_modules.append(attention_module)


def _is_instance(module: nn.Module, name: str) -> bool:
    return any(isinstance(module, getattr(host, name)) for host in _attention_modules)


class SlowFastAttention(PyTorchVideoAttention):
    """Replaces ``slowfast.models.attention.MultiScaleAttention``."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _is_instance(module, "MultiScaleAttention")

    def tables(self):
        return tuple(getattr(self, f"rel_pos_{axis}", None) for axis in "thw")

    def residual(self) -> str:
        if not self.residual_pooling:
            return "none"
        return "patches" if self.has_cls_embed else "all"

    def project_and_pool(self, x: Tensor, thw: tuple):
        parts = [x.unflatten(2, (self._groups(), -1)).transpose(1, 2)] * 3  # (B, groups, N, D)
        if self.separate_qkv and not self.pool_first:
            parts = [self._heads(layer(x)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        elif not self.pool_first:
            parts = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        pool_tokens = _attention_modules[0].attention_pool
        pooled = [
            pool_tokens(part, pool, thw, has_cls_embed=self.has_cls_embed, norm=norm)
            for part, (pool, norm) in zip(parts, self.pools())
        ]
        parts = [part.transpose(1, 2) for part, _ in pooled]  # (B, N, groups, D)
        if self.pool_first:
            layers = (self.q, self.k, self.v)
            parts = [self._heads(layer(t.flatten(2))) for layer, t in zip(layers, parts)]
        return *parts, pooled[0][1], pooled[1][1]

    def _groups(self) -> int:
        return 1 if self.mode == "conv_unshared" else self.num_heads

    def finish(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return self.proj_drop(x) if self.drop_rate > 0.0 else x

    @staticmethod
    def distances(q_size: int, k_size: int, device) -> Tensor:
        """Row indices of ``cal_rel_pos_spatial`` before truncation, in its order of operations."""
        q_ratio, k_ratio = max(k_size / q_size, 1.0), max(q_size / k_size, 1.0)
        q = arange(q_size, device=device)[:, None] * q_ratio
        return q - arange(k_size, device=device) * k_ratio + (k_size - 1) * k_ratio


class SlowFastBlock(PyTorchVideoBlock):
    """Replaces ``slowfast.models.attention.MultiScaleBlock``."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _is_instance(module, "MultiScaleBlock")

    @classmethod
    def drops_clips(cls, module: nn.Module) -> bool:
        return type(module) is nn.Identity or _is_instance(module, "DropPath")

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return super().fits(block) and block.gamma_1 is block.gamma_2 is None

    def projection(self) -> tuple[nn.Module | None, bool]:
        return getattr(self, "proj", None), self.dim_mul_in_att


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm after the last block, if ``MViT`` then uses the cls token only; else None."""
    kind = type(model)
    if kind.__name__ != "MViT" or not kind.__module__.endswith("models.video_model_builder"):
        return None
    all_tokens = model.enable_detection or model.use_mean_pooling or model.enable_rev
    return model.norm if model.cls_embed_on and not all_tokens else None


SUBMODULES.append(SlowFastAttention)
BLOCKS.append(SlowFastBlock)
FINAL_NORMS.append(final_norm)
