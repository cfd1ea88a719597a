"""Tensors that depend on sizes alone: made once for each size, instead of in every forward pass."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def sized_constant(make: Callable) -> Callable:
    """Decorator of ``make(*sizes, dtype, device)``, which is then called as ``(like, *sizes)``.

    It gives what ``make`` gives for the dtype and device of the tensor ``like``, and keeps it. What
    is traced, transformed or captured in a CUDA graph gets its own: its tensors end with it.
    """

    @functools.lru_cache(maxsize=256)
    def kept(*sizes, dtype: torch.dtype, device: torch.device):
        with torch.inference_mode(False):  # a backward pass may read it later
            return make(*sizes, dtype=dtype, device=device)

    @functools.wraps(make)
    def constant(like: Tensor, *sizes):
        get = make if _is_short_lived(like) else kept
        return get(*sizes, dtype=like.dtype, device=like.device)

    return constant


def _is_short_lived(like: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(like) not in (Tensor, torch.nn.Parameter)  # fake ones, say
        or torch._C._are_functorch_transforms_active()
        or (like.is_cuda and torch.cuda.is_current_stream_capturing())
    )
