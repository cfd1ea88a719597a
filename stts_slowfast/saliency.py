"""Scores taught by saliency: by what the loss's gradient says of the tokens that pass.

A token ``x`` is as salient as the loss ``L`` changes along it, ``|<dL/dx, x>|``; a candidate, which
is a frame or a window, as its tokens are on average.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def teach(
    tokens: Tensor,
    scores: Tensor,
    known: Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
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
        tokens: ``(B, T, H, W, C)``, before any is dropped.
        scores: ``(B, T, d)``, one for each of the ``d`` windows of a frame, row by row; or
            ``(B, 1, d)`` for windows that all frames share.
        known: bool, of the shape of ``scores``: which candidates pass with all their tokens. Only
            among those is compared: of what is dropped the gradient knows nothing.
        window: height and width of a window in tokens; of ``tokens`` to score whole frames.
        stride: tokens between neighbouring windows along both axes.
        temperature: of the softmax.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(~known, -torch.inf)
    return _Teach.apply(tokens, scores, window, stride, temperature)


class _Teach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, scores, window, stride, temperature):
        ctx.save_for_backward(tokens, scores)
        ctx.window, ctx.stride, ctx.temperature = window, stride, temperature
        return tokens.view_as(tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        tokens, scores = ctx.saved_tensors
        # In half precision small products would be lost.
        products = grad_output.to(scores.dtype) * tokens.to(scores.dtype)
        saliency = products.sum(dim=4).abs()  # (B, T, H, W)
        shares = F.avg_pool2d(saliency.flatten(0, 1)[:, None], ctx.window, ctx.stride)
        shares = shares.view(*saliency.shape[:2], -1)  # (B, T, d)
        if scores.shape[1] == 1:
            shares = shares.mean(dim=1, keepdim=True)
        shares, logits = shares.flatten(1), scores.flatten(1) / ctx.temperature
        shares = torch.where(logits.isneginf(), 0.0, shares)
        total = shares.sum(dim=1, keepdim=True)  # (B, 1)
        error = logits.softmax(dim=1) - shares / total
        grad = torch.where(total > 0, error / ctx.temperature, 0.0)
        scale = saliency.sum(dim=(1, 2, 3)).mean()
        return grad_output, (grad * scale).view_as(scores), None, None, None
