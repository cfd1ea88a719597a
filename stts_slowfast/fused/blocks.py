"""Fused blocks around pooling attention: intermediate tensors are kept once, or not at all."""

import torch
from torch import Tensor, cat, nn

from stts_slowfast.fused import ops
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.replacement import FuseOptions, Replacement, is_pristine
from stts_slowfast.fx_tracing import tracer_of


class BlockReplacement(Replacement):
    """Replaces an MViT block around fused attention; subclasses know the attribute names.

    Args:
        original: the block to replace.
        model: the model whose last block it is, if that keeps only the cls token; then the block
            computes no other.
        final_norm: the child of ``model`` that reads the block's tokens.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out.
    """

    # The name of the child that is stochastic depth.
    stochastic: str

    def __init__(self, original: nn.Module, model=None, final_norm=None):
        super().__init__(original, model=model, final_norm=final_norm)

    @classmethod
    def build(cls, original: nn.Module, options: FuseOptions) -> "BlockReplacement | None":
        if not (options.fuse and is_pristine(original, hooks=False) and cls.fits(original)):
            return None
        # The patches' queries can be left out if nothing reads what follows from them, unless some
        # parameters serve only them: every parameter must get a gradient.
        can_omit = not original.attn.has_positions() and original.attn.pool_q is None
        return cls(original, *options.final_norms.get(original, ()) if can_omit else ())

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        """Whether the submodules are of types that can be rearranged exactly."""
        first, activation, second, *dropouts = cls.mlp_layers(block) or (None,) * 3
        return (
            isinstance(block.attn, AttentionReplacement)
            and block.attn.fuse
            and type(block.norm1) is type(block.norm2) is nn.LayerNorm
            and all(norm.elementwise_affine for norm in (block.norm1, block.norm2))
            and type(first) is type(second) is nn.Linear
            and type(activation) is nn.GELU
            and activation.approximate == "none"
            and all(dropout.p == 0.0 for dropout in dropouts)
            and cls.drops_clips(getattr(block, cls.stochastic))
        )

    @classmethod
    def drops_clips(cls, module: nn.Module) -> bool:
        """Whether stochastic depth multiplies each clip by one number, and does nothing else."""
        raise NotImplementedError

    @staticmethod
    def mlp_layers(block: nn.Module) -> list[nn.Module]:
        """The first linear layer, the activation, the second linear layer and dropouts."""
        raise NotImplementedError

    def projection(self) -> tuple[nn.Module | None, bool]:
        """The layer that changes the residual's width, if any, and whether before the MLP."""
        raise NotImplementedError

    def skip_pool(self) -> nn.Module | None:
        """The pooling of the residual, if any."""
        raise NotImplementedError

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        return self.attn.sample_inputs(generator)

    def implementations(self) -> list:
        return [self.fused] if self.final_norm is None else [self.fused, self._fused_separately]

    def _fused_separately(self, x: Tensor, thw) -> Tensor:
        return cat([self.fused(x, thw, True)[0], self.fused(x, thw)[0][:, 1:]], dim=1)

    def is_fused(self) -> bool:
        return super().is_fused() and self.fits(self)

    def forward(self, x: Tensor, thw):
        if tracer_of(x) or not thw or not self.is_fused():
            return self.original.forward(x, thw)
        return self.fused(x, thw, self._is_cls_read_alone())

    def fused(self, x: Tensor, thw, cls_only: bool = False):
        y, norm = x, self.norm1
        if not ops.use_chunks(x):  # cast once, instead of in each projection
            y, norm = self.norm1(x).to(ops.compute_dtype(x)), None
        out, thw_new = self.attn.fused(y, thw, norm, cls_only)
        project, in_attention = self.projection()
        if project is not None and in_attention:
            x = ops.linear(y, project.weight, project.bias, norm)
            project = None
        drop = getattr(self, self.stochastic)
        x = (x[:, :1] if cls_only else self._skip(x, tuple(thw))) + drop(out)
        scale = None
        if drop.training:
            ones = x.new_ones(len(x), 1, 1)
            scale = drop(ones)  # what stochastic depth multiplies each clip with
            scale = None if scale is ones else scale
        first, _, second, *_ = self.mlp_layers(self)
        return ops.residual_mlp(x, self.norm2, first, second, project, scale), thw_new

    def _is_cls_read_alone(self) -> bool:
        """Whether nothing reads more of the output than the cls token."""
        norm, model = self.final_norm, self.model
        if norm is None or not any(child is norm for child in model._modules.values()):
            return False
        return not self._forward_hooks and "forward" not in model.__dict__ and is_pristine(norm)

    def _skip(self, x: Tensor, thw: tuple) -> Tensor:
        """Pools the residual ``(B, [1+]T*H*W, C)`` over the grid."""
        pool = self.skip_pool()
        if pool is None:
            return x
        cls = x.shape[1] - thw[0] * thw[1] * thw[2]
        y = pool(x[:, cls:].unflatten(1, thw).permute(0, 4, 1, 2, 3))
        y = y.permute(0, 2, 3, 4, 1).flatten(1, 3)
        return cat([x[:, :cls], y], dim=1) if cls else y
