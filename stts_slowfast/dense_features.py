"""Where in its clip each token that comes out of a model is from, and features back on the grid."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.grid import Grid
from stts_slowfast.hooks import refuse_replicas, selectors_of
from stts_slowfast.hosts import resolve_host, unwrap


def positions(model: nn.Module) -> Tensor | list[Tensor]:
    """Where the tokens of the last forward pass are from, all selections composed.

    Args:
        model: with selectors, wrapped or not, that has run.

    Returns:
        LongTensor ``(B, N)``: flat indices of the tokens that came out, in the grid ``(T, H, W)``
        that comes out without selection (with pooling, the pooled one), row by row; in the order
        of that grid, without cls tokens. ``scatter(features, model)`` has its sizes. In training,
        what the scores without noise keep. For clips packed into one sequence, a list with
        ``(1, N)`` of each clip.

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
    """Puts features of the tokens that are left back to where they are from.

    Args:
        features: of the tokens that came out of the model's last forward pass, laid out as they
            were (``(B, N, C)``, ``(B*T, N, C)``, ``(B, T, H, W, C)``), with or without cls tokens,
            and of any width ``C``; with ``positions``, ``(B, N, C)`` in their order.
        where: the model, or what :func:`positions` gave.
        fill: for tokens that were dropped.
        sizes: with ``positions``, the sizes ``(T, H, W)`` of the grid.

    Returns:
        ``(B, T, H, W, C)``, the grid that would have come out without selection; of packed clips,
        whose features are ``(N, C)``, a list with ``(1, T, H, W, C)`` of each. Gradients pass.

    Raises:
        ValueError: if the features do not fit what came out.
    """
    if isinstance(where, nn.Module):
        thw = _reached(where)
        if isinstance(thw, list):
            return _scatter_packed(features, thw, fill)
        places, sizes = thw.positions(0), thw.whole
        features = _grid_of(features, where, thw).flatten(1, 3)
    else:
        places = where
        if sizes is None:
            raise ValueError("scatter(features, positions) needs sizes=(T, H, W) of the grid")
    if features.dim() != 3 or features.shape[:2] != places.shape:
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit positions of shape "
            f"{tuple(places.shape)}: give (B, N, C) in their order, without cls tokens"
        )
    frames, height, width = sizes
    out = features.new_full((len(features), frames * height * width, features.shape[2]), fill)
    index = places.to(features.device)[:, :, None].expand(-1, -1, features.shape[2])
    return out.scatter(1, index, features).unflatten(1, (frames, height, width))


def _scatter_packed(features: Tensor, grids: list[Grid], fill: float) -> list[Tensor]:
    counts = [prod(grid) for grid in grids]
    if features.dim() != 2 or len(features) != sum(counts):
        raise ValueError(
            f"features of shape {tuple(features.shape)} do not fit {sum(counts)} tokens of "
            f"{len(grids)} packed clips: give (N, C), one for each that came out"
        )
    parts = zip(features.split(counts), grids)
    return [scatter(x[None], grid.positions(1), fill, grid.whole) for x, grid in parts]


def _reached(model: nn.Module) -> Grid | list[Grid]:
    refuse_replicas(model)
    reached = selectors_of(unwrap(model)).reached
    if reached is None:
        raise ValueError("nothing has been selected yet: run the model first")
    if isinstance(reached, list):
        return [Grid(sizes, *parts, whole=whole) for sizes, *parts, whole in reached]
    sizes, *parts, whole = reached
    return Grid(sizes, *parts, whole=whole)


def _grid_of(features: Tensor, model: nn.Module, thw: Grid) -> Tensor:
    """Features ``(B, T, H, W, C)`` of what came out, however the host lays it out."""
    host, _ = resolve_host(unwrap(model))
    prefix = getattr(host, "prefix", 0)
    count = thw[1] * thw[2] * (1 if getattr(host, "by_frame", False) else thw[0])
    if prefix and features.dim() == 3 and features.shape[1] == count:
        features = F.pad(features, (0, 0, prefix, 0))
    return host.read((features,), {}, thw).grid
