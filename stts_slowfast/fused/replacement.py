"""Replacements: modules that compute what the originals do, faster or at true distances.

A replacement shares the attributes, parameters and children of its original. It uses its fused
implementation only while they are what they were when it was made: as soon as a submodule has a
hook, or was wrapped or replaced (adapters, quantised layers, observers, parametrizations), the
original's ``forward`` runs, and every submodule is called as a module. It also runs under
``torch.func`` and forward-mode differentiation, which cannot see into our operators, while
``torch.jit`` traces (fvcore counts that way), and under global module hooks. Second derivatives
outside of ``torch.func`` raise; ``fuse_model(model, False, ...)`` supports them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import is_, itemgetter

import torch
from torch import Tensor, jit, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_globals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in HOOKS)
_CHANGING = itemgetter("_modules", "_parameters", *HOOKS)
# The types of weights that nothing computes.
PLAIN = (nn.Parameter, Tensor, type(None))


@dataclass
class FuseOptions:
    """The requested options, and what a replacement must know about the model around a module.

    Attributes:
        fuse: whether to use the fused implementations.
        true_distances: whether relative positions stay true after a selection.
        cropped: the modules that run behind a selection of windows.
        final_norms: by the last block of a model that keeps only the cls token, that model and
            its norm, the only reader of the block's tokens.
    """

    fuse: bool
    true_distances: bool
    cropped: set[nn.Module] = field(default_factory=set)
    final_norms: dict[nn.Module, tuple[nn.Module, nn.Module]] = field(default_factory=dict)


class Replacement(nn.Module):
    """Replaces a module, with its attributes, parameters and children.

    Args:
        original: the module to replace.
        fuse: whether to use the fused implementation while the submodules allow it.
        **attributes: further attributes.
    """

    # The submodules as they were when `is_fused` was last true.
    _watched: list[nn.Module] | None = None

    def __init__(self, original: nn.Module, fuse: bool = True, **attributes):
        super().__init__()
        # Shared dictionaries: what happens to one happens to the other, and a copy copies both.
        self.__dict__.update(original.__dict__)
        types = tuple(map(type, submodules(self)))
        self.__dict__.update(original=original, fuse=fuse, submodule_types=types, **attributes)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it can replace ``module``."""
        raise NotImplementedError

    @classmethod
    def build(cls, original: nn.Module, options: FuseOptions) -> "Replacement | None":
        """The replacement that the options need; None if they need none."""
        return cls(original) if options.fuse else None

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        """Random inputs for which it must compute what the original does."""
        raise NotImplementedError

    def implementations(self) -> list[Callable]:
        """The functions that it may compute with, each called with a sample input."""
        return [self.fused]

    def fused(self, *args):
        """Computes the original's output faster."""
        raise NotImplementedError

    def forward(self, *args):
        return self.fused(*args) if self.is_fused() else self.original.forward(*args)

    def is_fused(self) -> bool:
        """Whether the submodules are unchanged, and nothing observes them run."""
        if not self.fuse or is_observed():
            return False
        if torch.compiler.is_compiling():
            return self._is_unchanged()
        if self._watched is not None and self._is_still_unchanged(self._watched):
            return True
        unchanged = self._is_unchanged()
        self._watched = _children([self]) if unchanged else None
        return unchanged

    def _is_unchanged(self) -> bool:
        found = submodules(self)
        same = tuple(map(type, found)) == self.submodule_types
        return same and all(map(is_pristine, found)) and is_pristine(self, hooks=False)

    def _is_still_unchanged(self, watched: list[nn.Module]) -> bool:
        """The same, as far as it can have changed since the last call, in a fraction of the time.

        Args:
            watched: the submodules in the order of ``_children``.
        """
        own, states = vars(self), [*map(vars, watched)]
        modules, parameters, *hooks = zip(*map(_CHANGING, (own, *states)))
        children = [child for each in modules if each for child in each.values()]
        children = [child for child in children if child is not None]
        return (
            len(children) == len(watched)
            and all(map(is_, children, watched))
            and not any(any(each[1:]) for each in hooks)
            and {type(weight) for each in parameters for weight in each.values()}.issubset(PLAIN)
            and not any("forward" in state for state in states)
            and "forward" not in own
        )

    def train(self, mode: bool = True) -> "Replacement":
        self.original.training = mode
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> "Replacement":
        replica = super()._replicate_for_data_parallel()
        # An original with the replica's parameters, which DataParallel sets only afterwards.
        original = object.__new__(type(self.original))
        original.__dict__ = replica.__dict__
        replica.__dict__["original"] = original
        return replica


def call_forward(module: nn.Module, *args):
    """A node of a graph that ``torch.fx`` traced; without the module's hooks, which are traced."""
    return module.forward(*args)


def _children(queue: list[nn.Module]) -> list[nn.Module]:
    """All modules inside those of a queue: the children of the first, of the second, and so on.

    The children of the queue's modules and of these, in order, are these.
    """
    found = list(queue)
    for module in found:
        found += [child for child in module._modules.values() if child is not None]
    return found[len(queue) :]


def submodules(module: nn.Module) -> list[nn.Module]:
    """All modules inside a module, in order."""
    found = []
    for child in module._modules.values():
        if child is not None:
            found += [child, *submodules(child)]
    return found


def is_pristine(module: nn.Module, hooks: bool = True) -> bool:
    """Whether calling a module runs its class's forward on plain parameters, and nothing else.

    Args:
        hooks: whether hooks count, too.
    """
    hooked = hooks and any(module.__dict__[name] for name in HOOKS)
    # Other types compute their weights (quantised, sharded).
    plain = all(type(weight) in PLAIN for weight in module._parameters.values())
    return plain and not hooked and "forward" not in module.__dict__


def is_observed() -> bool:
    """True under tracing, functorch transforms, forward-mode AD or global module hooks."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    hooked = any(map(vars(module_globals).__getitem__, _GLOBAL_HOOKS))
    return jit.is_tracing() or transformed or hooked
