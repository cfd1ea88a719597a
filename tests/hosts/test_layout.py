import pytest
import torch
from torch import nn

from stts_slowfast.hosts import find_blocks, input_channels, select


class EveryOther(nn.Module):
    """Keeps every other frame, so that where each token goes is known."""

    dimension = "TIME"

    def choose(self, grid):
        return slice(None, None, 2)

    def take(self, frames, choice):
        return frames[:, choice]

    def forward(self, grid):
        return self.take(grid, self.choose(grid))


def numbered(count):
    return torch.arange(count, dtype=torch.float32).view(1, count, 1)


@pytest.mark.parametrize("kind", [tuple, list])
def test_plain_tokens(kind):
    x, thw = select(EveryOther(), numbered(24), kind((4, 3, 2)))
    assert thw == kind((2, 3, 2))
    assert x.flatten().tolist() == [*range(6), *range(12, 18)]


def test_one_cls_token_stays_in_front():
    x, _ = select(EveryOther(), numbered(25), (4, 3, 2))
    assert x.flatten().tolist() == [0, *range(1, 7), *range(13, 19)]


def test_a_cls_token_a_frame_goes_with_its_frame():
    x, thw = select(EveryOther(), numbered(28), (4, 3, 2))
    assert thw == (2, 3, 2)
    assert x.flatten().tolist() == [*range(7), *range(14, 21)]


def test_a_grid_stays_a_grid():
    grid = torch.randn(2, 4, 3, 2, 5)
    x, thw = select(EveryOther(), grid)
    assert torch.equal(x, grid[:, ::2]) and thw is None


def test_tokens_that_fit_no_layout_are_named():
    with pytest.raises(ValueError, match=r"\(1, 26, 1\) do not make a grid of 4x3x2"):
        select(EveryOther(), numbered(26), (4, 3, 2))
    with pytest.raises(ValueError, match=r"must be \(B, T, H, W, C\)"):
        select(EveryOther(), numbered(26))


def test_blocks_without_a_norm_are_refused():
    with pytest.raises(ValueError, match="Linear: it has no LayerNorm"):
        input_channels(nn.Linear(3, 3))


def test_an_empty_list_of_blocks_is_refused():
    model = nn.Module()
    model.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="no blocks"):
        find_blocks(model)
