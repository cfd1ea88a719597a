"""Dense features of timm's ``VisionTransformer`` and ``Eva`` after a selection."""

from inspect import signature
from typing import Any

from torch import Tensor

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import ForeignModule


class Intermediates:
    """``model.forward_intermediates`` after a selection, with the sizes of the kept tokens.

    The original method reshapes tokens by the sizes of the model's input.
    """

    def __init__(self, model: ForeignModule):
        self.model = model
        # After self, x and indices.
        self.names = tuple(signature(type(model).forward_intermediates).parameters)[3:]

    def __call__(self, x: Tensor, indices: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the original method; maps are ``(B*T, C, H, W)`` of the kept tokens.

        Raises:
            ValueError: for maps of a set of tokens that makes no grid.
        """
        model, kwargs = self.model, {**dict(zip(self.names, args)), **kwargs}
        output_fmt = kwargs.get("output_fmt", "NCHW")
        forward = type(model).forward_intermediates
        calls = model.stts.calls
        call = calls.open()
        try:
            found = forward(model, x, indices, **{**kwargs, "output_fmt": "NLC"})
        finally:
            calls.close()
        if output_fmt != "NCHW":
            return found
        grids = [call.grids[number] for number in _numbers(indices, len(model.blocks))]
        if isinstance(found, dict):
            key = "image_intermediates"
            return {**found, key: _maps(found[key], grids)}
        if isinstance(found, tuple):
            return found[0], _maps(found[1], grids)
        return _maps(found, grids)


def _numbers(indices: Any, depth: int) -> list[int]:
    """Numbers of the blocks that ``indices`` means in timm, in order."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        return list(range(depth - indices, depth))
    return sorted({index % depth for index in indices})


def _maps(intermediates: list[Any], grids: list[Grid]) -> list[Any]:
    return [
        (_map(each[0], grid), *each[1:]) if isinstance(each, tuple) else _map(each, grid)
        for each, grid in zip(intermediates, grids)
    ]


def _map(x: Tensor, grid: Grid) -> Tensor:
    """Tokens ``(B*T, H*W, C)`` as maps ``(B*T, C, H, W)``."""
    if grid.tokens is not None:
        raise ValueError(
            "after a selection of single tokens there are no maps: use output_fmt='NLC', and "
            "put features back with stts.scatter(features, model)"
        )
    return x.unflatten(1, tuple(grid[1:])).permute(0, 3, 1, 2).contiguous()
