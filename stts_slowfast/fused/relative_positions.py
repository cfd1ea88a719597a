"""Decomposed relative positions: table rows by distance, and their products with queries."""

from collections.abc import Callable

from torch import Tensor, cat, einsum, eye
from torch.nn import functional as F

from stts_slowfast.constants import sized_constant


def table_rows(
    table: Tensor,
    formula: Callable,
    q_whole: int,
    k_whole: int,
    q_size: int,
    k_size: int,
) -> Tensor:
    """Rows ``(q_size, k_size, D)`` of a table, by the distances between queries and keys.

    Args:
        table: ``(rows, D)``; stretched if it is not of the whole sizes' length.
        formula: a host's distances ``(q_whole, k_whole)``, as a function of the two sizes and the
            device; a constant of the host's class.
        q_whole: queries along the axis without selection; ``k_whole`` keys.
        q_size: the queries that arrive; ``k_size`` the keys.
    """
    distances = _distances(table, formula, q_whole, k_whole, q_size, k_size)
    return _interpolate(table, 2 * max(q_whole, k_whole) - 1)[distances]


def table_products(patches: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Inner products of queries ``(B, T, H, W, heads, D)`` with their rows along one axis."""
    if rows.dim() == 4:
        return einsum("bthwnc,btkc->bthwnk", patches, rows)
    return einsum(f"bthwnc,{'thw'[axis]}kc->bthwnk", patches, rows)


@sized_constant
def one_hot_positions(thw: tuple, axes: tuple, pad: int, cls: int, *, dtype, device) -> Tensor:
    """Each token's position along ``axes``, one-hot side by side, ``(cls + T*H*W, ... + pad)``.

    Cls tokens are in front, and have no position.
    """
    positions = []
    for axis in axes:
        shape = [1, 1, 1, thw[axis]]
        shape[axis] = thw[axis]
        positions.append(eye(thw[axis], dtype=dtype, device=device).view(shape).expand(*thw, -1))
    return F.pad(cat(positions, dim=3).flatten(0, 2), (0, pad, cls, 0))


@sized_constant
def _distances(
    formula: Callable, q_whole: int, k_whole: int, q_size: int, k_size: int, *, dtype, device
) -> Tensor:
    return formula(q_whole, k_whole, device)[:q_size, :k_size].long()


def _interpolate(table: Tensor, length: int) -> Tensor:
    """Stretches a table ``(rows, D)`` linearly, as both hosts do for another input size."""
    if len(table) == length:
        return table
    return F.interpolate(table.t()[None], size=length, mode="linear")[0].t()
