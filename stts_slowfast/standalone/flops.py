"""The compute of one clip, counted by fvcore as SlowFast counts it."""

import warnings

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
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        count = analysis.total()
    model.train(training)
    return count / 1e9
