import copy

import pytest
import torch
from torch.nn import functional as F

from stts_slowfast.selectors import Selection, SpatialSelector, TemporalSelector


class FixedScores(torch.nn.Module):
    """Scores decided by the test, so that what must be kept is known."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, *_):
        return self.scores


def test_temporal_selection_keeps_the_best_frames_in_order():
    selector = TemporalSelector(4, 0, 0.5).eval()
    selector.scorer = FixedScores(torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.9, 0.0, 0.1, 0.2]]))
    grid = torch.randn(2, 4, 3, 3, 4)
    kept = selector(grid)
    assert selector.kept.tolist() == [[1, 3], [0, 3]]
    assert torch.equal(kept[0], grid[0, [1, 3]]) and torch.equal(kept[1], grid[1, [0, 3]])


def test_training_mixes_frames_by_their_indicators():
    selector = TemporalSelector(4, 0, 0.5, sigma=0.5).train()
    grid = torch.randn(2, 4, 3, 3, 4)
    choice = selector.select(grid)
    mixed = selector.apply_selection(grid, choice)
    torch.testing.assert_close(mixed, torch.einsum("bkt,bthwc->bkhwc", choice.weights, grid))
    assert not torch.equal(mixed, selector.eval()(grid))


def test_without_noise_training_equals_evaluation():
    grid = torch.randn(2, 4, 6, 6, 4)
    for selector in (TemporalSelector(4, 0, 0.5), SpatialSelector(4, 0, 0.5)):
        selector.sigma = 0.0
        torch.testing.assert_close(selector.train()(grid), selector.eval()(grid))


@pytest.mark.parametrize("height, width", [(5, 5), (4, 7)])
@pytest.mark.parametrize("stride", [0, 2])
def test_spatial_selection_crops_the_best_window(height, width, stride):
    selector = SpatialSelector(4, 0, 0.5, stride=stride).eval()
    grid = torch.randn(2, 3, height, width, 4)
    kept = selector(grid)
    frames = grid.flatten(0, 1)
    for i, (top, left, h, w) in enumerate(selector.kept.tolist()):
        assert top + h <= height and left + w <= width
        expected = frames[i, top : top + h, left : left + w]
        assert torch.equal(kept.flatten(0, 1)[i], expected)


def test_the_kept_window_is_the_one_with_the_highest_mean_score():
    selector = SpatialSelector(4, 0, 0.5).eval()
    grid = torch.randn(2, 3, 6, 6, 4)
    selector(grid)
    tokens = selector.scorer.network(grid.flatten(0, 1).flatten(1, 2)).view(6, 6, 6)
    means = F.avg_pool2d(tokens[:, None], 4, 1)[:, 0]
    for i, (top, left, h, w) in enumerate(selector.kept.tolist()):
        assert (h, w) == (4, 4) and means[i, top, left] == means[i].max()


def test_shared_windows_are_the_same_in_all_frames():
    selector = SpatialSelector(4, 0, 0.5, shared=True)
    grid = torch.randn(2, 3, 6, 6, 4)
    own = selector.scorer(grid, (4, 4), (1, 1)).view(2, 3, 9).mean(dim=1).argmax(dim=1)
    assert selector.eval()(grid).shape == (2, 3, 4, 4, 4)
    kept = selector.kept.view(2, 3, 4)
    assert (kept == kept[:, :1]).all()
    assert (kept[:, 0, 0] * 3 + kept[:, 0, 1]).tolist() == own.tolist()
    indicators = selector.train().select(grid).weights.view(2, 3, 9)
    assert torch.equal(indicators, indicators[:, :1].expand(-1, 3, -1))


@pytest.mark.parametrize("height, width, stride", [(6, 6, 0), (5, 8, 2)])
def test_mixed_windows_equal_the_unfolded_sum(height, width, stride):
    """Against every window cut out by ``unfold``, values and gradients in float64."""
    selector = SpatialSelector(4, 0, 0.5, stride=stride)
    grid = torch.randn(2, 3, height, width, 4, dtype=torch.float64, requires_grad=True)
    (side_h, side_w), (step_h, step_w) = (
        selector.eval()(grid.float()).shape[2:4],
        selector._stride(grid, selector.output_size(grid)),
    )
    windows = grid.unfold(2, side_h, step_h).unfold(3, side_w, step_w)  # (B, T, r, c, C, h, w)
    weights = torch.rand(6, windows.shape[2] * windows.shape[3], dtype=torch.float64)
    weights.requires_grad_()
    expected = torch.einsum("btn,btnchw->bthwc", weights.view(2, 3, -1), windows.flatten(2, 3))
    mixed = selector.apply_selection(grid, Selection(None, weights, None))
    torch.testing.assert_close(mixed, expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(mixed, (grid, weights), upstream)
    theirs = torch.autograd.grad(expected, (grid, weights), upstream)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_keeping_everything_changes_nothing():
    grid = torch.randn(2, 4, 5, 5, 4)
    for kind in (TemporalSelector, SpatialSelector):
        selector = kind(4, 0, 1.0)
        assert torch.equal(selector.eval()(grid), grid)
        assert torch.equal(selector.train()(grid), grid)


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_every_parameter_gets_a_gradient_at_any_sigma(kind):
    selector, grid = kind(4, 0, 0.5), torch.randn(2, 4, 6, 6, 4)
    for sigma in (0.1, 0.0):
        selector.zero_grad()
        selector.sigma = sigma
        selector(grid).square().sum().backward()
        grads = [p.grad for p in selector.parameters()]
        assert all(grad is not None for grad in grads)
        assert any(grad.abs().sum() > 0 for grad in grads) == (sigma > 0)


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_scores_are_float32_under_autocast(kind):
    """bfloat16 has eight bits: scores in it would tie, and autocast would change what is kept."""
    selector, grid = kind(16, 0, 0.5).eval(), torch.randn(4, 8, 6, 6, 16)
    selector(grid)
    kept = selector.kept
    with torch.autocast("cpu", torch.bfloat16):
        out = selector(grid)
    assert torch.equal(selector.kept, kept) and out.dtype == torch.float32


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_low_precision_grids_keep_their_dtype(kind):
    selector, grid = kind(16, 0, 0.5), torch.randn(2, 4, 6, 6, 16, dtype=torch.bfloat16)
    for mode in (True, False):
        assert selector.train(mode)(grid).dtype == torch.bfloat16
    assert selector.to(torch.bfloat16)(grid).dtype == torch.bfloat16


def test_a_share_that_leaves_nothing_is_named_when_it_happens():
    with pytest.raises(ValueError, match=r"STTS.TIME.KEEP 0.1 leaves no frame of the 4 frames"):
        TemporalSelector(4, 0, 0.1)(torch.randn(1, 4, 2, 2, 4))
    with pytest.raises(ValueError, match=r"STTS.SPACE.KEEP 0.1 leaves no window of the 2x2"):
        SpatialSelector(4, 3, 0.1)(torch.randn(1, 4, 2, 2, 4))


def nan_grid(kind):
    selector = kind(4, 3, 0.5, num_samples=5)
    grid = torch.randn(1, 4, 4, 4, 4)
    grid[0, 1] = torch.nan
    return selector, grid


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_nan_scores_are_an_error_at_once_on_a_cpu(kind, mode):
    selector, grid = nan_grid(kind)
    with pytest.raises(ValueError, match=f"STTS {selector.key}: scores hold NaN"):
        selector.train(mode)(grid)


@pytest.fixture
def device(monkeypatch):
    """Makes this machine's memory pass for a device's, which is not looked at."""
    for module in ("selector_state", "topk"):
        monkeypatch.setattr(f"stts_slowfast.{module}.is_cpu", lambda tensor: False)


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_nan_scores_on_a_device_raise_when_the_host_asks(device, kind):
    selector, grid = nan_grid(kind)
    selector(torch.randn_like(grid))
    selector.raise_on_nan()
    selector(grid)
    with pytest.raises(ValueError, match=f"STTS {selector.key}: scores hold NaN"):
        selector.raise_on_nan()
    selector.raise_on_nan()  # raised once


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_nan_scores_on_a_device_raise_in_the_next_pass_without_asking(device, kind):
    selector, grid = nan_grid(kind)
    selector(grid)
    with pytest.raises(ValueError, match=f"STTS {selector.key}: scores hold NaN"):
        selector(torch.randn_like(grid))
    selector(torch.randn_like(grid))
    copy.deepcopy(selector)(torch.randn_like(grid))


def test_nan_scores_are_kept_until_they_are_raised(device):
    selector, grid = nan_grid(TemporalSelector)
    selector(grid)
    selector._nan_flag_host.fill_(False)  # as if it had not arrived yet
    selector(torch.randn_like(grid))
    with pytest.raises(ValueError, match="NaN"):
        selector.raise_on_nan()


def test_compiled_selectors_note_nan_scores():
    selector, grid = nan_grid(TemporalSelector)
    torch.compile(selector, fullgraph=True, backend="eager")(grid)
    with pytest.raises(ValueError, match="STTS time_3"):
        selector.raise_on_nan()


@pytest.mark.parametrize("kind", [TemporalSelector, SpatialSelector])
def test_the_default_operator_samples_nothing_and_trains_by_its_gradient(kind):
    selector = kind(4, 0, 0.5)
    grid = torch.randn(2, 4, 6, 6, 4)
    assert torch.equal(selector(grid), selector(grid))  # nothing is drawn
    selector(grid).square().sum().backward()
    assert selector.scorer.network.score[4].weight.grad.abs().sum() > 0
