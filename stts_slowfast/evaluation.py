"""How both engines evaluate a model: in which precision, and compiled or not.

A model is the same before and after: its parameters, their objects and its checkpoints.
"""

import contextlib
import functools
import logging
import traceback
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from stts_slowfast.fused import replacement
from stts_slowfast.selectors import Selector

logger = logging.getLogger(__name__)

# Layers whose inputs and weights autocast casts, whatever the model; exact types only.
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: str, mode: str) -> Iterator[None]:
    """Context manager: calls of a model in evaluation run as two keys specify.

    Args:
        model: on its device, wrapped by DDP or not.
        precision: ``TEST.PRECISION``: ``float32`` (no autocast, whatever is around it),
            ``bfloat16`` or ``float16``.
        mode: ``TEST.COMPILE``: a mode of ``torch.compile``, or empty.

    Raises:
        ValueError: if the model cannot be evaluated so, naming the key.
    """
    with contextlib.ExitStack() as stack:
        if precision == "float32":
            device = next(model.parameters()).device.type
            stack.enter_context(torch.autocast(device, enabled=False))
        else:
            stack.enter_context(half_precision(model, getattr(torch, precision)))
        if mode:
            stack.enter_context(compiled(model, mode))
        yield


# --- precision ------------------------------------------------------------------------------------


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Context manager: ``torch.set_float32_matmul_precision``; empty changes nothing."""
    before = torch.get_float32_matmul_precision()
    if precision:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if precision:
            torch.set_float32_matmul_precision(before)


def log_strict_float32(training: bool, half: bool) -> None:
    """Logs, for a job on a GPU, that its matrix products are slow, if they are; once a job.

    Args:
        training: whether the job trains; else it tests.
        half: whether it does so in bfloat16 or float16.
    """
    if half or torch.get_float32_matmul_precision() != "highest":
        return
    faster = "TRAIN.MIXED_PRECISION True" if training else "TEST.PRECISION bfloat16"
    logger.info(
        "matrix products in float32 without TF32 are slow on a GPU; faster: "
        "MODEL.FLOAT32_MATMUL_PRECISION high, or %s",
        faster,
    )


@contextlib.contextmanager
def half_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Context manager: a model runs under autocast, with the weights of its layers cast once.

    The numbers are autocast's, which would cast each weight in each call. What selectors compute
    stays float32, and so do the model's outputs.

    Args:
        model: for evaluation only: the cast weights have no gradients.
        dtype: bfloat16 or float16.

    Raises:
        ValueError: if a layer is called outside autocast, in float32.
    """
    device = next(model.parameters()).device.type
    slots = [(layer, key) for layer in _layers(model) for key in ("weight", "bias")]
    originals = [layer._parameters.get(key) for layer, key in slots]
    casts = [_cast(weight, dtype) for weight in originals]
    hook = model.register_forward_hook(_to_float32)
    try:
        for (layer, key), cast in zip(slots, casts):
            if cast is not None:
                layer._parameters[key] = cast
        with torch.autocast(device, dtype):
            yield
    except RuntimeError as error:
        layer = _called_outside_autocast(error, {layer for layer, _ in slots}, dtype)
        if layer is None:
            raise
        name = next(name for name, module in model.named_modules() if module is layer)
        raise ValueError(
            f"TEST.PRECISION is {str(dtype).removeprefix('torch.')!r}, but this "
            f"{type(model).__name__} calls its layer {name} outside autocast: set TEST.PRECISION "
            f"float32 ({error})"
        ) from error
    finally:
        hook.remove()
        for (layer, key), cast, original in zip(slots, casts, originals):
            if cast is not None and layer._parameters.get(key) is cast:
                layer._parameters[key] = original
        torch.clear_autocast_cache()  # it may have casts of other weights, which may change


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers in which autocast computes."""
    selectors = {
        id(module)
        for selector in model.modules()
        if isinstance(selector, Selector)
        for module in selector.modules()
    }
    found = [module for module in model.modules() if type(module) in LAYERS]
    return [module for module in found if id(module) not in selectors]


def _cast(weight: Tensor | None, dtype: torch.dtype) -> nn.Parameter | None:
    # Other types are sharded or quantised, and on meta are offloaded weights: autocast casts them.
    if weight is None or type(weight) not in replacement.PLAIN or weight.is_meta:
        return None
    if weight.dtype != torch.float32:
        return None
    return nn.Parameter(weight.detach().to(dtype), requires_grad=False)


def _to_float32(module: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, output)


def _called_outside_autocast(
    error: BaseException, layers: set[nn.Module], dtype: torch.dtype
) -> nn.Module | None:
    """The layer whose call raised an error that it would not have raised under autocast."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    layer, x = frame.f_locals.get("self"), frame.f_locals.get("input")
    if not (isinstance(layer, LAYERS) and layer in layers and isinstance(x, Tensor)):
        return None
    try:
        with torch.no_grad(), torch.autocast(x.device.type, dtype):
            layer(x)
    except RuntimeError:
        return None
    return layer


# --- compilation ----------------------------------------------------------------------------------

# By model and mode; they live as long as their model, so that each validation of a run finds what
# the first one compiled.
_compiled: "weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]]"
_compiled = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def compiled(model: nn.Module, mode: str) -> Iterator[None]:
    """Context manager: calls of a model run what ``torch.compile`` makes of it.

    Shapes are static, those of the first call: a batch of another size (the last one) runs as
    without compilation.

    Args:
        model: wrapped by DDP or not; in evaluation.
        mode: of ``torch.compile``: ``default``, ``reduce-overhead`` (on a GPU, CUDA graphs) or
            ``max-autotune``.

    Raises:
        ValueError: if it cannot be compiled.
    """
    module = model.module if isinstance(model, DistributedDataParallel) else model
    before = module._compiled_call_impl
    calls = _compiled.setdefault(module, {})
    calls[mode] = calls.get(mode) or _compile(mode)
    module._compiled_call_impl = functools.partial(_call, _Shapes(), calls[mode], module, mode)
    try:
        yield
    finally:
        module._compiled_call_impl = before


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Context manager: calls of a model run as without :func:`compiled`."""
    before: Any = model._compiled_call_impl
    model._compiled_call_impl = None
    try:
        yield
    finally:
        model._compiled_call_impl = before


def _compile(mode: str) -> Callable[..., Any]:
    def call(module: Any, args: Any, kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # Graphs are kept by code object, and few for each: every model has one of its own.
    own = FunctionType(call.__code__.replace(), call.__globals__, f"evaluate_{mode}")
    compiled_call: Callable[..., Any] = torch.compile(own, mode=mode, dynamic=False)
    return compiled_call


class _Shapes:
    """The shapes of a first call."""

    first: list[torch.Size] | None = None

    def match(self, values: Any) -> bool:
        shapes = [x.shape for x in tree_leaves(values) if isinstance(x, Tensor)]
        self.first = shapes if self.first is None else self.first
        return shapes == self.first


def _call(shapes: _Shapes, call: Any, module: Any, mode: str, *args: Any, **kwargs: Any) -> Any:
    if torch.is_grad_enabled() or module.training or not shapes.match((args, kwargs)):
        return module._call_impl(*args, **kwargs)
    try:
        output = call(module, args, kwargs)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(
            f"TEST.COMPILE is {mode!r}, but this {type(module).__name__} cannot be compiled here: "
            f"set TEST.COMPILE '' ({error})"
        ) from error
    # The next replay of a CUDA graph overwrites what the last one returned.
    return tree_map_only(Tensor, torch.clone, output)
