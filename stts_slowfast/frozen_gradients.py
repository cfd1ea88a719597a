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

# Of a function: 8 (PyTorch's limit) of a frozen model, and 8 of one that is not.
MAX_GRAPHS = 16


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
        self._left_out: frozenset[int] = frozenset()
        # DDP around the model or in it, and why it needs all gradients, if it does: once known.
        self._ddps: list[Any] | None = None
        self._obstacle, self._logged = "", False

    def turn_off(self, parameters: Iterable[Tensor]) -> None:
        """Until :meth:`turn_on`, these parameters have no gradient, if they had one.

        If processes wait for gradients otherwise than by DDP of the default process group, nothing
        changes, which is logged once.
        """
        self.turn_on()
        off = [parameter for parameter in parameters if parameter.requires_grad]
        if self._ddps is None:
            self._ddps, self._obstacle = _find_ddps(self.model)
        if self._obstacle:
            if off and not self._logged:
                self._logged = True
                logger.info("STTS: a frozen backbone's gradients are computed: %s", self._obstacle)
            return
        for parameter in off:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._frozen += off
        before, self._left_out = self._left_out, frozenset(map(id, off))
        for ddp in self._ddps:
            if getattr(ddp, "stts_left_out", frozenset()) != self._left_out:
                _renew_reducer(ddp)
                ddp.stts_left_out = self._left_out
        if before and not off and "torch._dynamo" in sys.modules:
            _make_room_for_graphs()

    def turn_on(self) -> None:
        """All parameters have gradients as before :meth:`turn_off`."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()


def turn_on(model: nn.Module) -> None:
    """Undoes :meth:`FrozenGradients.turn_off` of a model whose schedule may be lost.

    DDP reduces all gradients again, of the parameters that the model has now.
    """
    FrozenGradients(model).turn_off([])


def _frozen_of(model: nn.Module) -> list[Tensor]:
    """The parameters of a model whose gradients are off; the model has the list itself."""
    stts = next((module for module in model.modules() if isinstance(module, Selectors)), None)
    return [] if stts is None else stts.frozen


def _make_room_for_graphs() -> None:
    """Lets torch.compile make as many graphs again of a function.

    Those of the frozen model are of no more use, but count among the 8 that it makes. PyTorch can
    only discard the graphs of all models of a process.
    """
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    setattr(config, name, max(getattr(config, name), MAX_GRAPHS))


def _find_ddps(model: nn.Module) -> tuple[list[Any], str]:
    """Every DDP in a model, or around it: a loop need not give the schedule what it wraps; and what
    keeps gradients from being left out, if anything does."""
    if not (dist.is_available() and dist.is_initialized()):
        return [], ""
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if not found:
        every = [x for x in gc.get_objects() if issubclass(type(x), DistributedDataParallel)]
        found = [ddp for ddp in every if any(module is model for module in ddp.modules())]
    if not found:
        return [], "the processes of this run share them otherwise than by DDP"
    return found, next(filter(None, map(_obstacle, found)), "")


def _obstacle(ddp: Any) -> str:
    """Why the reducer of a DDP cannot be made anew; empty if it can."""
    if ddp.process_group != dist.group.WORLD:
        return "DDP has a process group of its own"
    if getattr(ddp, "mixed_precision", None) or getattr(ddp, "_delay_all_reduce_params", None):
        return "DDP has mixed precision of its own, or reduces parameters later"
    stateless = (type(None), dist.ProcessGroup)
    if not all(isinstance(of_hook, stateless) for _, of_hook in ddp._comm_hooks):
        return "DDP has a communication hook with a state"
    return ""


def _renew_reducer(ddp: Any) -> None:
    """Makes the reducer for the parameters that require a gradient now."""
    hooks, attributes = ddp._comm_hooks, ddp.__getstate__()
    del ddp.reducer, ddp.logger  # the reducer's hooks on parameters go with it
    ddp.__setstate__(attributes)
    if ddp.static_graph:  # its next backward pass is the first of this reducer
        ddp._static_graph_delay_allreduce_enqueued = False
    ddp._comm_hooks = []
    for hook, of_hook in hooks:
        ddp.register_comm_hook(of_hook, hook)
