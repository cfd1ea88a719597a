"""Pooling attention at true distances, fused if its submodules allow it.

The fused implementation differs from the original in how it computes, never in what:

* ``scaled_dot_product_attention`` instead of ``softmax(q k^T) v``: no (queries x keys) matrix.
* Decomposed relative positions are extra channels: beside a query its products with the tables,
  beside a key its one-hot position, so that their inner product is the position term.
* Tokens stay channels-last from the projection to the attention; the pooling convolution takes
  all heads, and keys and values, at once.
* If the pooling stride skips tokens, keys and values are projected only at positions it reads.

The reference implementation calls every submodule as a module, as the original does, and differs
from it only in the distances.
"""

import torch
from torch import Tensor, arange, cat, nn
from torch.nn import functional as F

from stts_slowfast import fx_tracing
from stts_slowfast.constants import sized_constant
from stts_slowfast.fused import ops
from stts_slowfast.fused.pooling import geometry, pooled_size, tokens_read
from stts_slowfast.fused.relative_positions import one_hot_positions, table_products, table_rows
from stts_slowfast.fused.replacement import FuseOptions, Replacement, call_forward
from stts_slowfast.fx_tracing import tracer_of
from stts_slowfast.grid import Grid

# Weight and bias of a linear layer.
Projection = tuple[Tensor, Tensor | None]


class AttentionReplacement(Replacement):
    """Replaces the pooling attention of a host; subclasses know the attribute names.

    Args:
        original: the module to replace.
        fuse: whether to use the fused implementation while the submodules allow it.
        true_distances: whether to read the tables of relative positions, after a selection, at the
            true distances between the tokens that are left: of the kept frames of each clip, and of
            the neighbours inside a window. False stretches them over what is left, as the original
            does for any smaller input. Without selection it makes no difference.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out. After a
    selection ``(T, H, W)`` is a ``Grid`` of the tokens that arrive.
    """

    def __init__(self, original: nn.Module, fuse: bool = True, true_distances: bool = True):
        super().__init__(original, fuse, true_distances=true_distances)

    @classmethod
    def build(cls, original: nn.Module, options: FuseOptions) -> "AttentionReplacement | None":
        fuse = options.fuse and cls.fits(original)
        replacement = cls(original, fuse, options.true_distances)
        needed = fuse or (replacement.has_positions() and options.true_distances)
        return replacement if needed else None

    # --- what a host's subclass specifies

    @classmethod
    def fits(cls, attn: nn.Module) -> bool:
        """Whether the submodules are of types that can be rearranged exactly."""
        raise NotImplementedError

    def channels(self) -> int:
        """Width of the tokens."""
        raise NotImplementedError

    def projections(self) -> tuple[Projection, Projection]:
        """Weight and bias that project to queries, and those that project to keys and values."""
        raise NotImplementedError

    def pools(self) -> list[tuple]:
        """Pooling and norm of queries, keys and values; None for either that is absent."""
        raise NotImplementedError

    def tables(self) -> tuple:
        """Relative position tables ``(rows, D)`` of time, height and width, or None."""
        raise NotImplementedError

    def has_cls(self) -> bool:
        """Whether the first token is the cls token."""
        raise NotImplementedError

    def softmax_scale(self) -> float:
        """Factor of the products of queries and keys."""
        raise NotImplementedError

    def residual(self) -> str:
        """What the pooled queries are added to: ``all`` tokens, ``patches`` or ``none``."""
        raise NotImplementedError

    def output(self, x: Tensor) -> Tensor:
        """The output projection, for the fused implementation."""
        raise NotImplementedError

    def project_and_pool(self, x: Tensor, thw) -> tuple:
        """Queries, keys, values ``(B, N, heads, D)`` and two grids, by calls of the submodules."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The output projection, by calls of the submodules."""
        raise NotImplementedError

    @staticmethod
    def distances(q_size: int, k_size: int, device: torch.device) -> Tensor:
        """Table rows ``(q_size, k_size)`` of a whole axis, before truncation to integers."""
        raise NotImplementedError

    # --- the implementations

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        tokens = int(self.has_cls()) + 5 * 9 * 7
        return [(torch.randn(2, tokens, self.channels(), generator=generator), (5, 9, 7))]

    def implementations(self) -> list:
        fused = [self.fused] if self.fuse else []
        return [*fused, self.reference] if self.has_positions() else fused

    def forward(self, x: Tensor, thw):
        if tracer := tracer_of(x):
            return fx_tracing.call(tracer, call_forward, self, x, thw)
        if self.is_fused():
            return self.fused(x, thw)
        if self.uses_true_positions(thw):
            return self.reference(x, thw)
        return self.original.forward(x, thw)

    def has_positions(self) -> bool:
        return any(table is not None for table in self.tables())

    def uses_true_positions(self, thw) -> bool:
        """Whether tokens of a grid have positions that the original would not use."""
        if not (self.true_distances and isinstance(thw, Grid) and self.has_positions()):
            return False
        return thw.is_selected and not thw.is_whole

    def reference(self, x: Tensor, thw):
        """As the original's ``forward``, at true distances."""
        q, k, v, q_thw, k_thw = self.project_and_pool(x, thw)
        out = self.attend_eager(q, k, v, thw, tuple(q_thw), tuple(k_thw))
        if self.residual() == "all":
            out = out + q
        elif self.residual() == "patches":
            out = cat([out[:, :1], out[:, 1:] + q[:, 1:]], dim=1)
        return self.finish(out.flatten(2)), _output_grid(thw, q_thw)

    def fused(self, x: Tensor, thw, norm: nn.LayerNorm | None = None, cls_only: bool = False):
        """As :meth:`reference`, faster.

        Args:
            norm: what the tokens have yet to be normalised by, if anything (for
                ``ops.use_chunks(x)``).
            cls_only: compute only the output of the cls token: ``(B, 1, C)``.
        """
        q, k, v, q_thw, k_thw = self._project(x, tuple(thw), norm, cls_only)
        out = self.attend(q, k, v, thw, q_thw, k_thw)
        residual = self.residual()
        if residual == "all":
            out = out + q
        elif residual == "patches" and not cls_only:
            # One pass and no copy: the cls token's share of the residual is multiplied by zero.
            out = out.addcmul(q.to(out.dtype), _all_but_cls(out, out.shape[1]))
        return self.output(out.flatten(2)), _output_grid(thw, q_thw)

    def attend(self, q, k, v, thw, q_thw: tuple, k_thw: tuple) -> Tensor:
        """Attention with its position term, of ``(B, N, heads, D)``; returns the same layout."""
        if not self.has_positions():
            return _attend(q, k, v, self.softmax_scale())
        k = k * self.softmax_scale()
        dtype = ops.compute_dtype(q)  # once, instead of in each product
        q, k, v = (t.to(dtype) for t in (q, k, v))
        query, key, value = self._fold(q, k, v, thw, q_thw, k_thw)
        return _attend(query, key, value, 1.0)[..., : q.shape[3]]

    def attend_eager(self, q, k, v, thw, q_thw: tuple, k_thw: tuple) -> Tensor:
        """The same by operators that can be counted, transformed and differentiated twice."""
        cls, positions = int(self.has_cls()), 0.0
        for axis, products in self._products(q, thw, q_thw, k_thw):
            sides = [k_thw[axis] if other == axis else 1 for other in range(3)]
            products = products.flatten(1, 3).transpose(1, 2).unflatten(3, sides)
            positions = positions + products  # (B, heads, T*H*W, T, H, W) in the end
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scores = q * self.softmax_scale() @ k.transpose(2, 3)  # (B, heads, N, N)
        if self.has_positions():
            positions = positions.expand(*positions.shape[:3], *k_thw).flatten(3)
            scores = scores + F.pad(positions, (cls, 0, cls, 0))
        return (scores.softmax(dim=3) @ v).transpose(1, 2)

    def _project(self, x: Tensor, thw: tuple, norm: nn.LayerNorm | None, cls_only: bool):
        """Pooled queries, keys and values ``(B, N, heads, D)``, and the grids of both."""
        to_q, to_kv = self.projections()
        (pool_q, norm_q), (pool_k, norm_k), (pool_v, norm_v) = self.pools()
        if cls_only:
            q = ops.linear(x[:, :1], *to_q, norm=norm)
            q_thw = thw
        else:
            q, q_thw = self._pooled(x, thw, norm, to_q, [pool_q])
        kv, k_thw = self._pooled(x, thw, norm, to_kv, [pool_k, pool_v])
        q, k, v = (self._heads(t) for t in (q, *kv.chunk(2, dim=2)))
        norms = (norm_q, norm_k, norm_v)
        q, k, v = (t if norm is None else norm(t) for t, norm in zip((q, k, v), norms))
        return q, k, v, q_thw, k_thw

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1))

    def _pooled(self, x: Tensor, thw: tuple, norm, projection: Projection, pools: list):
        """Projects tokens, and pools the result ``(B, 1+L, len(pools)*heads*D)`` over the grid."""
        if pools[0] is None:
            return ops.linear(x, *projection, norm=norm), thw
        cls = int(self.has_cls())
        positions, grid, stride = tokens_read(thw, pools[0], x)
        if positions is None:
            y = ops.linear(x, *projection, norm=norm)
            first, y = y.split([cls, x.shape[1] - cls], dim=1)
        else:
            first = ops.linear(x[:, :1], *projection, norm=norm) if cls else None
            y = ops.linear(x, *projection, norm=norm, positions=positions + cls)
        y = y.unflatten(1, grid).permute(0, 4, 1, 2, 3)  # channels-last in memory
        if isinstance(pools[0], nn.Conv3d):
            weight = cat([pool.weight for pool in pools for _ in range(self.num_heads)])
            y = ops.depthwise(y, weight.to(y.dtype), stride, pools[0].padding)
        else:
            y = pools[0](y)
        grid = tuple(y.shape[2:])
        y = y.permute(0, 2, 3, 4, 1).flatten(1, 3)
        if cls:
            y = cat([first, y], dim=1)
        return y, grid

    def _fold(self, q: Tensor, k: Tensor, v: Tensor, thw, q_thw: tuple, k_thw: tuple):
        """Adds the channels whose inner product is the relative position term.

        What is added to ``q (B, N, heads, D)`` is its products with the table rows of every key
        position along each axis; to ``k``, its one-hot position along each axis; to ``v``, zeros.
        """
        cls = int(self.has_cls())
        axes, terms = zip(*self._products(q, thw, q_thw, k_thw))
        extra = sum(k_thw[axis] for axis in axes)
        pad = -(q.shape[3] + extra) % 8
        products = F.pad(cat(terms, dim=5).flatten(1, 3), (0, pad, 0, 0, cls, 0))
        positions = one_hot_positions(k, k_thw, axes, pad, cls)
        positions = positions[None, :, None].expand(*k.shape[:3], -1)
        return cat([q, products], dim=3), cat([k, positions], dim=3), F.pad(v, (0, extra + pad))

    def _products(self, q: Tensor, thw, q_thw: tuple, k_thw: tuple):
        """By axis, products ``(B, T, H, W, heads, positions)`` of queries with the table rows."""
        patches = q[:, int(self.has_cls()) :].unflatten(1, q_thw)  # (B, T, H, W, heads, D)
        for axis, table in enumerate(self.tables()):
            if table is not None:
                rows = self._rows(axis, table, thw, q_thw[axis], k_thw[axis]).to(q.dtype)
                yield axis, table_products(patches, rows, axis)

    def _rows(self, axis: int, table: Tensor, thw, q_size: int, k_size: int) -> Tensor:
        """Table rows ``(q_size, k_size, D)`` of every query and key position along an axis.

        In time after a selection ``(B, q_size, k_size, D)``, since every clip keeps other frames.
        """
        pools = [self.pool_q, self.pool_k]
        strides = [geometry(pool)[1][axis] for pool in pools]
        whole, moved = thw[axis], self.uses_true_positions(thw)
        if moved and axis == 0 and thw.frames is not None and max(strides) == 1:
            return table[thw.frame_rows(len(table))]
        if moved and axis > 0 and thw.windows is not None:
            # The grid that the table was made for: a cropped one reads the rows within reach.
            whole = max(whole, (len(table) + 1) // 2 * min(strides))
        q_whole, k_whole = (pooled_size(whole, pool, axis) for pool in pools)
        return table_rows(table, self.distances, q_whole, k_whole, q_size, k_size)


def split(qkv: nn.Linear) -> tuple[Projection, Projection]:
    """Weight and bias that project to queries, and those that project to keys and values."""
    width = qkv.out_features // 3
    to_q, to_kv = qkv.weight.split([width, 2 * width])
    if qkv.bias is None:
        return (to_q, None), (to_kv, None)
    q_bias, kv_bias = qkv.bias.split([width, 2 * width])
    return (to_q, q_bias), (to_kv, kv_bias)


@sized_constant
def _all_but_cls(tokens: int, *, dtype, device) -> Tensor:
    """``(N, 1, 1)``: 0 for the first token, 1 for the others."""
    return (arange(tokens, device=device) > 0).to(dtype)[:, None, None]


def _output_grid(thw, sizes) -> tuple | list:
    """The grid of the output, of the type of the grid that came in."""
    if isinstance(thw, Grid):
        return thw.pooled(sizes)
    return type(thw)(sizes)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` of ``(B, N, heads, D)``; returns the same layout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
