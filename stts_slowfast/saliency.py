"""Training of scores by saliency: by the loss's gradient on tokens that are all kept.

The saliency of a token ``x`` is the sum over its channels of ``|dL/dx_c (x_c - m_c)|``, with the
loss ``L`` and the mean ``m`` of the clip's tokens: what all tokens share tells none from another.
The saliency of a candidate, a frame or a window, is the mean over its tokens. docs/experiments.md
compares it with other measures.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_slowfast.windows import WindowSize

# Of the softmax of scores. Below 1, a scorer whose weights start small has less to learn.
TEMPERATURE = 0.3


def teach(
    tokens: Tensor,
    scores: Tensor,
    candidates: tuple[WindowSize, WindowSize] | None,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Returns ``tokens``; in the backward pass their gradient teaches ``scores``.

    The gradient of the tokens passes unchanged. The gradient of the scores is that of each clip's
    cross entropy between ``softmax(scores / temperature)`` and the candidates' shares of the clip's
    saliency, times the mean saliency of a clip in the batch. So it scales with the loss (a
    ``GradScaler``, a mean over accumulated batches or processes), while the clips of a batch have
    equal weight, however small their losses. Between batches, of accumulation or of other
    processes, the weight is that of their losses. A clip whose saliency is 0, or was rounded to 0,
    teaches nothing. A second derivative takes the gradient of the scores for a constant.

    Args:
        tokens: ``(B, T, H, W, C)``, all of which are kept: dropped ones would have no gradient.
        scores: ``(B, T, d)``, one for each of the ``d`` windows of a frame, row by row; or
            ``(B, 1, d)`` for windows that all frames share.
        candidates: height and width of a window in tokens, and the tokens between neighbouring
            windows along both axes; for whole frames both are the frame's size. With None scores
            learn nothing: their gradient is 0, since DDP expects one.
        temperature: of the softmax.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return _Teach.apply(tokens, scores, candidates, temperature)


class _Teach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        scores: Tensor,
        candidates: tuple[WindowSize, WindowSize] | None,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(scores, *([] if candidates is None else [tokens]))
        ctx.candidates, ctx.temperature = candidates, temperature
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        with torch.no_grad():  # a second derivative takes what teaches the scores for a constant
            return grad_output, _Teach.scores_gradient(ctx, grad_output), None, None

    @staticmethod
    def scores_gradient(ctx: Any, grad_output: Tensor) -> Tensor:
        """Of the cross entropy, times the mean saliency of a clip."""
        scores, *tokens = ctx.saved_tensors
        if ctx.candidates is None:
            return torch.zeros_like(scores)
        # In half precision small products would be lost.
        x = tokens[0].to(scores.dtype)
        products = (x - x.mean(dim=(1, 2, 3), keepdim=True)).mul_(grad_output)
        saliency = products.abs_().sum(dim=4, dtype=scores.dtype)  # (B, T, H, W)
        shares = F.avg_pool2d(saliency.flatten(0, 1)[:, None], *ctx.candidates)
        shares = shares.view(*saliency.shape[:2], -1)  # (B, T, d)
        if scores.shape[1] == 1:
            shares = shares.mean(dim=1, keepdim=True)
        total = shares.sum(dim=(1, 2), keepdim=True)
        probabilities = (scores / ctx.temperature).flatten(1).softmax(dim=1).view_as(scores)
        grad = torch.where(total > 0, (probabilities - shares / total) / ctx.temperature, 0.0)
        lesson: Tensor = grad * saliency.sum(dim=(1, 2, 3)).mean()
        return lesson
