"""Tensors that depend only on sizes, cached by size."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def sized_constant(make: Callable[..., T]) -> Callable[..., T]:
    """Decorator of ``make(*sizes, dtype, device)``, which is then called as ``(like, *sizes)``.

    It returns what ``make`` returns for the dtype and device of the tensor ``like``, and caches it,
    except inside traced, transformed and captured code, whose tensors end with it.
    """

    @functools.lru_cache(maxsize=256)
    def cached(*sizes: int, dtype: torch.dtype, device: torch.device) -> T:
        with torch.inference_mode(False):  # a backward pass may read it later
            return make(*sizes, dtype=dtype, device=device)

    @functools.wraps(make)
    def constant(like: Tensor, *sizes: int) -> T:
        get = make if _is_short_lived(like) else cached
        return get(*sizes, dtype=like.dtype, device=like.device)

    return constant


def _is_short_lived(like: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(like) not in (Tensor, torch.nn.Parameter)  # such as fake ones
        or torch._C._are_functorch_transforms_active()
        or (like.is_cuda and torch.cuda.is_current_stream_capturing())
    )
