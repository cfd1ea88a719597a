"""Whether a saved optimizer state is of the parameters of a run, for both engines."""

import math

from torch import Tensor
from torch.optim import Optimizer


def optimizer_mismatch(state: dict, optimizer: Optimizer, reshaped: bool = False) -> str:
    """How a saved state differs from what an optimizer could load; empty if it can.

    Args:
        state: an optimizer's ``state_dict()``.
        optimizer: the run's optimizer.
        reshaped: whether tensors may have another shape with the same number of elements, as
            parameters of SlowFast have in other backbones.
    """
    found = [len(group["params"]) for group in state.get("param_groups", ())]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if found != sizes:
        return f"it has groups of {found} parameters, this run has {sizes}"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in state.get("state", {}).items():
        expected = parameters[number].shape
        for value in entries.values():
            if not isinstance(value, Tensor) or not value.dim() or value.shape == expected:
                continue
            if not reshaped or value.numel() != math.prod(expected):
                return f"it has a tensor {tuple(value.shape)} for a parameter {tuple(expected)}"
    return ""
