"""Positions of a model's output tokens in the clip, and features put back on its grid."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.grid import Grid
from stts_slowfast.hooks import refuse_replicas, selectors_of
from stts_slowfast.hosts import resolve_host, unwrap


def positions(model: nn.Module) -> Tensor | list[Tensor]:
    """Positions of the output tokens of the last forward pass, after all selections.

    Args:
        model: with selectors, wrapped or not, that has run.

    Returns:
        LongTensor ``(B, N)``: flat indices of the output tokens in the grid ``(T, H, W)`` that the
        model would return without selection (with pooling, the pooled one), row by row, without
        cls tokens. ``scatter(features, model)`` has its sizes. In training, those that the scores
        without noise keep. For clips packed into one sequence, a list with ``(1, N)`` per clip.

    Raises:
        ValueError: if the model has no selectors, has not run since they were attached, or is
            ``nn.DataParallel`` over several devices.
    """
    reached = _reached(model)
    if isinstance(reached, list):
        return [grid.positions(1) for grid in reached]
    return reached.positions(0)


def scatter(
    features: Tensor,
    where: nn.Module | Tensor,
    fill: float = 0.0,
    sizes: Sequence[int] | None = None,
) -> Tensor | list[Tensor]:
    """Puts features of kept tokens back to their positions in the grid.

    Args:
        features: of the output tokens of the model's last forward pass, in the model's layout
            (``(B, N, C)``, ``(B*T, N, C)``, ``(B, T, H, W, C)``), with or without cls tokens, of
            any width ``C``; with ``positions``, ``(B, N, C)`` in their order.
        where: the model, or the result of :func:`positions`.
        fill: value of dropped tokens.
        sizes: with ``positions``, the sizes ``(T, H, W)`` of the grid.

    Returns:
        ``(B, T, H, W, C)``, the grid of the output without selection; for packed clips, whose
        features are ``(N, C)``, a list with ``(1, T, H, W, C)`` per clip. Gradients pass.

    Raises:
        ValueError: if the features do not fit the output tokens.
    """
    if isinstance(where, nn.Module):
        thw = _reached(where)
        if isinstance(thw, list):
            return _scatter_packed(features, thw, fill)
        features = _grid_of(features, where, thw).flatten(1, 3)
        return _scatter_one(features, thw.positions(0), fill, thw.whole)
    if sizes is None:
        raise ValueError("scatter(features, positions) needs sizes=(T, H, W) of the grid")
    return _scatter_one(features, where, fill, sizes)


def _scatter_one(
    features: Tensor, index: Tensor, fill: float, sizes: Sequence[int] | None
) -> Tensor:
    if features.dim() != 3 or features.shape[:2] != index.shape:
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit positions of shape "
            f"{tuple(index.shape)}: give (B, N, C) in their order, without cls tokens"
        )
    assert sizes is not None  # else positions has raised
    frames, height, width = sizes
    out = features.new_full((len(features), frames * height * width, features.shape[2]), fill)
    index = index.to(features.device)[:, :, None].expand(-1, -1, features.shape[2])
    return out.scatter(1, index, features).unflatten(1, (frames, height, width))


def _scatter_packed(features: Tensor, grids: list[Grid], fill: float) -> list[Tensor]:
    counts = [prod(grid) for grid in grids]
    if features.dim() != 2 or len(features) != sum(counts):
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit {sum(counts)} tokens of "
            f"{len(grids)} packed clips: give (N, C), one row per output token"
        )
    return [
        _scatter_one(x[None], grid.positions(1), fill, grid.whole)
        for x, grid in zip(features.split(counts), grids)
    ]


def _reached(model: nn.Module) -> Grid | list[Grid]:
    refuse_replicas(model)
    reached = selectors_of(unwrap(model)).reached
    if reached is None:
        raise ValueError("nothing has been selected yet: run the model first")
    if isinstance(reached, list):
        return [Grid(*parts) for parts in reached]
    return Grid(*reached)


def _grid_of(features: Tensor, model: nn.Module, thw: Grid) -> Tensor:
    """Output features in any layout of the host, as ``(B, T, H, W, C)``."""
    host, _ = resolve_host(unwrap(model))
    prefix = getattr(host, "prefix", 0)
    count = thw[1] * thw[2] * (1 if getattr(host, "by_frame", False) else thw[0])
    if prefix and features.dim() == 3 and features.shape[1] == count:
        features = F.pad(features, (0, 0, prefix, 0))
    tokens: Any = host.unpack((features,), {}, thw)
    grid: Tensor = tokens.grid
    return grid
