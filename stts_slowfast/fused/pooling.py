"""Pooling of pooling attention: its geometry, and which tokens it reads."""

import torch
from torch import Tensor, arange, nn

from stts_slowfast.constants import sized_constant


def is_fusible(linear: nn.Module, pools: list[tuple]) -> bool:
    """Whether projection and pooling are of types that can be rearranged exactly.

    Args:
        linear: the projection before the pooling.
        pools: pooling and norm of queries, keys and values; None for either that is absent.
    """
    pool_k, pool_v = pools[1][0], pools[2][0]
    if type(linear) is not nn.Linear or (pool_k is None) != (pool_v is None):
        return False
    if not all(norm is None or type(norm) is nn.LayerNorm for _, norm in pools):
        return False
    if not all(pool is None or _is_fusible_pool(pool) for pool, _ in pools):
        return False
    return pool_k is None or (type(pool_k) is type(pool_v) and geometry(pool_k) == geometry(pool_v))


def _is_fusible_pool(pool: nn.Module) -> bool:
    if type(pool) is not nn.Conv3d:
        return type(pool) in (nn.MaxPool3d, nn.AvgPool3d)
    return (
        pool.groups == pool.in_channels == pool.out_channels
        and pool.padding == tuple(size // 2 for size in pool.kernel_size)
        and pool.bias is None
        and pool.dilation == (1, 1, 1)
        and pool.padding_mode == "zeros"
    )


def geometry(pool: nn.Module | None) -> tuple[tuple, tuple]:
    """Kernel and stride of a pooling along time, height and width."""
    if pool is None:
        return (1, 1, 1), (1, 1, 1)
    pool = find_with(pool, "kernel_size", "stride")
    sizes = (pool.kernel_size, pool.stride)
    return tuple((size,) * 3 if isinstance(size, int) else tuple(size) for size in sizes)


def find_with(module: nn.Module, *names: str) -> nn.Module:
    """The module that has these attributes: itself, or the one that it wraps, as adapters do.

    Raises:
        TypeError: if no submodule has them.
    """
    for part in module.modules():
        if all(hasattr(part, name) for name in names):
            return part
    raise TypeError(f"nothing in {type(module).__name__} has {' and '.join(names)}")


def pooled_size(size: int, pool: nn.Module | None, axis: int) -> int:
    """Length of an axis after the pooling."""
    kernel, stride = (sizes[axis] for sizes in geometry(pool))
    return (size + kernel // 2 * 2 - kernel) // stride + 1


def tokens_read(thw: tuple, pool: nn.Module, like: Tensor) -> tuple[Tensor | None, tuple, tuple]:
    """The positions of the tokens that a pooling reads, their grid, and its stride in that grid.

    A convolution of kernel 3 and stride 8 reads three rows in eight: with only those left, its
    stride is 3 (the first window's padding stays the padding). None if all tokens are read.
    """
    kernels, strides = geometry(pool)
    skips = tuple(stride > kernel for kernel, stride in zip(kernels, strides))
    if not isinstance(pool, nn.Conv3d) or not any(skips):
        return None, thw, strides
    positions = _positions_read(like, thw, kernels, strides)
    strides = tuple(
        kernel if skip else stride for kernel, stride, skip in zip(kernels, strides, skips)
    )
    return positions.flatten(), tuple(positions.shape), strides


@sized_constant
def _positions_read(thw: tuple, kernels: tuple, strides: tuple, *, dtype, device) -> Tensor:
    """The positions ``(t, h, w)`` that a pooling reads of a grid, whatever the ``dtype``."""
    rows = [
        _rows_read(size, kernel, stride, device) if stride > kernel else arange(size, device=device)
        for size, kernel, stride in zip(thw, kernels, strides)
    ]
    return (rows[0][:, None] * thw[1] + rows[1])[:, :, None] * thw[2] + rows[2]


def _rows_read(size: int, kernel: int, stride: int, device: torch.device) -> Tensor:
    """The rows of an axis that are in some window of a pooling with padding ``kernel // 2``."""
    before = kernel // 2
    windows = (size + 2 * before - kernel) // stride + 1
    after = max((windows - 1) * stride - before + kernel - size, 0)
    starts = arange(windows, device=device) * stride - before
    rows = (starts[:, None] + arange(kernel, device=device)).flatten()
    return rows[before : len(rows) - after]
