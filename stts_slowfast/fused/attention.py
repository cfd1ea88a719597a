"""Pooling attention that reads true distances, and is fused where its parts allow it.

What is different from the stock modules, and never what they compute:

* ``scaled_dot_product_attention`` instead of ``softmax(q k^T) v``: no (queries x keys) matrix.
* Decomposed relative positions ride in extra channels: beside a query its products with the
  tables, beside a key the one-hot of its place, so that their inner product is the position term.
* Tokens stay channels-last from the projection to the attention; the pooling convolution takes
  all heads, and keys and values, at once.
* Where the pooling stride skips tokens, keys and values are only projected where they are read.

That is the fused way. The composed way calls every part as a module, as the stock module does, and
differs from it in the distances alone.
"""

import torch
from torch import Tensor, arange, cat, einsum, eye, nn
from torch.nn import functional as F

from stts_slowfast import fx_tracing
from stts_slowfast.constants import sized_constant
from stts_slowfast.fused import ops
from stts_slowfast.fused.replacement import FuseOptions, Replacement, run
from stts_slowfast.fx_tracing import tracer_of
from stts_slowfast.grid import Grid


class AttentionReplacement(Replacement):
    """Stands in for the pooling attention of a host, whose names a subclass knows.

    Args:
        stock: the module to stand in for.
        fuse: whether to compute the fused way while the parts allow it.
        true_distances: whether to read the tables of relative positions, after a selection, at the
            true distances between the tokens that are left: of the kept frames of each clip, and of
            the neighbours inside a window. False stretches them over what is left, as the stock
            module does for any smaller input. Without selection it makes no difference.

    Shapes: tokens ``(B, [1+]T*H*W, C)`` and ``(T, H, W)`` in; tokens and their grid out. Where a
    selection was made ``(T, H, W)`` is a ``Grid`` that says what arrives.
    """

    def __init__(self, stock: nn.Module, fuse: bool = True, true_distances: bool = True):
        super().__init__(stock, fuse, true_distances=true_distances)

    @classmethod
    def build(cls, stock: nn.Module, request: FuseOptions) -> "AttentionReplacement | None":
        fuse = request.fuse and cls.fits(stock)
        view = cls(stock, fuse, request.true_distances)
        return view if fuse or (view.has_positions() and request.true_distances) else None

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        tokens = int(self.has_cls()) + 5 * 9 * 7
        return [(torch.randn(2, tokens, self.channels(), generator=generator), (5, 9, 7))]

    def implementations(self) -> list:
        fused = [self.fused] if self.fuse else []
        return [*fused, self.reference] if self.has_positions() else fused

    def forward(self, x: Tensor, thw):
        if tracer := tracer_of(x):
            return fx_tracing.call(tracer, run, self, x, thw)
        if self.is_fused():
            return self.fused(x, thw)
        if self.uses_true_positions(thw):
            return self.reference(x, thw)
        return self.original.forward(x, thw)

    def has_positions(self) -> bool:
        return any(table is not None for table in self.tables())

    def uses_true_positions(self, thw) -> bool:
        """Whether the tokens of a grid come from places that the stock module would not read."""
        if not (self.true_distances and isinstance(thw, Grid) and self.has_positions()):
            return False
        return thw.is_selected and not thw.is_whole

    def reference(self, x: Tensor, thw):
        """As the stock module's ``forward``, at true distances."""
        q, k, v, q_thw, k_thw = self.project_and_pool(x, thw)
        out = self.attend_eager(q, k, v, thw, tuple(q_thw), tuple(k_thw))
        if self.residual() == "all":
            out = out + q
        elif self.residual() == "patches":
            out = cat([out[:, :1], out[:, 1:] + q[:, 1:]], dim=1)
        return self.finish(out.flatten(2)), _moved(thw, q_thw)

    def fused(self, x: Tensor, thw, norm: nn.LayerNorm | None = None, cls_alone: bool = False):
        """As :meth:`reference`, by other means.

        Args:
            norm: what the tokens still have to be normalised by, if anything (for
                ``cpu.in_pieces(x)``).
            cls_alone: let the cls token alone ask, and return it alone: ``(B, 1, C)``.
        """
        q, k, v, q_thw, k_thw = self._project(x, tuple(thw), norm, cls_alone)
        out = self.attend(q, k, v, thw, q_thw, k_thw)
        residual = self.residual()
        if residual == "all":
            out = out + q
        elif residual == "patches" and not cls_alone:
            # One pass and no copy: the cls token's share of the residual is multiplied by zero.
            out = out.addcmul(q.to(out.dtype), _all_but_cls(out, out.shape[1]))
        return self.output(out.flatten(2)), _moved(thw, q_thw)

    def attend(self, q, k, v, thw, q_thw: tuple, k_thw: tuple) -> Tensor:
        """Attention with its position term, of ``(B, N, heads, D)``, likewise laid out."""
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

    def _project(self, x: Tensor, thw: tuple, norm: nn.LayerNorm | None, cls_alone: bool):
        """Pooled queries, keys and values ``(B, N, heads, D)``, and the grids of both."""
        to_q, to_kv = self.projections()
        (pool_q, norm_q), (pool_k, norm_k), (pool_v, norm_v) = self.pools()
        if cls_alone:
            q = ops.linear(x[:, :1], *to_q, norm)
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

    def _pooled(self, x: Tensor, thw: tuple, norm, projection: tuple, pools: list):
        """Projects tokens, and pools the result ``(B, 1+L, len(pools)*heads*D)`` over the grid."""
        if pools[0] is None:
            return ops.linear(x, *projection, norm), thw
        cls = int(self.has_cls())
        places, grid, stride = _read(thw, pools[0], x)
        if places is None:
            y = ops.linear(x, *projection, norm)
            first, y = y.split([cls, x.shape[1] - cls], dim=1)
        else:
            first = ops.linear(x[:, :1], *projection, norm) if cls else None
            y = ops.linear(x, *projection, norm, places + cls)
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

        ``q (B, N, heads, D)`` gains its products with the table rows of every key place along
        each axis, ``k`` the one-hot of its place along each axis, ``v`` zeros.
        """
        cls, axes, products = int(self.has_cls()), [], []
        for axis, product in self._products(q, thw, q_thw, k_thw):
            axes.append(axis)
            products.append(product)
        extra = sum(k_thw[axis] for axis in axes)
        pad = -(q.shape[3] + extra) % 8
        products = F.pad(cat(products, dim=5).flatten(1, 3), (0, pad, 0, 0, cls, 0))
        places = _one_hot_places(k, k_thw, tuple(axes), pad, cls)
        places = places[None, :, None].expand(*k.shape[:3], -1)
        return cat([q, products], dim=3), cat([k, places], dim=3), F.pad(v, (0, extra + pad))

    def _products(self, q: Tensor, thw, q_thw: tuple, k_thw: tuple):
        """By axis, the products ``(B, T, H, W, heads, places)`` of queries with the table rows."""
        patches = q[:, int(self.has_cls()) :].unflatten(1, q_thw)  # (B, T, H, W, heads, D)
        for axis, table in enumerate(self.tables()):
            if table is not None:
                rows = self._rows(axis, table, thw, q_thw[axis], k_thw[axis]).to(q.dtype)
                yield axis, _products(patches, rows, axis)

    def _rows(self, axis: int, table: Tensor, thw, q_size: int, k_size: int) -> Tensor:
        """Table rows ``(q_size, k_size, D)`` of every query and key place along an axis.

        In time after a selection ``(B, q_size, k_size, D)``, since every clip keeps other frames.
        """
        pools = [self.pool_q, self.pool_k]
        strides = [geometry(pool)[1][axis] for pool in pools]
        whole, moved = thw[axis], self.uses_true_positions(thw)
        if moved and axis == 0 and thw.frames is not None and max(strides) == 1:
            distances = thw.frames[:, :, None] - thw.frames[:, None, :] + len(table) // 2
            return table[distances.clamp(0, len(table) - 1)]
        if moved and axis > 0 and thw.windows is not None:
            # The grid that the table was made for: a cropped one reads the part of it in reach.
            whole = max(whole, (len(table) + 1) // 2 * min(strides))
        q_whole, k_whole = (_pooled_size(whole, pool, axis) for pool in pools)
        distances = _distances(table, self.distances, q_whole, k_whole, q_size, k_size)
        return _interpolate(table, 2 * max(q_whole, k_whole) - 1)[distances]


def fusible(linear: nn.Module, pools) -> bool:
    """Whether projection and pooling are of the kinds that can be rearranged exactly."""
    pool_k, pool_v = pools[1][0], pools[2][0]
    if type(linear) is not nn.Linear or (pool_k is None) != (pool_v is None):
        return False
    for pool, norm in pools:
        if norm is not None and type(norm) is not nn.LayerNorm:
            return False
        if type(pool) is nn.Conv3d:
            depthwise = pool.groups == pool.in_channels == pool.out_channels
            centred = pool.padding == tuple(size // 2 for size in pool.kernel_size)
            plain = (
                pool.bias is None and pool.dilation == (1, 1, 1) and pool.padding_mode == "zeros"
            )
            if not (depthwise and centred and plain):
                return False
        elif pool is not None and type(pool) not in (nn.MaxPool3d, nn.AvgPool3d):
            return False
    if pool_k is None:
        return True
    return type(pool_k) is type(pool_v) and geometry(pool_k) == geometry(pool_v)


def split(qkv: nn.Linear) -> tuple[tuple, tuple]:
    """Weight and bias that project to queries, and those that project to keys and values."""
    width = qkv.out_features // 3
    weights = qkv.weight.split([width, 2 * width])
    biases = (None, None) if qkv.bias is None else qkv.bias.split([width, 2 * width])
    return tuple(zip(weights, biases))


def geometry(pool: nn.Module | None) -> tuple[tuple, tuple]:
    """Kernel and stride of a pooling along time, height and width."""
    if pool is None:
        return (1, 1, 1), (1, 1, 1)
    pool = inner(pool, "kernel_size", "stride")
    sizes = (pool.kernel_size, pool.stride)
    return tuple((size,) * 3 if isinstance(size, int) else tuple(size) for size in sizes)


def inner(module: nn.Module, *names: str) -> nn.Module:
    """The module that has these attributes: itself, or the one that it wraps, as adapters do.

    Raises:
        TypeError: where nothing in it has them.
    """
    for part in module.modules():
        if all(hasattr(part, name) for name in names):
            return part
    raise TypeError(f"nothing in {type(module).__name__} has {' and '.join(names)}")


def _pooled_size(size: int, pool: nn.Module | None, axis: int) -> int:
    kernel, stride = (sizes[axis] for sizes in geometry(pool))
    return (size + kernel // 2 * 2 - kernel) // stride + 1


@sized_constant
def _all_but_cls(tokens: int, *, dtype, device) -> Tensor:
    """``(N, 1, 1)``: 0 for the first token, 1 for the others."""
    return (arange(tokens, device=device) > 0).to(dtype)[:, None, None]


@sized_constant
def _one_hot_places(thw: tuple, axes: tuple, pad: int, cls: int, *, dtype, device) -> Tensor:
    """One-hot of the place of each token along ``axes``, side by side, ``(cls + T*H*W, ...+pad)``.

    Cls tokens are in front, and have no place.
    """
    places = []
    for axis in axes:
        shape = [1, 1, 1, thw[axis]]
        shape[axis] = thw[axis]
        places.append(eye(thw[axis], dtype=dtype, device=device).view(shape).expand(*thw, -1))
    return F.pad(cat(places, dim=3).flatten(0, 2), (0, pad, cls, 0))


@sized_constant
def _distances(distances, q_whole: int, k_whole: int, q_size: int, k_size: int, *, dtype, device):
    """The table's rows ``(q_size, k_size)`` by a host's formula, a function of both whole sizes."""
    return distances(q_whole, k_whole, device)[:q_size, :k_size].long()


def _read(thw: tuple, pool: nn.Module, like: Tensor) -> tuple[Tensor | None, tuple, tuple]:
    """The places of the tokens that a pooling reads, their grid, and its stride over that grid.

    A convolution of kernel 3 and stride 8 reads three rows in eight: with only those left, it is
    one of stride 3 (the first window's padding stays the padding). None where all are read.
    """
    kernels, strides = geometry(pool)
    skips = tuple(stride > kernel for kernel, stride in zip(kernels, strides))
    if not isinstance(pool, nn.Conv3d) or not any(skips):
        return None, thw, strides
    places = _places_read(like, thw, kernels, strides)
    strides = tuple(
        kernel if skip else stride for kernel, stride, skip in zip(kernels, strides, skips)
    )
    return places.flatten(), tuple(places.shape), strides


@sized_constant
def _places_read(thw: tuple, kernels: tuple, strides: tuple, *, dtype, device) -> Tensor:
    """The places ``(t, h, w)`` that a pooling reads of a grid, whatever the ``dtype``."""
    rows = [
        _rows_read(size, kernel, stride, device) if stride > kernel else arange(size, device=device)
        for size, kernel, stride in zip(thw, kernels, strides)
    ]
    return (rows[0][:, None] * thw[1] + rows[1])[:, :, None] * thw[2] + rows[2]


def _rows_read(size: int, kernel: int, stride: int, device) -> Tensor:
    """The rows of an axis that lie in some window of a pooling with padding ``kernel // 2``."""
    before = kernel // 2
    windows = (size + 2 * before - kernel) // stride + 1
    after = max((windows - 1) * stride - before + kernel - size, 0)
    starts = arange(windows, device=device) * stride - before
    rows = (starts[:, None] + arange(kernel, device=device)).flatten()
    return rows[before : len(rows) - after]


def _moved(thw, sizes) -> tuple | list:
    """The grid of the output, of the type of the grid that came in."""
    if isinstance(thw, Grid):
        return thw.pooled(sizes)
    return type(thw)(sizes)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` of ``(B, N, heads, D)``, likewise laid out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _products(patches: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Inner products of queries ``(B, T, H, W, heads, D)`` with their rows along one axis."""
    if rows.dim() == 4:
        return einsum("bthwnc,btkc->bthwnk", patches, rows)
    return einsum(f"bthwnc,{'thw'[axis]}kc->bthwnk", patches, rows)


def _interpolate(table: Tensor, length: int) -> Tensor:
    """Stretches a table ``(rows, D)`` linearly, as both hosts do for another input size."""
    if len(table) == length:
        return table
    return F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
