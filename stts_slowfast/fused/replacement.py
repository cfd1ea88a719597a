"""Views: what stands in for a stock module, and steps aside where that would be noticed.

A view shares the attributes, parameters and children of the module it stands in for. It computes
the same from them by other means, and only while they are what they were when it was put in: as
soon as a part has a hook, or was wrapped or replaced (adapters, quantised layers, observers,
parametrizations), the stock module computes, and every part is called as a module. The stock
module computes too under ``torch.func`` and forward-mode differentiation, which do not see into our
operators, while ``torch.jit`` traces (fvcore counts that way), and where hooks on all modules look
on. Second derivatives outside of ``torch.func`` raise; ``configure(model, False, ...)`` has them.

That a view computes the same is not believed: :func:`verify_equivalence` compares both, once per kind.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor, jit, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as every_module

# The kinds of view, each of which says by `knows` what it can stand in for: those of parts of a
# block and around blocks, and those of blocks. The files of hosts add theirs.
SUBMODULES: list[type["Replacement"]] = []
BLOCKS: list[type["Replacement"]] = []
# Functions that tell of a model what reads its last block's tokens, if that drops all but the cls.
FINAL_NORMS = []

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (nn.Parameter, Tensor, type(None))


@dataclass
class FuseOptions:
    """What is asked for, and what has to be known of the model around a module.

    Attributes:
        fuse: compute by other means what can be.
        true_distances: relative positions stay true after a selection.
        cropped: the modules that run behind a selection of windows.
        readers: the last block of a model, to that model and what reads the block's tokens there,
            if it drops all but the cls.
    """

    fuse: bool
    true_distances: bool
    cropped: set[nn.Module] = field(default_factory=set)
    final_norms: dict[nn.Module, tuple[nn.Module, nn.Module]] = field(default_factory=dict)


class Replacement(nn.Module):
    """A second view of a stock module: same attributes, parameters and children.

    Args:
        stock: the module to stand in for.
        fuse: whether to compute by other means while the parts allow it.
    """

    def __init__(self, stock: nn.Module, fuse: bool = True, **more):
        super().__init__()
        # Shared dictionaries: what happens to one happens to the other, and a copy copies both.
        self.__dict__.update(stock.__dict__)
        kinds = tuple(map(type, submodules(self)))
        self.__dict__.update(original=stock, fuse=fuse, kinds=kinds, **more)

    @classmethod
    def matches(cls, module: nn.Module, parent: nn.Module, name: str) -> bool:
        """Whether it can stand in for ``module``, the child ``name`` of ``parent``."""
        raise NotImplementedError

    @classmethod
    def build(cls, stock: nn.Module, request: FuseOptions) -> "Replacement | None":
        """The view that a request needs; None where it needs none."""
        return cls(stock) if request.fuse else None

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        """Random inputs on which it must compute what the stock module does."""
        raise NotImplementedError

    def implementations(self) -> list:
        """The functions by which it may compute, each taking an example."""
        return [self.fused]

    def fused(self, *args):
        """Computes the stock module's output by other means."""
        raise NotImplementedError

    def forward(self, *args):
        return self.fused(*args) if self.is_fused() else self.original.forward(*args)

    def is_fused(self) -> bool:
        """Whether the parts are what they were, and nobody looks on who must see them run."""
        if not self.fuse or is_observed():
            return False
        found = submodules(self)
        same = tuple(map(type, found)) == self.kinds
        return same and all(is_pristine(part) for part in found) and is_pristine(self, hooks=False)

    def train(self, mode: bool = True) -> "Replacement":
        self.original.training = mode
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> "Replacement":
        replica = super()._replicate_for_data_parallel()
        # A stock module with the replica's parameters, which DataParallel sets only afterwards.
        stock = object.__new__(type(self.original))
        stock.__dict__ = replica.__dict__
        replica.__dict__["original"] = stock
        return replica


def run(module: nn.Module, *args):
    """A node of a graph that ``torch.fx`` traced: a view without its hooks, which are traced."""
    return module.forward(*args)


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
    hooked = hooks and any(module.__dict__[name] for name in _HOOKS)
    return not hooked and "forward" not in module.__dict__ and plain_weights(module)


def plain_weights(module: nn.Module) -> bool:
    """Whether its parameters are tensors, not something that computes one (quantised, sharded)."""
    return all(type(weight) in _PLAIN for weight in module._parameters.values())


def is_observed() -> bool:
    """Whether somebody looks on who does not see into our operators, or wants every module."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    hooked = any(getattr(every_module, f"_global{hooks}") for hooks in _HOOKS)
    return jit.is_tracing() or transformed or hooked


def verify_equivalence(view: Replacement) -> str:
    """How a view computes something else than its stock module; empty where both agree.

    Both are compared on a few tokens, in float32 and evaluation, with random weights in place of
    the module's own, which are not read. Views of one kind (classes, their forward functions,
    settings and shapes) are compared once per process.
    """
    return _compare(_Kind(view))


class _Kind:
    """A view as the key of a cache: equal to all views of its kind."""

    def __init__(self, view: Replacement):
        self.view = view
        modules = [view, view.original, *submodules(view)]
        self.signature = (view.fuse, *(_signature(module) for module in modules))

    def __hash__(self) -> int:
        return hash(self.signature)

    def __eq__(self, other: "_Kind") -> bool:
        return self.signature == other.signature


def _signature(module: nn.Module) -> tuple:
    kind = type(module)
    settings = [
        (name, repr(value))
        for name, value in vars(module).items()
        if name[0] != "_" and name != "training" and not isinstance(value, (nn.Module, Tensor))
    ]
    tensors = [*module._parameters.items(), *module._buffers.items()]
    shapes = [(name, None if t is None else t.shape) for name, t in tensors]
    return kind, kind.forward, tuple(settings), tuple(shapes)


@lru_cache(maxsize=1024)
def _compare(kind: _Kind) -> str:
    view, kind.view = kind.view, None  # the key lives on in the cache, and its model must not
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            twin = _twin(view, generator)
            for example in twin.sample_inputs(generator):
                expected = _tensor(twin.original.forward(*example))
                for way in twin.implementations():
                    error = (_tensor(way(*example)) - expected).abs().max()
                    if not error <= 1e-4 * expected.abs().max():
                        return f"its numbers are {float(error):.2g} off"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _tensor(out) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _twin(view: Replacement, generator: torch.Generator) -> Replacement:
    """A copy in float32 and evaluation, with random weights and without hooks."""
    memo = {id(vars(view).get("model")): None}
    for module in (view, view.original, *submodules(view)):
        for name in _HOOKS:
            memo[id(module.__dict__[name])] = OrderedDict()
        for weight in module._parameters.values():
            if weight is not None:
                fan_in = weight.shape[1:].numel() if weight.dim() > 1 else 1
                random = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                memo[id(weight)] = nn.Parameter(random * fan_in**-0.5)
    return copy.deepcopy(view, memo).float().eval()
