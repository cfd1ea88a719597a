"""Top-K selection: hard, and as a perturbed maximum that gradients pass through."""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

GRADIENTS = ("exact", "diagonal")

# Below this noise level the smoothed operator cannot be told from the hard one, and 1 / sigma in
# its gradient would only blow up rounding errors.
SMALLEST_SIGMA = 1e-4


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores of each row, in ascending order.

    Args:
        scores: ``(B, d)``, any floating dtype.
        k: how many to keep, ``1 <= k <= d``.

    Returns:
        LongTensor ``(B, k)``; each row ascends, so that kept frames stay in their order.

    Raises:
        ValueError: where ``scores`` is not 2-D, holds NaN, or ``k`` is out of range.
    """
    _check(scores, k)
    return scores.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def perturbed_topk(
    scores: Tensor,
    k: int,
    num_samples: int = 500,
    sigma: float | Tensor = 0.05,
    gradient: str = "exact",
    noise: Tensor | None = None,
) -> Tensor:
    """Differentiable Top-K: the mean of one-hot Top-K indicators over Gaussian perturbations.

    ``Y = E[ topk(scores + sigma * Z) ]`` with ``Z ~ N(0, 1)``, where row ``i`` of an indicator
    marks the i-th kept entry in ascending order of position (arXiv 2111.11591, section 3.3; the
    perturbed maximum is from arXiv 2002.08676). Computed in float32 also inside autocast.

    Args:
        scores: ``(B, d)``, any floating dtype; meaningful sigmas suppose a range of about 0 to 1.
        k: how many to keep, ``1 <= k <= d``.
        num_samples: perturbations drawn per row; ignored where ``noise`` is given.
        sigma: standard deviation of the noise, a number or a 0-dim tensor. At or below
            ``SMALLEST_SIGMA`` selection is hard and the gradient is zero.
        gradient: ``"exact"``, the score-function estimate ``E[(<g, Y_z> - mean) Z] / sigma`` with
            the sample mean as baseline; or ``"diagonal"``, which keeps the diagonal of the
            Jacobian alone, as the STTS authors' code does (github.com/wangjk666/STTS).
        noise: ``(B, num_samples, d)`` standard normal samples to use instead of drawing them.

    Returns:
        float32 ``(B, k, d)`` indicators; every row sums to 1.

    Raises:
        ValueError: for scores that are not 2-D or hold NaN, ``k`` or ``num_samples`` out of range,
            an unknown ``gradient``, or ``noise`` of another shape.
    """
    _check(scores, k)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient is {gradient!r}: use one of {', '.join(GRADIENTS)}")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: draw at least one")
    with full_precision(scores):
        scores = scores.float()
        if noise is None:
            noise = scores.new_empty(scores.shape[0], num_samples, scores.shape[1]).normal_()
        elif noise.dim() != 3 or noise.shape[::2] != scores.shape or noise.shape[1] < 1:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)} for scores {tuple(scores.shape)}: "
                "give (B, num_samples, d)"
            )
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=scores.device)
        return _PerturbedTopK.apply(scores, noise.float(), sigma, k, gradient)


def full_precision(tensor: Tensor):
    """A context that switches autocast off on the device of ``tensor``."""
    if tensor.is_meta:  # has no autocast
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


class _PerturbedTopK(torch.autograd.Function):
    """Keeps the noise and, of every sample, only the indices: memory is O(n (k + d)) a row."""

    @staticmethod
    def forward(ctx, scores, noise, sigma, k, gradient):
        batch, num_samples, d = noise.shape
        noise_level = torch.where(sigma > SMALLEST_SIGMA, sigma, 0.0)
        perturbed = torch.addcmul(scores[:, None], noise, noise_level)  # (B, n, d)
        if k == 1:
            places = perturbed.argmax(dim=2)  # (B, n)
        else:
            # The rank of a kept entry is the number of kept entries before it: counting them is
            # several times faster than sorting the indices. Entry (i, j) lies at i * d + j.
            kept = perturbed.topk(k, dim=2, sorted=False).indices  # (B, n, k)
            del perturbed
            marks = torch.zeros_like(noise, dtype=torch.uint8).scatter_(2, kept, 1)
            ranks = marks.cumsum(2, dtype=torch.int32).gather(2, kept)  # 1..k
            places = kept.add_(ranks.sub_(1), alpha=d).flatten(1)  # (B, n*k)
        ones = scores.new_ones(()).expand(places.shape)
        indicators = scores.new_zeros(batch, k * d).scatter_add_(1, places, ones)
        ctx.save_for_backward(noise, sigma, places)
        ctx.gradient = gradient
        return indicators.div_(num_samples).view(batch, k, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        noise, sigma, places = ctx.saved_tensors
        batch, num_samples, d = noise.shape
        marked = grad_output.reshape(batch, -1).gather(1, places)  # (B, n*k)
        if ctx.gradient == "exact":
            weights = marked.view(batch, num_samples, -1).sum(dim=2)  # (B, n) = <g, Y_z>
            weights = weights - weights.mean(dim=1, keepdim=True)
            grad = torch.bmm(weights[:, None], noise).squeeze(1)  # (B, d)
        else:
            columns = places.remainder(d)
            noise = noise.gather(2, columns.view(batch, num_samples, -1)).flatten(1)
            grad = noise.new_zeros(batch, d).scatter_add_(1, columns, marked * noise)
        scale = torch.where(sigma > SMALLEST_SIGMA, 1.0 / (num_samples * sigma), 0.0)
        return grad * scale, None, None, None, None


def _check(scores: Tensor, k: int) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give (B, d)")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k is {k} for {scores.shape[1]} scores a row: 1 <= k <= d must hold")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    message = "scores hold NaN: look for an overflow before the scorer (loss scale, learning rate)"
    if scores.is_cuda:
        # Checked on the device, when the kernel runs: asking from the host would wait for it.
        torch._assert_async(~scores.isnan().any(), message)
    elif scores.device.type == "cpu" and scores.isnan().any():
        raise ValueError(message)
