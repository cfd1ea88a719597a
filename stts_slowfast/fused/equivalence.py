"""Checks that a replacement computes what its original does, once per process and configuration."""

import copy
from collections import OrderedDict
from functools import lru_cache

import torch
from torch import Tensor, nn

from stts_slowfast.fused.replacement import HOOKS, Replacement, submodules


def verify_equivalence(replacement: Replacement) -> str:
    """How a replacement differs from its original; empty if both agree.

    Both are compared on a few tokens, in float32 and evaluation, with random weights in place of
    the module's own, which are not read. Replacements of one configuration (classes, their forward
    functions, settings and shapes) are compared once per process.
    """
    return _compare(_CacheKey(replacement))


class _CacheKey:
    """A replacement as the key of a cache: equal to all of its configuration."""

    def __init__(self, replacement: Replacement):
        self.replacement = replacement
        modules = [replacement, replacement.original, *submodules(replacement)]
        self.signature = (replacement.fuse, *(_signature(module) for module in modules))

    def __hash__(self) -> int:
        return hash(self.signature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CacheKey) and self.signature == other.signature


def _signature(module: nn.Module) -> tuple:
    cls = type(module)
    settings = [
        (name, repr(value))
        for name, value in vars(module).items()
        if name[0] != "_" and name != "training" and not isinstance(value, (nn.Module, Tensor))
    ]
    tensors = [*module._parameters.items(), *module._buffers.items()]
    shapes = [(name, None if t is None else t.shape) for name, t in tensors]
    return cls, cls.forward, tuple(settings), tuple(shapes)


@lru_cache(maxsize=1024)
def _compare(key: _CacheKey) -> str:
    # The key stays in the cache, and its model must not.
    replacement, key.replacement = key.replacement, None
    try:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            twin = _twin(replacement, generator)
            for sample in twin.sample_inputs(generator):
                expected = _tokens(twin.original.forward(*sample))
                for implementation in twin.implementations():
                    error = (_tokens(implementation(*sample)) - expected).abs().max()
                    if not error <= 1e-4 * expected.abs().max():
                        return f"the new output differs from the original by {float(error):.2g}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _tokens(out) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _twin(replacement: Replacement, generator: torch.Generator) -> Replacement:
    """A copy in float32 and evaluation, with random weights and without hooks."""
    memo = {id(vars(replacement).get("model")): None}
    for module in (replacement, replacement.original, *submodules(replacement)):
        for name in HOOKS:
            memo[id(module.__dict__[name])] = OrderedDict()
        for weight in module._parameters.values():
            if weight is not None:
                fan_in = weight.shape[1:].numel() if weight.dim() > 1 else 1
                random = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                memo[id(weight)] = nn.Parameter(random * fan_in**-0.5)
    return copy.deepcopy(replacement, memo).float().eval()
