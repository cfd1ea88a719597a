"""Fused blocks around pooling attention: what they make in between is kept once, or not at all."""

import torch
from torch import Tensor, cat, nn

from stts_slowfast.fused import ops
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.replacement import FuseOptions, Replacement, is_pristine
from stts_slowfast.fx_tracing import tracer_of


class BlockReplacement(Replacement):
    """Stands in for an MViT block around fused attention, whose names a subclass knows.

    Args:
        stock: the block to stand in for.
        model: the model whose last block it is, where that drops all tokens but the cls; then the
            cls token comes out alone.
        reader: the child of ``model`` that reads the tokens.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out.
    """

    # The child that is stochastic depth.
    stochastic: str

    def __init__(self, stock: nn.Module, model=None, reader=None):
        super().__init__(stock, model=model, reader=reader)

    @classmethod
    def build(cls, stock: nn.Module, request: FuseOptions) -> "BlockReplacement | None":
        if not (request.fuse and is_pristine(stock, hooks=False) and cls.fits(stock)):
            return None
        # Patches' queries, and all that follows from them, can be left out where nobody reads them,
        # but not where parameters serve those alone: every parameter must get a gradient.
        cls_asks = not stock.attn.has_positions() and stock.attn.pool_q is None
        return cls(stock, *request.final_norms.get(stock, ()) if cls_asks else ())

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        """Whether the parts are of the kinds that can be rearranged exactly."""
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
        """What changes the width of the residual, if anything, and whether before the MLP."""
        raise NotImplementedError

    def skip_pool(self) -> nn.Module | None:
        """What pools the residual, if anything."""
        raise NotImplementedError

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        return self.attn.sample_inputs(generator)

    def implementations(self) -> list:
        return [self.fused, self._cls_beside_patches] if self.reader is not None else [self.fused]

    def _cls_beside_patches(self, x: Tensor, thw) -> Tensor:
        return cat([self.fused(x, thw, True)[0], self.fused(x, thw)[0][:, 1:]], dim=1)

    def is_fused(self) -> bool:
        return super().is_fused() and self.fits(self)

    def forward(self, x: Tensor, thw):
        if tracer_of(x) or not thw or not self.is_fused():
            return self.original.forward(x, thw)
        return self.fused(x, thw, self._cls_only())

    def fused(self, x: Tensor, thw, cls_alone: bool = False):
        y, norm = x, self.norm1
        if not ops.use_chunks(x):  # cast once, instead of in each projection
            y, norm = self.norm1(x).to(ops.compute_dtype(x)), None
        out, thw_new = self.attn.fused(y, thw, norm, cls_alone)
        project, in_attention = self.projection()
        if project is not None and in_attention:
            x = ops.linear(y, project.weight, project.bias, norm)
            project = None
        drop = getattr(self, self.stochastic)
        x = (x[:, :1] if cls_alone else self._skip(x, tuple(thw))) + drop(out)
        scale = None
        if drop.training:
            ones = x.new_ones(len(x), 1, 1)
            scale = drop(ones)  # what stochastic depth multiplies each clip with
            scale = None if scale is ones else scale
        first, _, second, *_ = self.mlp_layers(self)
        return ops.residual_mlp(x, self.norm2, first, second, project, scale), thw_new

    def _cls_only(self) -> bool:
        """Whether nobody reads more of what comes out than the cls token."""
        reader, model = self.reader, self.model
        if reader is None or not any(child is reader for child in model._modules.values()):
            return False
        return not self._forward_hooks and "forward" not in model.__dict__ and is_pristine(reader)

    def _skip(self, x: Tensor, thw: tuple) -> Tensor:
        """Pools the residual ``(B, [1+]T*H*W, C)`` over the grid."""
        pool = self.skip_pool()
        if pool is None:
            return x
        cls = x.shape[1] - thw[0] * thw[1] * thw[2]
        y = pool(x[:, cls:].unflatten(1, thw).permute(0, 4, 1, 2, 3))
        y = y.permute(0, 2, 3, 4, 1).flatten(1, 3)
        return cat([x[:, :cls], y], dim=1) if cls else y
