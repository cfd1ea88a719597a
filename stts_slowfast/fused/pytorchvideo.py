"""pytorchvideo's MViT: the views of its attention and blocks. It need not be installed."""

from torch import Tensor, cat, nn

from stts_slowfast.fused import ops
from stts_slowfast.fused.attention import AttentionReplacement, fusible, inner, split
from stts_slowfast.fused.blocks import BlockReplacement
from stts_slowfast.fused.replacement import BLOCKS, FINAL_NORMS, SUBMODULES


def is_instance_of(module: nn.Module, name: str) -> bool:
    """Whether the class of a module, or one that it derives from, has this dotted name."""
    return name in [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def _is_separate(attn: nn.Module) -> bool:
    """Whether queries, keys and values have a projection each; in the release 0.1.5 always."""
    return getattr(attn, "separate_qkv", True)


class PyTorchVideoAttention(AttentionReplacement):
    """Stands in for ``pytorchvideo.layers.attention.MultiScaleAttention``."""

    @classmethod
    def matches(cls, module: nn.Module, parent: nn.Module, name: str) -> bool:
        return is_instance_of(module, "pytorchvideo.layers.attention.MultiScaleAttention")

    def forward(self, x: Tensor, thw_shape):
        return super().forward(x, thw_shape)

    @classmethod
    def fits(cls, attn: nn.Module) -> bool:
        if attn.pool_first:
            return False
        linears = [attn.q, attn.k, attn.v] if _is_separate(attn) else [attn.qkv]
        return all(fusible(linear, cls.pools(attn)) for linear in linears)

    def channels(self) -> int:
        linear = self.q if _is_separate(self) or self.pool_first else self.qkv
        return inner(linear, "in_features").in_features

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
    """Stands in for ``pytorchvideo.layers.attention.MultiScaleBlock``."""

    stochastic = "drop_path"

    @classmethod
    def matches(cls, module: nn.Module, parent: nn.Module, name: str) -> bool:
        return is_instance_of(module, "pytorchvideo.layers.attention.MultiScaleBlock")

    def forward(self, x: Tensor, thw_shape=None):
        return super().forward(x, thw_shape)

    @classmethod
    def drops_clips(cls, module: nn.Module) -> bool:
        return type(module) is nn.Identity or is_instance_of(
            module, "pytorchvideo.layers.drop_path.DropPath"
        )

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        mlp = block.mlp
        dropouts = [part for part in mlp.children() if isinstance(part, nn.Dropout)]
        return [mlp.fc1, mlp.act, mlp.fc2, *dropouts]

    def projection(self) -> tuple[nn.Module | None, bool]:
        return self.proj if self.dim != self.dim_out else None, self.dim_mul_in_att

    def skip_pool(self) -> nn.Module | None:
        return self.pool_skip


def final_norm(model: nn.Module) -> nn.Module | None:
    """What reads the tokens of the last block, where the head takes the cls token alone."""
    if not is_instance_of(
        model, "pytorchvideo.models.vision_transformers.MultiscaleVisionTransformers"
    ):
        return None
    pool = getattr(model.head, "sequence_pool", None)
    cls_alone = is_instance_of(pool, "pytorchvideo.models.head.SequencePool") and pool.mode == "cls"
    return model.norm_embed if cls_alone and type(model.norm_embed) is nn.LayerNorm else None


SUBMODULES.append(PyTorchVideoAttention)
BLOCKS.append(PyTorchVideoBlock)
FINAL_NORMS.append(final_norm)
