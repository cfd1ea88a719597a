"""Top-K selection: hard, and as two soft operators that gradients pass through."""

from contextlib import nullcontext

import torch
from fvcore.common.registry import Registry
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_slowfast.keys import check_choice

# What STTS.OPERATOR names: functions of (scores (B, d), k, sigma, num_samples, gradient) that give
# float32 indicators (B, k, d), whose rows sum to 1 and are one-hot where sigma is 0.
OPERATORS = Registry("OPERATORS")

GRADIENTS = ("exact", "diagonal")

# Below this noise level the smoothed operator cannot be told from the hard one, and 1 / sigma in
# its gradient would only blow up rounding errors.
SMALLEST_SIGMA = 1e-4

# What infinite scores count as on a device, where nobody looks: divided by the smallest sigma and
# added up it is still far from what stands for the logarithm of 0.
_LARGEST = 1e6

NOT_FINITE = "scores hold NaN or infinity: look for an overflow before (loss scale, learning rate)"


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores of each row, in ascending order.

    Of equal scores the lower index wins, on every device: so scorers that do not learn, whose
    scores may tie, keep the same everywhere.

    Args:
        scores: ``(B, d)``, any floating dtype.
        k: how many to keep, ``1 <= k <= d``.

    Returns:
        LongTensor ``(B, k)``; each row ascends, so that kept frames stay in their order.

    Raises:
        ValueError: if ``scores`` is not 2-D, ``k`` is out of range, or a score is NaN or infinite
            (checked on a CPU only: on a device that would wait for it; see
            ``Selector.check_finite``).
    """
    _check(scores, k)
    if k == 1:  # argmax returns the first maximum
        return scores.argmax(dim=1, keepdim=True)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


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
        ValueError: for scores that are not 2-D or not finite (checked on a CPU only), ``k`` or
            ``num_samples`` out of range, an unknown ``gradient``, or ``noise`` of another shape.
    """
    hard = _one_hot_topk(scores, k)
    check_choice("gradient", gradient, GRADIENTS)
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
        soft = _PerturbedTopK.apply(scores, noise.float(), sigma, k, gradient)
        return torch.where(sigma > SMALLEST_SIGMA, soft, hard)


@OPERATORS.register()
def perturbed(
    scores: Tensor, k: int, sigma: float | Tensor, num_samples: int, gradient: str
) -> Tensor:
    """The paper's operator: :func:`perturbed_topk`."""
    return perturbed_topk(scores, k, num_samples, sigma, gradient)


@OPERATORS.register()
def subset(
    scores: Tensor, k: int, sigma: float | Tensor, num_samples: int = 0, gradient: str = "exact"
) -> Tensor:
    """The operator without noise: exact indicators of a distribution over subsets.

    A subset ``S`` of ``k`` entries has the probability ``p(S) ~ exp(sum of its scores / sigma)``
    (conditional Bernoulli sampling; Chen, Dempster and Liu, Biometrika 81(3), 1994). Row ``i``,
    column ``j`` is the probability that the i-th kept entry is ``j``: ``e_i(before j) w_j
    e_{k-1-i}(after j) / e_k(all)`` with ``w = exp(scores / sigma)`` and elementary symmetric
    polynomials ``e``, by their recurrence in logarithms and float64, ``O(d k)``. For ``k`` 1 it is
    a softmax.

    Args:
        scores: ``(B, d)``, any floating dtype.
        k: how many to keep, ``1 <= k <= d``.
        sigma: temperature, a number or a 0-dim tensor. At or below ``SMALLEST_SIGMA`` selection is
            hard and the gradient is zero.
        num_samples: nothing is sampled.
        gradient: it is exact, by autograd.

    Returns:
        float32 ``(B, k, d)`` indicators; every row sums to 1.

    Raises:
        ValueError: for scores that are not 2-D or not finite (checked on a CPU only; on a device
            the result has no NaN), or ``k`` out of range.
    """
    hard = _one_hot_topk(scores, k)
    with full_precision(scores):
        precise = scores.float() if scores.device.type == "mps" else scores.double()
        precise = precise.clamp(-_LARGEST, _LARGEST)  # of infinite scores on a device
        sigma = torch.as_tensor(sigma, dtype=precise.dtype, device=scores.device)
        soft_enough = sigma > SMALLEST_SIGMA
        logits = precise / torch.where(soft_enough, sigma, 1.0)
        logits = logits - logits.amax(dim=1, keepdim=True).detach()
        if k == 1:
            soft = logits.softmax(dim=1)[:, None]
        else:
            before = _log_symmetric(logits, k)  # (B, d, k)
            after = _log_symmetric(logits.flip(1), k).flip(1, 2)
            joint = before + after + logits[:, :, None]
            # The first kept entry is one of all: its column adds up to e_k(all).
            soft = (joint - joint[:, :, :1].logsumexp(dim=1, keepdim=True)).exp().transpose(1, 2)
        return torch.where(soft_enough, soft, hard.to(soft.dtype)).float()


def _one_hot_topk(scores: Tensor, k: int) -> Tensor:
    """Indicators ``(B, k, d)`` without noise."""
    return F.one_hot(hard_topk(scores.detach(), k), scores.shape[1]).float()


def _log_symmetric(logits: Tensor, k: int) -> Tensor:
    """Logarithms ``(B, d, k)`` of ``e_0 .. e_{k-1}`` of all entries before each."""
    # As good as the logarithm of 0, and without its NaN gradients.
    nothing = logits.new_full((len(logits), 1), -1e30)
    row = torch.cat([torch.zeros_like(nothing), nothing.expand(-1, k - 1)], dim=1)
    rows = [row]
    for logit in logits[:, :-1].split(1, dim=1):
        row = torch.logaddexp(row, torch.cat([nothing, row[:, :-1] + logit], dim=1))
        rows.append(row)
    return torch.stack(rows, dim=1)


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
        # Ones add up to the same in any order.
        ones = scores.new_ones(()).expand(places.shape)
        indicators = scores.new_zeros(batch, k * d).scatter_add_(1, places, ones)
        ctx.save_for_backward(noise, sigma, places)
        ctx.gradient = gradient
        return indicators.div_(num_samples).view(batch, k, d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        noise, sigma, places = ctx.saved_tensors
        _, num_samples, d = noise.shape
        marked = grad_output.flatten(1).gather(1, places)  # (B, n*k)
        if ctx.gradient == "exact":
            weights = marked.unflatten(1, (num_samples, -1)).sum(dim=2)  # (B, n) = <g, Y_z>
            weights = weights - weights.mean(dim=1, keepdim=True)
            grad = torch.bmm(weights[:, None], noise).squeeze(1)  # (B, d)
        else:
            # A sample keeps an entry once at most, so nothing is added up in a scatter, whose order
            # on a GPU is that of its threads: the gradient is the same bits in every run.
            columns = places.remainder(d).unflatten(1, (num_samples, -1))  # (B, n, k)
            marked = marked.view_as(columns)
            grad = torch.zeros_like(noise).scatter_(2, columns, marked).mul_(noise).sum(dim=1)
        scale = torch.where(sigma > SMALLEST_SIGMA, 1.0 / (num_samples * sigma), 0.0)
        return grad * scale, None, None, None, None


def _check(scores: Tensor, k: int) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}: give (B, d)")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k is {k} for {scores.shape[1]} scores a row: 1 <= k <= d must hold")
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    if on_host(scores) and not scores.isfinite().all():
        raise ValueError(NOT_FINITE)


def on_host(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device."""
    return tensor.device.type == "cpu"
