import pytest
import torch
from torch.nn import functional as F

from stts_slowfast.scorers import (
    SCORERS,
    FrameDifferenceScorer,
    LearnedFrameScorer,
    LearnedWindowScorer,
    RandomFrameScorer,
    RandomWindowScorer,
    ScoreNetwork,
    UniformFrameScorer,
    UniformWindowScorer,
    WindowDifferenceScorer,
    minmax_normalize,
)


def test_score_network_to_the_letter():
    network, tokens = ScoreNetwork(8), torch.randn(2, 5, 8)
    x = F.layer_norm(tokens, (8,), network.embed[0].weight, network.embed[0].bias, 1e-5)
    x = F.gelu(x @ network.embed[1].weight.T + network.embed[1].bias)
    x = torch.cat([x[..., :4], x[..., 4:].mean(1, keepdim=True).expand(-1, 5, -1)], 2)
    for i in (0, 2):
        x = F.gelu(x @ network.score[i].weight.T + network.score[i].bias)
    x = x @ network.score[4].weight.T + network.score[4].bias
    torch.testing.assert_close(network(tokens), x[..., 0])


def test_a_width_that_cannot_be_halved_twice_is_named():
    with pytest.raises(ValueError, match="6 must be a multiple of 4"):
        ScoreNetwork(6)


def test_a_frame_is_described_by_mean_and_maximum():
    scorer, grid = LearnedFrameScorer(4), torch.randn(2, 3, 2, 5, 4)
    described = torch.cat([grid.mean(dim=(2, 3)), grid.amax(dim=(2, 3))], dim=2)
    torch.testing.assert_close(scorer(grid, 1), scorer.network(described))


def test_a_window_scores_the_mean_of_its_tokens():
    scorer, grid = LearnedWindowScorer(4), torch.randn(2, 3, 5, 7, 4)
    tokens = scorer.network(grid.flatten(0, 1).flatten(1, 2)).view(6, 5, 7)
    scores = scorer(grid, (3, 4), (2, 3)).view(6, 2, 2)
    torch.testing.assert_close(scores[:, 1, 1], tokens[:, 2:5, 3:7].mean(dim=(1, 2)))


@pytest.mark.parametrize(
    "frames, keep, marked",
    [(8, 2, [2, 6]), (8, 4, [1, 3, 5, 7]), (5, 5, [0, 1, 2, 3, 4]), (8, 1, [4])],
)
def test_uniform_frames_are_evenly_spaced(frames, keep, marked):
    scores = UniformFrameScorer(4)(torch.zeros(2, frames, 1, 1, 4), keep)
    assert scores.shape == (2, frames)
    assert scores[1].nonzero().flatten().tolist() == marked


def test_uniform_window_is_in_the_middle():
    scores = UniformWindowScorer(4)(torch.zeros(1, 1, 5, 9, 4), (3, 3), (1, 1)).view(3, 7)
    assert scores.argmax() == 1 * 7 + 3


def test_random_scores_differ_from_call_to_call_and_follow_the_seed():
    grid = torch.zeros(4, 6, 5, 5, 4)
    for draw in (
        lambda: RandomFrameScorer(4)(grid, 2),
        lambda: RandomWindowScorer(4)(grid, (3, 3), (1, 1)),
    ):
        torch.manual_seed(1)
        first, second = draw(), draw()
        torch.manual_seed(1)
        assert torch.equal(first, draw()) and not torch.equal(first, second)


def test_random_windows_have_one_score_each():
    assert RandomWindowScorer(4)(torch.zeros(2, 3, 5, 7, 4), (3, 4), (2, 3)).shape == (6, 4)


def test_normalized_rows_span_zero_to_one():
    scores = minmax_normalize(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]))
    torch.testing.assert_close(scores[0], torch.tensor([0.0, 1.0, 0.5]), atol=1e-4, rtol=0)
    assert torch.equal(scores[1], torch.zeros(3))


def test_change_marks_frames_that_differ_from_the_one_before():
    grid = torch.zeros(1, 5, 2, 2, 4)
    grid[:, 2] = 1.0  # comes, and goes again
    scores = FrameDifferenceScorer(4)(grid, 2)
    assert scores.tolist() == [[1.0, 0.0, 1.0, 1.0, 0.0]]  # all of the first frame is new
    assert FrameDifferenceScorer(4)(grid[:, :1], 1).tolist() == [[0.0]]


def test_change_marks_windows_in_which_something_moves():
    grid = torch.randn(1, 1, 4, 4, 4).expand(1, 3, 4, 4, 4).clone()
    grid[:, 1, 0, 3] += 2.0
    scores = WindowDifferenceScorer(4)(grid, (2, 2), (2, 2))
    assert scores.shape == (3, 4) and scores.argmax(dim=1).tolist() == [1, 1, 1]
    assert WindowDifferenceScorer(4)(grid[:, :1], (2, 2), (2, 2)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("dimension, shape", [("TIME", (2, 4)), ("SPACE", (8, 4))])
def test_every_registered_scorer_scores(dimension, shape):
    grid = torch.randn(2, 4, 4, 4, 8)
    arguments = (2,) if dimension == "TIME" else ((2, 2), (2, 2))
    names = [name for name, _ in SCORERS]
    assert names == ["learned", "uniform", "random", "change"]
    for name in names:
        scorer = SCORERS.get(name)(dimension, 8)
        assert scorer(grid, *arguments).shape == shape
        assert bool(list(scorer.parameters())) == (name == "learned")


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_one_window_alone_is_the_middle_one(stride):
    """With 13 of 14 tokens no window is in the middle, and four are equally near."""
    for size in range(2, 15):
        for side in range(1, size + 1):
            grid = torch.zeros(1, 1, size, size, 4)
            (scores,) = UniformWindowScorer(4)(grid, (side, side), (stride, stride))
            assert (scores == scores.max()).sum() == 1, (size, side)
            at = int(scores.argmax()) // ((size - side) // stride + 1) * stride
            others = [abs(2 * first - size + side) for first in range(0, size - side + 1, stride)]
            assert abs(2 * at - size + side) == min(others)
