from itertools import combinations

import pytest
import torch

from stts_slowfast.topk import OPERATORS, SMALLEST_SIGMA, hard_topk, perturbed_topk, subset


def one_hot_topk(scores, k, noise, sigma):
    """The operator as a formula: one-hot indicators of every sample, then their mean."""
    perturbed = scores[:, None] + sigma * noise
    indices = perturbed.topk(k, dim=2).indices.sort(dim=2).values
    return torch.nn.functional.one_hot(indices, scores.shape[1]).to(scores).mean(dim=1)


@pytest.mark.parametrize("case", ["topk_case_a", "topk_case_b"])
@pytest.mark.parametrize(
    "gradient, expected", [("exact", "grad_exact_baseline"), ("diagonal", "grad_diagonal")]
)
def test_golden_indicators_and_gradients(golden, case, gradient, expected):
    case = golden(case)
    scores = case["scores"].requires_grad_()
    indicators = perturbed_topk(
        scores, int(case["k"]), sigma=case["sigma"], gradient=gradient, noise=case["noise"]
    )
    torch.testing.assert_close(indicators, case["indicators"], atol=1e-6, rtol=0)
    indicators.backward(case["grad_output"])
    torch.testing.assert_close(scores.grad, case[expected].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["topk_case_a", "topk_case_b"])
def test_baseline_only_takes_the_mean_off(golden, case):
    """Without baseline the golden estimate differs by mean(weight) * mean(noise) / sigma."""
    case = golden(case)
    scores = case["scores"].requires_grad_()
    k, noise, grad_output = int(case["k"]), case["noise"], case["grad_output"]
    perturbed_topk(scores, k, sigma=case["sigma"], noise=noise).backward(grad_output)
    perturbed = scores[:, None] + case["sigma"].float() * noise
    indices = perturbed.topk(k, dim=2).indices.sort(dim=2).values
    weights = torch.stack(
        [grad_output[:, i].gather(1, indices[:, :, i]) for i in range(k)], dim=2
    ).sum(dim=2)
    shift = weights.mean(dim=1, keepdim=True) * noise.mean(dim=1) / case["sigma"]
    torch.testing.assert_close(
        scores.grad + shift, case["grad_exact"], atol=1e-5, rtol=1e-5, check_dtype=False
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_matches_the_one_hot_formula(k):
    scores, noise = torch.rand(4, 8), torch.randn(4, 60, 8)
    indicators = perturbed_topk(scores, k, sigma=0.2, noise=noise)
    torch.testing.assert_close(indicators, one_hot_topk(scores, k, noise, 0.2))
    torch.testing.assert_close(indicators.sum(dim=2), torch.ones(4, k))


def test_gradient_matches_finite_differences():
    """Common noise makes the smoothed operator's config_diff cheap to estimate."""
    scores, k, sigma = torch.tensor([[0.1, 0.5, 0.45, 0.9]]), 2, 0.2
    noise = torch.randn(1, 400_000, 4)
    grad_output = torch.randn(1, k, 4)
    step = 0.02
    differences = []
    for j in range(4):
        shift = torch.zeros(1, 4)
        shift[0, j] = step
        up = perturbed_topk(scores + shift, k, sigma=sigma, noise=noise)
        down = perturbed_topk(scores - shift, k, sigma=sigma, noise=noise)
        differences.append(((up - down) * grad_output).sum() / (2 * step))
    scores.requires_grad_()
    perturbed_topk(scores, k, sigma=sigma, noise=noise).backward(grad_output)
    expected = torch.stack(differences)
    assert (scores.grad[0] - expected).norm() < 0.03 * expected.norm()


def test_diagonal_gradient_is_another_one():
    scores, noise = torch.rand(2, 6), torch.randn(2, 5000, 6)
    grads = {}
    for gradient in ("exact", "diagonal"):
        leaf = scores.clone().requires_grad_()
        out = perturbed_topk(leaf, 2, sigma=0.1, gradient=gradient, noise=noise)
        out.backward(torch.ones_like(out).cumsum(2))
        grads[gradient] = leaf.grad
    cosine = torch.cosine_similarity(grads["exact"].flatten(), grads["diagonal"].flatten(), dim=0)
    assert cosine < 0.9


@pytest.mark.parametrize("sigma", [0.0, SMALLEST_SIGMA, torch.tensor(0.0)])
@pytest.mark.parametrize("gradient", ["exact", "diagonal"])
def test_without_noise_selection_is_hard_and_gradient_zero(sigma, gradient):
    scores = torch.rand(3, 7, requires_grad=True)
    indicators = perturbed_topk(scores, 2, 20, sigma, gradient)
    expected = torch.nn.functional.one_hot(hard_topk(scores.detach(), 2), 7).float()
    assert torch.equal(indicators, expected)
    indicators.backward(torch.randn_like(indicators))
    assert torch.equal(scores.grad, torch.zeros(3, 7))


def test_keeping_all_is_the_identity():
    indicators = perturbed_topk(torch.rand(2, 5), 5, 500, 0.5)
    assert torch.equal(indicators, torch.eye(5).expand(2, 5, 5))


def test_kept_entries_stay_in_order():
    indices = hard_topk(torch.tensor([[0.9, 0.1, 0.8, 0.7], [0.0, 3.0, 1.0, 2.0]]), 2)
    assert indices.tolist() == [[0, 2], [1, 3]]


def test_no_tensor_of_samples_by_k_by_d_exists():
    """Peak memory of forward and backward, counted by the allocator's own events."""
    batch, d, k, num_samples = 2, 64, 32, 200
    one_hot_bytes = batch * num_samples * k * d * 4
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    scores = torch.rand(batch, d, requires_grad=True)
    with Largest():
        out = perturbed_topk(scores, k, num_samples, 0.1)
        out.backward(torch.randn_like(out))
    assert 0 < largest <= one_hot_bytes / 16


def test_float32_inside_autocast():
    scores = torch.rand(2, 6)
    noise = torch.randn(2, 50, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = perturbed_topk(scores.bfloat16(), 2, sigma=0.1, noise=noise)
    assert inside.dtype == torch.float32
    outside = perturbed_topk(scores.bfloat16().float(), 2, sigma=0.1, noise=noise)
    assert torch.equal(inside, outside)


def test_compiles_without_graph_breaks():
    scores, noise = torch.rand(2, 6), torch.randn(2, 50, 6)

    def run(scores, sigma):
        return perturbed_topk(scores, 2, sigma=sigma, noise=noise)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for sigma in (torch.tensor(0.1), torch.tensor(0.05)):
        ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        run(ours, sigma).square().sum().backward()
        compiled(theirs, sigma).square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_equals_cpu():
    scores, noise = torch.rand(3, 9), torch.randn(3, 100, 9)
    outputs = []
    for device in ("cpu", "cuda"):
        leaf = scores.to(device).requires_grad_()
        out = perturbed_topk(leaf, 3, sigma=0.1, noise=noise.to(device))
        out.square().sum().backward()
        outputs.append((out.cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.rand(6), 2), r"\(B, d\)"),
        ((torch.rand(2, 6), 0), "k is 0"),
        ((torch.rand(2, 6), 7), "k is 7"),
        ((torch.full((2, 6), torch.nan), 2), "NaN or infinity"),
        ((torch.full((2, 6), torch.inf), 2), "NaN or infinity"),
        ((torch.full((2, 6), -torch.inf), 2), "NaN or infinity"),
        ((torch.rand(2, 6), 2, 0), "num_samples is 0"),
        ((torch.rand(2, 6), 2, 5, 0.1, "straight"), "'straight'.*exact, diagonal"),
        ((torch.rand(2, 6), 2, 5, 0.1, "exact", torch.randn(2, 5, 4)), "noise has shape"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        perturbed_topk(*arguments)


def brute_force(scores, k, sigma):
    """The distribution over subsets, written out subset by subset."""
    subsets = torch.tensor(list(combinations(range(scores.shape[1]), k)))  # (n, k), ascending
    logits = (scores.double() / sigma)[:, subsets].sum(dim=2)
    marks = torch.nn.functional.one_hot(subsets, scores.shape[1]).double()
    return torch.einsum("bn,nkd->bkd", logits.softmax(dim=1), marks)


@pytest.mark.parametrize("d, k", [(8, 4), (7, 1), (6, 6), (10, 2), (9, 8)])
@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.02])
def test_subset_equals_brute_force(d, k, sigma):
    scores = torch.rand(3, d)
    grad_output = torch.randn(3, k, d)
    ours, theirs = scores.clone().requires_grad_(), scores.double().requires_grad_()
    out = subset(ours, k, sigma)
    expected = brute_force(theirs, k, sigma)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-7, rtol=0)
    out.backward(grad_output)
    expected.backward(grad_output.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-6, rtol=1e-5)


def log_symmetric(logits, k):
    """Logarithms (B, d, k) of e_0 .. e_{k-1} of all entries before each, one entry at a time."""
    nothing = logits.new_full((len(logits), 1), -1e30)
    row = torch.cat([torch.zeros_like(nothing), nothing.expand(-1, k - 1)], dim=1)
    rows = [row]
    for logit in logits[:, :-1].split(1, dim=1):
        row = torch.logaddexp(row, torch.cat([nothing, row[:, :-1] + logit], dim=1))
        rows.append(row)
    return torch.stack(rows, dim=1)


def recurrence(scores, k, sigma):
    """The same distribution by the recurrence of symmetric polynomials, in logarithms."""
    logits = scores / sigma
    logits = logits - logits.amax(dim=1, keepdim=True).detach()
    after = log_symmetric(logits.flip(1), k).flip(1, 2)
    joint = log_symmetric(logits, k) + after + logits[:, :, None]
    return (joint - joint[:, :, :1].logsumexp(dim=1, keepdim=True)).exp().transpose(1, 2)


@pytest.mark.parametrize("d, k", [(96, 48), (96, 2), (65, 60)])
@pytest.mark.parametrize("sigma", [1.0, 0.2, 0.001])
@pytest.mark.parametrize("kind", ["spread", "tied", "equal", "far apart"])
def test_subset_equals_the_recurrence(d, k, sigma, kind):
    """Long clips, of scores for which the two differ most in what they could overflow."""
    scores = torch.rand(2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = {
        "spread": scores,
        "tied": (scores * 3).round() / 3,
        "equal": torch.zeros_like(scores),
        "far apart": (scores > 0.5).double(),
    }[kind]
    grad_output = torch.randn(2, k, d, generator=torch.Generator().manual_seed(1))
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    out, expected = subset(ours, k, sigma), recurrence(theirs, k, sigma)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    out.backward(grad_output)
    expected.backward(grad_output.double())
    scale = float(theirs.grad.abs().max()) + 1e-6 / sigma
    torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, atol=1e-6, rtol=0)


class CountLaunches(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that start a kernel on a device: views and checks on a CPU do not."""

    NO_KERNEL = {
        *("view", "_unsafe_view", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t"),
        *("slice", "select", "detach", "unbind", "alias", "view_as_real", "view_as_complex"),
        *("scalar_tensor", "isnan", "isfinite", "any", "all", "_local_scalar_dense"),
    }

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name.split("::")[1] not in self.NO_KERNEL
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("d, k", [(8, 4), (96, 48), (33, 32)])
def test_subset_takes_60_launches_whatever_the_clip(monkeypatch, d, k):
    monkeypatch.setattr("stts_slowfast.topk.is_cpu", lambda tensor: False)  # no check of a CPU's
    scores, sigma = torch.rand(2, d, requires_grad=True), torch.tensor(0.2)
    subset(scores, k, sigma)
    with CountLaunches() as launches:
        subset(scores, k, sigma).sum().backward()
    assert launches.count <= 60 + 2  # the sum's own


def test_subset_is_a_softmax_for_one():
    scores = torch.rand(2, 9)
    expected = (scores / 0.1).softmax(dim=1)[:, None]
    torch.testing.assert_close(subset(scores, 1, torch.tensor(0.1)), expected)


@pytest.mark.parametrize("d, k", [(196, 98), (64, 1), (32, 31)])
@pytest.mark.parametrize("sigma", [0.1, 2 * SMALLEST_SIGMA])
def test_subset_stays_finite_and_adds_up(d, k, sigma):
    scores = torch.rand(2, d, requires_grad=True)
    out = subset(scores, k, sigma)
    torch.testing.assert_close(out.sum(dim=2), torch.ones(2, k))
    out.square().sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("sigma", [0.0, SMALLEST_SIGMA, torch.tensor(0.0)])
@pytest.mark.parametrize("k", [1, 2])
def test_subset_without_temperature_is_hard_and_its_gradient_zero(sigma, k):
    scores = torch.rand(3, 7, requires_grad=True)
    out = subset(scores, k, sigma)
    expected = torch.nn.functional.one_hot(hard_topk(scores.detach(), k), 7).float()
    assert torch.equal(out, expected)
    out.backward(torch.randn_like(out))
    assert torch.equal(scores.grad, torch.zeros(3, 7))


@pytest.mark.parametrize("name", ["perturbed", "subset"])
@pytest.mark.parametrize("k", [1, 2])
def test_operators_are_soft_wherever_noise_matters(name, k):
    """Scores nearer than sigma are both kept in part, down to the smallest sigma."""
    sigma = 2 * SMALLEST_SIGMA
    assert sigma < 1e-3
    scores = torch.tensor([[0.5, 0.5 + sigma / 4, 0.5 - sigma / 4]], requires_grad=True)
    out = OPERATORS.get(name)(scores, k, sigma, num_samples=500, gradient="exact")
    assert 0.1 < out[0, 0, 0] < 0.9
    out[0, 0, 0].backward()
    assert scores.grad.abs().sum() > 1


def test_subset_compiles_and_is_named_when_bad():
    scores = torch.rand(2, 6)
    compiled = torch.compile(subset, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, 2, torch.tensor(0.1)), subset(scores, 2, 0.1))
    with pytest.raises(ValueError, match="NaN"):
        subset(torch.full((2, 6), torch.nan), 2, 0.1)
    with pytest.raises(ValueError, match="k is 7"):
        subset(scores, 7, 0.1)


# What adds in an order that a GPU's threads decide.
ACCUMULATING = ("scatter_add", "scatter_reduce", "index_add", "index_put", "put_", "bincount")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("gradient", ["exact", "diagonal"])
def test_the_same_bits_in_any_order_of_threads(gradient, k):
    """Without an order only ones are added up, which is exact: a GPU repeats a run."""
    added = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(name in str(func) for name in ACCUMULATING):
                added.append(args[3])
            return func(*args, **(kwargs or {}))

    scores = torch.rand(2, 9, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        with Watch():
            out = perturbed_topk(scores, k, 500, 0.1, gradient)
            out.backward(torch.randn_like(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(added) == 1 and added[0].eq(1).all()
    assert scores.grad.abs().sum() > 0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["hard", "perturbed", "subset"])
def test_of_equal_scores_the_lower_index_is_kept(name, k):
    scores = torch.zeros(2, 40)
    scores[1, 7:] = 1.0
    if name == "hard":
        kept = hard_topk(scores, k)
    else:  # without noise they are hard
        kept = OPERATORS.get(name)(scores, k, 0.0, 20, "exact").argmax(dim=2)
    assert kept.tolist() == [list(range(k)), list(range(7, 7 + k))]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("gradient", ["exact", "diagonal"])
@pytest.mark.parametrize("name", ["perturbed", "subset"])
def test_a_batch_of_nothing_passes(name, gradient, k):
    scores = torch.rand(0, 6, requires_grad=True)
    assert hard_topk(scores, k).shape == (0, k)
    out = OPERATORS.get(name)(scores, k, 0.1, 20, gradient)
    assert out.shape == (0, k, 6)
    out.sum().backward()
    assert scores.grad.shape == (0, 6)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_unchecked_infinite_scores_give_no_nan(monkeypatch, value, k):
    """On a device looking would wait; the selector notes them there."""
    monkeypatch.setattr("stts_slowfast.topk.is_cpu", lambda tensor: False)
    scores = torch.rand(2, 6)
    scores[0, 2] = value
    for name in ("perturbed", "subset"):
        leaf = scores.clone().requires_grad_()
        out = OPERATORS.get(name)(leaf, k, 0.1, 20, "exact")
        out.square().sum().backward()
        assert out.isfinite().all() and leaf.grad.isfinite().all()
        torch.testing.assert_close(out.sum(dim=2), torch.ones(2, k))


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_an_exported_graph_breaks_ties_alike_and_has_no_stable_sort(size):
    class Best(torch.nn.Module):
        def forward(self, scores):
            return hard_topk(scores, (size + 1) // 2)

    scores = torch.randint(0, 4, (50, size), generator=torch.Generator().manual_seed(0)).float()
    program = torch.export.export(Best(), (scores,))
    assert torch.equal(program.module()(scores), Best()(scores))
    assert "sort.stable" not in program.graph_module.code  # which ONNX does not have
