"""Scores taught by saliency: by what the loss's gradient says of the tokens that pass.

A token ``x`` is as salient as the loss ``L`` changes along its channels: the sum over them of
``|dL/dx_c x_c|``. A candidate, a frame or a window, is as its tokens are on average.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def teach(
    tokens: Tensor,
    scores: Tensor,
    candidates: tuple[tuple[int, int], tuple[int, int]] | None,
    temperature: float = 1.0,
) -> Tensor:
    """Returns ``tokens``; in the backward pass their gradient teaches ``scores``.

    The gradient of the tokens is passed on as it is. That of the scores is the one of each clip's
    cross entropy between ``softmax(scores / temperature)`` and the candidates' shares of the clip's
    saliency, times the saliency of a clip, a mean over the batch. So it grows and shrinks with the
    loss, whatever scales that (a ``GradScaler``, a mean over accumulated batches or processes),
    while a clip of small loss teaches as much as another of its batch. A clip without any saliency,
    since its gradient is 0 or was rounded to it, teaches nothing.

    Args:
        tokens: ``(B, T, H, W, C)``, all of which pass: of what is dropped the gradient is 0.
        scores: ``(B, T, d)``, one for each of the ``d`` windows of a frame, row by row; or
            ``(B, 1, d)`` for windows that all frames share.
        candidates: height and width of a window in tokens, and the tokens between neighbouring
            windows along both axes; of whole frames all four are the frame's. None for no lesson:
            the scores' gradient is then 0, which DDP, unlike no gradient, expects.
        temperature: of the softmax.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return _Teach.apply(tokens, scores, candidates, temperature)


class _Teach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, scores, candidates, temperature):
        ctx.save_for_backward(scores, *([] if candidates is None else [tokens]))
        ctx.candidates, ctx.temperature = candidates, temperature
        return tokens.view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        scores, *tokens = ctx.saved_tensors
        if ctx.candidates is None:
            return grad_output, torch.zeros_like(scores), None, None
        # In half precision small products would be lost.
        products = grad_output.to(scores.dtype) * tokens[0]
        saliency = products.abs_().sum(dim=4, dtype=scores.dtype)  # (B, T, H, W)
        shares = F.avg_pool2d(saliency.flatten(0, 1)[:, None], *ctx.candidates)
        shares = shares.view(*saliency.shape[:2], -1)  # (B, T, d)
        if scores.shape[1] == 1:
            shares = shares.mean(dim=1, keepdim=True)
        total = shares.sum(dim=(1, 2), keepdim=True)
        chances = (scores / ctx.temperature).flatten(1).softmax(dim=1).view_as(scores)
        grad = torch.where(total > 0, (chances - shares / total) / ctx.temperature, 0.0)
        return grad_output, grad * saliency.sum(dim=(1, 2, 3)).mean(), None, None
