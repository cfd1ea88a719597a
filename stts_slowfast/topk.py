"""Top-K selection: hard, and as two differentiable operators."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.constants import sized_constant

# PyTorch before 2.7 does not tell export from compilation.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

# By the names of STTS.OPERATOR: functions of (scores (B, d), k, sigma, num_samples, gradient) that
# return float32 indicators (B, k, d), whose rows sum to 1 and are one-hot if sigma is 0.
OPERATORS = Registry("OPERATORS")

GRADIENTS = ("exact", "diagonal")

# Below this noise level the smoothed operator equals the hard one, and 1 / sigma in its gradient
# would only amplify rounding errors.
SMALLEST_SIGMA = 1e-4

# Infinite scores are clamped to it on a device, where they are not checked: divided by the smallest
# sigma and summed, it does not overflow.
_LARGEST = 1e6

NOT_FINITE = "scores hold NaN or infinity: look for an overflow before (loss scale, learning rate)"


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` largest scores of each row, in ascending order.

    Of equal scores the lower index wins, on every device, so that scorers whose scores may tie
    (``uniform``) keep the same everywhere.

    Args:
        scores: ``(B, d)``, any floating dtype.
        k: how many to keep, ``1 <= k <= d``.

    Returns:
        LongTensor ``(B, k)``; each row ascends, so that kept frames stay in their order.

    Raises:
        ValueError: if ``scores`` is not 2-D, ``k`` is out of range, or a score is NaN or infinite
            (checked on a CPU only, since a check waits for the device; see
            ``Selector.check_finite``).
    """
    _check(scores, k)
    if k == 1:  # argmax returns the first maximum
        return scores.argmax(dim=1, keepdim=True)
    if is_exporting():
        return _topk_by_rank(scores, k)
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].sort(dim=1).values


def _topk_by_rank(scores: Tensor, k: int) -> Tensor:
    """:func:`hard_topk` without a stable sort, which ONNX does not have."""
    indices = torch.arange(scores.shape[1], device=scores.device)
    own, other = scores[:, :, None], scores[:, None]
    is_before = (other > own) | ((other == own) & (indices < indices[:, None]))
    order = torch.where(is_before.sum(dim=2) < k, -indices, -scores.shape[1])
    return order.topk(k, dim=1).indices


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
        num_samples: perturbations sampled per row; ignored if ``noise`` is given.
        sigma: standard deviation of the noise, a number or a 0-dim tensor. At or below
            ``SMALLEST_SIGMA`` selection is hard and the gradient is zero.
        gradient: ``"exact"``, the score-function estimate ``E[(<g, Y_z> - mean) Z] / sigma`` with
            the sample mean as baseline; or ``"diagonal"``, only the diagonal of the Jacobian, as
            in the STTS authors' code (github.com/wangjk666/STTS).
        noise: ``(B, num_samples, d)`` standard normal samples to use instead of new ones.

    Returns:
        float32 ``(B, k, d)`` indicators; every row sums to 1.

    Raises:
        ValueError: for scores that are not 2-D or not finite (checked on a CPU only), ``k`` or
            ``num_samples`` out of range, an unknown ``gradient``, or ``noise`` of another shape.
    """
    hard = _one_hot_topk(scores, k)
    check_choice("gradient", gradient, GRADIENTS)
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: it must be at least 1")
    with autocast_disabled(scores):
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
    column ``j`` is the probability that the i-th kept entry is ``j``. For ``k`` 1 it is a softmax,
    for more see :class:`_SubsetTopK`: a number of operations independent of ``d`` and ``k``,
    ``O(B d (d + k))`` memory in float64, an analytic gradient.

    Args:
        scores: ``(B, d)``, any floating dtype.
        k: how many to keep, ``1 <= k <= d``.
        sigma: temperature, a number or a 0-dim tensor. At or below ``SMALLEST_SIGMA`` selection is
            hard and the gradient is zero.
        num_samples: ignored, since nothing is sampled.
        gradient: ignored, since it is exact.

    Returns:
        float32 ``(B, k, d)`` indicators; every row sums to 1.

    Raises:
        ValueError: for scores that are not 2-D or not finite (checked on a CPU only; on a device
            the result has no NaN), or ``k`` out of range.
    """
    _check(scores, k)
    with autocast_disabled(scores):
        precise = scores.float() if scores.device.type == "mps" else scores.double()
        sigma = torch.as_tensor(sigma, dtype=precise.dtype, device=scores.device)
        if k > 1:
            return _SubsetTopK.apply(precise, sigma, k).float()
        soft_enough = sigma > SMALLEST_SIGMA
        precise = precise.clamp(-_LARGEST, _LARGEST)
        soft = (precise / torch.where(soft_enough, sigma, 1.0)).softmax(dim=1)[:, None]
        return torch.where(soft_enough, soft, _one_hot_topk(scores, k)).float()


def _one_hot_topk(scores: Tensor, k: int) -> Tensor:
    """Indicators ``(B, k, d)`` without noise."""
    return F.one_hot(hard_topk(scores.detach(), k), scores.shape[1]).float()


class _SubsetTopK(torch.autograd.Function):
    """Exact indicators of subsets, by Fourier transforms of the number of entries kept before each.

    Given that ``k`` entries are kept in all, the distribution of the subset is the same if each
    entry is kept independently with probability ``p_j = sigmoid(score_j / sigma - tilt)``, for any
    ``tilt``; so ``y_ij ~ P(i of those before j) p_j P(k-1-i of those after j)``. The number of kept
    entries among several has the characteristic function ``prod(1 + p (z - 1))`` on the unit
    circle; an odd number of points avoids ``z = -1``, at which a factor could vanish. The tilt
    makes ``k`` likely, so that rounding errors, which are absolute, stay at 1e-14 of the result.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sigma: Tensor, k: int) -> Tensor:
        d = scores.shape[1]
        soft_enough = sigma > SMALLEST_SIGMA
        sigma = torch.where(soft_enough, sigma, 1.0)
        logits = scores.clamp(-_LARGEST, _LARGEST) / sigma  # infinite on a device
        spokes, basis, conjugate, tilts, columns = _fourier(logits, d, k)
        order = logits.sort(dim=1, descending=True, stable=True)  # as hard_topk orders
        hard = order.indices[:, :k].sort(dim=1).values
        top = order.values[:, : k + 1]
        kept = (logits - _tilt(logits, top, k, tilts)).sigmoid()[:, :, None]  # (B, d, 1)
        factors = F.pad(kept, (0, 0, 1, 1)) * spokes + 1  # (B, 1 + d + 1, P); 1 at both ends
        products = torch.stack([factors[:, :-2], factors.flip(1)[:, :-2]]).cumprod(dim=2)
        before, after = torch.view_as_real(products).flatten(3) @ basis  # (B, d, k) each
        after = after.flip(1, 2)
        joint = before * after * kept
        total = joint.sum(dim=1, keepdim=True)
        soft = joint / total  # (B, d, k)
        ctx.save_for_backward(
            kept, factors, products, before, after, soft, total, sigma, soft_enough
        )
        ctx.constants = spokes, conjugate
        return torch.where(soft_enough, soft.transpose(1, 2), hard[:, :, None] == columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        kept, factors, products, before, after, soft, total, sigma, soft_enough = ctx.saved_tensors
        spokes, conjugate = ctx.constants
        grad = grad_output.transpose(1, 2)  # (B, d, k)
        grad = grad - (grad * soft).sum(dim=1, keepdim=True)
        own = (grad * soft).sum(dim=2, keepdim=True)  # through an entry's own probability
        scaled = grad * (kept / total)
        # Through the counts before and after: each entry is a factor of all products behind it.
        flow = torch.stack([scaled * after, (scaled * before).flip(1, 2)]) @ conjugate
        flow = torch.view_as_complex(flow.unflatten(3, (-1, 2))) * products  # (2, B, d, P)
        passed = flow.cumsum(dim=2)
        ahead = passed[:, :, -1:] - passed
        slopes = (ahead[0] + ahead[1].flip(1)) * (spokes / factors[:, 1:-1])
        slopes = slopes.real.sum(dim=2, keepdim=True) * kept
        grad = own + slopes
        grad = torch.addcmul(grad, grad, kept, value=-1).squeeze(2) / sigma  # times 1 - kept
        return torch.where(soft_enough, grad, 0.0), None, None


def _tilt(logits: Tensor, top: Tensor, k: int, tilts: Tensor) -> Tensor:
    """The candidate ``(B, 1)`` at which ``k`` of a row's entries are kept on average, or nearly.

    The exact tilt is within ``log(d) + 1`` of the k-th or the next largest logit, or anywhere
    between the two if they are far apart: ``tilts`` ``(3, n)`` weighs both and adds a step.
    """
    nearest = top[:, k - 1 :] if k < logits.shape[1] else top[:, -1:].expand(-1, 2)
    candidates = torch.addmm(tilts[2], nearest, tilts[:2])
    count = (logits[:, :, None] - candidates[:, None]).sigmoid().sum(dim=1)
    return candidates.gather(1, (count - k).abs().argmin(dim=1, keepdim=True))


@sized_constant
def _fourier(d: int, k: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The constants of :class:`_SubsetTopK`.

    Returns:
        ``z - 1`` at the ``P`` points, ``(P,)`` complex; the transform ``(2P, k)`` from products,
        real and imaginary parts in turn, to the probabilities of 0 to ``k - 1`` kept entries; the
        transform back, conjugated; the tilts of :func:`_tilt`; ``arange(d)``.
    """
    count = d // 2
    points = torch.arange(count + 1, dtype=dtype, device=device)
    angles = points * (2 * math.pi / (2 * count + 1))
    spokes = torch.polar(torch.ones_like(angles), angles) - 1
    turns = angles[:, None] * torch.arange(k, dtype=dtype, device=device)
    # Points come in conjugate pairs, of which only one is computed.
    weights = (2 - (points == 0).to(dtype)) / (2 * count + 1)
    basis = torch.stack([turns.cos(), turns.sin()], dim=1) * weights[:, None, None]  # (P, 2, k)
    signs = torch.stack([torch.ones_like(weights), -torch.ones_like(weights)], dim=1)
    conjugate = (basis * signs[:, :, None]).flatten(0, 1).t()
    steps = torch.linspace(-math.log(d) - 1, math.log(d) + 1, 33, dtype=dtype, device=device)
    ones, none = torch.ones_like(steps), torch.zeros_like(steps)
    both = torch.stack([torch.cat([ones, none]), torch.cat([none, ones]), steps.repeat(2)])
    middle = torch.tensor([[0.5], [0.5], [0.0]], dtype=dtype, device=device)
    columns = torch.arange(d, device=device)
    return spokes, basis.flatten(0, 1), conjugate, torch.cat([both, middle], dim=1), columns


def autocast_disabled(tensor: Tensor) -> AbstractContextManager[object]:
    """A context that disables autocast on the device of ``tensor``."""
    if tensor.is_meta:  # has no autocast
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


class _PerturbedTopK(torch.autograd.Function):
    """The perturbed maximum; it stores the noise and the kept indices of every sample:
    O(n (k + d)) memory per row."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, noise: Tensor, sigma: Tensor, k: int, gradient: str
    ) -> Tensor:
        batch, num_samples, d = noise.shape
        noise_level = torch.where(sigma > SMALLEST_SIGMA, sigma, 0.0)
        perturbed = torch.addcmul(scores[:, None], noise, noise_level)  # (B, n, d)
        if k == 1:
            flat_indices = perturbed.argmax(dim=2)  # (B, n)
        else:
            # The rank of a kept entry is the number of kept entries before it: counting them is
            # several times faster than sorting the indices. Entry (i, j) is at i * d + j.
            kept = perturbed.topk(k, dim=2, sorted=False).indices  # (B, n, k)
            del perturbed
            marks = torch.zeros_like(noise, dtype=torch.uint8).scatter_(2, kept, 1)
            ranks = marks.cumsum(2, dtype=torch.int32).gather(2, kept)  # 1..k
            flat_indices = kept.add_(ranks.sub_(1), alpha=d).flatten(1)  # (B, n*k)
        # A sum of ones is exact in any order.
        ones = scores.new_ones(()).expand(flat_indices.shape)
        indicators = scores.new_zeros(batch, k * d).scatter_add_(1, flat_indices, ones)
        ctx.save_for_backward(noise, sigma, flat_indices)
        ctx.gradient = gradient
        return indicators.div_(num_samples).view(batch, k, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        noise, sigma, flat_indices = ctx.saved_tensors
        _, num_samples, d = noise.shape
        marked = grad_output.flatten(1).gather(1, flat_indices)  # (B, n*k)
        if ctx.gradient == "exact":
            weights = marked.unflatten(1, (num_samples, -1)).sum(dim=2)  # (B, n) = <g, Y_z>
            weights = weights - weights.mean(dim=1, keepdim=True)
            grad = torch.bmm(weights[:, None], noise).squeeze(1)  # (B, d)
        else:
            # A sample keeps an entry at most once, so the scatter sums nothing (on a GPU the order
            # of threads would change a sum): the gradient is bit-equal in every run.
            columns = flat_indices.remainder(d).unflatten(1, (num_samples, -1))  # (B, n, k)
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
    if is_cpu(scores) and (scores - scores).isnan().any():
        raise ValueError(NOT_FINITE)


def is_cpu(tensor: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return tensor.device.type == "cpu"
