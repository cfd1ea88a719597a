"""The compute of one clip, counted by fvcore as SlowFast counts it."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn


def count_gflops(model: nn.Module, clip: Tensor) -> float:
    """Billions of multiply-adds of one forward pass in evaluation, counted by fvcore."""
    training = model.training
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing, and of fvcore's own use of torch.jit
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(model, clip)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count = analysis.total()
    model.train(training)
    return count / 1e9


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of the fused operator, which fvcore does not know: models of transformers and
    timm call it."""
    from fvcore.nn.jit_handles import get_shape

    query, key, value = map(get_shape, inputs[:3])  # (..., N, D)
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
