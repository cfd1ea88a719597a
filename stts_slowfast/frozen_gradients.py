"""Gradients of a frozen backbone: neither computed, nor reduced over processes.

While only scorers learn, parameters of the backbone have ``requires_grad`` False from the step of
the schedule to that of the optimizer. So the backward pass computes the gradients of tokens, down
to the first selector, and none of weights.
"""

import gc
import logging
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stts_slowfast.selectors import Selectors

logger = logging.getLogger(__name__)


class FrozenGradients:
    """Turns off the gradients of parameters for a step, and makes DDP not wait for them.

    DDP expects a gradient of every parameter that it was made with. So its reducer is made anew, as
    when a wrapped model is unpickled, before the first step in which other parameters have one:
    twice in a training, when the backbone is frozen and when it is no longer.

    Args:
        model: with selectors, wrapped or not.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._frozen = _frozen_of(model)
        self._ddps: list[DistributedDataParallel] | None = None
        self._reason = ""
        self._left_out: frozenset[int] = frozenset()

    def turn_off(self, parameters: Iterable[Tensor]) -> None:
        """Until :meth:`turn_on`, these parameters have no gradient, if they had one.

        If processes wait for gradients otherwise than by DDP of the default process group, nothing
        changes, which is logged once.
        """
        self.turn_on()
        off = [parameter for parameter in parameters if parameter.requires_grad]
        ddps = self._find_ddps(bool(off))
        if self._reason:
            return
        for parameter in off:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._frozen += off
        before, self._left_out = self._left_out, frozenset(map(id, off))
        for ddp in ddps:
            if getattr(ddp, "stts_left_out", frozenset()) != self._left_out:
                _renew_reducer(ddp)
                ddp.stts_left_out = self._left_out
        if before and not off and "torch._dynamo" in sys.modules:
            # Graphs of a frozen model are of no more use, but count among the 8 of a function.
            torch.compiler.reset()

    def turn_on(self) -> None:
        """All parameters have gradients as before :meth:`turn_off`."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    def _find_ddps(self, frozen: bool) -> list[Any]:
        """Every DDP in the model, or around it: a loop need not give us the wrapped model."""
        if self._ddps is None or (frozen and not self._ddps and not self._reason):
            self._ddps = []
            if dist.is_available() and dist.is_initialized():
                self._ddps = _ddps_of(self.model)
                reasons = [_fixed(ddp) for ddp in self._ddps] or ["its model is in no DDP"]
                if frozen and (reason := next(filter(None, reasons), "")):
                    self._reason = reason
                    logger.info("STTS: gradients of the frozen backbone are computed: %s", reason)
        return self._ddps


def turn_on(model: nn.Module) -> None:
    """Undoes :meth:`FrozenGradients.turn_off` of a model whose schedule may be lost."""
    FrozenGradients(model).turn_on()


def _frozen_of(model: nn.Module) -> list[Tensor]:
    """The parameters of a model whose gradients are off; the model has the list itself."""
    stts = next((module for module in model.modules() if isinstance(module, Selectors)), None)
    return [] if stts is None else stts.frozen


def _ddps_of(model: nn.Module) -> list[DistributedDataParallel]:
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if found:
        return found
    every = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [ddp for ddp in every if any(module is model for module in ddp.modules())]


def _fixed(ddp: DistributedDataParallel) -> str:
    """Why the reducer of a DDP cannot be made anew; empty if it can."""
    state: Any = ddp
    if state.process_group != dist.group.WORLD:
        return "DDP has a process group of its own"
    if state.mixed_precision is not None or getattr(state, "_delay_all_reduce_params", None):
        return "DDP has mixed precision of its own, or reduces parameters later"
    stateless = (type(None), dist.ProcessGroup)
    if not all(isinstance(of_hook, stateless) for _, of_hook in state._comm_hooks):
        return "DDP has a communication hook with a state"
    return ""


def _renew_reducer(ddp: DistributedDataParallel) -> None:
    """Makes the reducer for the parameters that require a gradient now."""
    state: Any = ddp
    hooks, attributes = state._comm_hooks, state.__getstate__()
    del state.reducer, state.logger  # its hooks on parameters go with it
    state.__setstate__(attributes)
    state._comm_hooks = []
    for hook, of_hook in hooks:
        state.register_comm_hook(of_hook, hook)
