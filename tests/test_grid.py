"""Where tokens come from, in tokens of the grid that would arrive without selection."""

import copy
import pickle

import pytest
import torch

from stts_slowfast.grid import Grid


def rows(*windows):
    return torch.tensor(windows)


def test_a_grid_is_a_tuple_of_whole_numbers():
    grid = Grid([torch.tensor(4), 3, 2])
    t, h, w = grid
    assert grid == (4, 3, 2) and (t, h, w) == (4, 3, 2) and all(type(n) is int for n in grid)
    assert grid.frames is None and grid.windows is None


def test_frames_of_frames_are_frames_of_the_clip():
    grid = Grid((8, 4, 4)).keep_frames(torch.tensor([[1, 3, 6, 7], [0, 2, 4, 5]]))
    assert grid == (4, 4, 4)
    twice = grid.keep_frames(torch.tensor([[0, 2], [1, 3]]))
    assert twice == (2, 4, 4) and twice.frames.tolist() == [[1, 6], [2, 5]]
    assert grid.frames.tolist() == [[1, 3, 6, 7], [0, 2, 4, 5]]


def test_windows_in_windows_are_windows_of_the_frame():
    grid = Grid((2, 8, 8)).crop(rows([1, 2, 5, 5], [3, 0, 5, 5]), (5, 5))
    twice = grid.crop(rows([1, 0, 3, 3], [0, 2, 3, 3]), (3, 3))
    assert twice == (2, 3, 3)
    assert twice.windows.tolist() == [[[2, 2, 3, 3], [3, 2, 3, 3]]]


def test_windows_follow_their_frames():
    grid = Grid((3, 8, 8)).crop(rows([0, 0, 5, 5], [1, 1, 5, 5], [2, 2, 5, 5]), (5, 5))
    grid = grid.keep_frames(torch.tensor([[0, 2]]))
    assert grid == (2, 5, 5) and grid.windows.tolist() == [[[0, 0, 5, 5], [2, 2, 5, 5]]]


def test_pooling_scales_windows_and_frames():
    grid = Grid((4, 6, 6), torch.tensor([[0, 3, 6, 9]]))
    grid = grid.crop(rows(*[[2, 4, 6, 6]] * 4), (6, 6))
    space = grid.pooled([4, 3, 3])
    assert space == (4, 3, 3) and space.frames is grid.frames
    assert space.windows.tolist() == [[[1, 2, 3, 3]] * 4]
    time = grid.pooled((2, 6, 6))
    assert time.frames.tolist() == [[0, 3]] and time.windows.tolist() == [[[2, 4, 6, 6]] * 2]
    assert grid.pooled((4, 6, 6)) is grid


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_keep_their_positions(duplicate):
    grid = duplicate(Grid((2, 4, 4), torch.tensor([[1, 3]]), torch.zeros(1, 2, 4)))
    assert type(grid) is Grid and grid == (2, 4, 4)
    assert grid.frames.tolist() == [[1, 3]] and grid.windows.shape == (1, 2, 4)


def test_positions_of_frames_windows_and_sets_compose():
    everything = torch.arange(2 * 4 * 3 * 3).view(1, -1).remainder(72)[:, :36].expand(2, -1)
    grid = Grid((4, 3, 3))
    assert torch.equal(grid.positions(2), everything) and grid.is_whole and not grid.is_selected
    grid = grid.keep_frames(torch.tensor([[1, 3], [0, 1]]))
    grid = grid.crop(rows([0, 1, 2, 2], [1, 1, 2, 2], [0, 0, 2, 2], [1, 0, 2, 2]), (2, 2))
    assert grid.whole == (4, 3, 3) and grid.is_selected and not grid.is_whole
    expected = [[10, 11, 13, 14, 31, 32, 34, 35], [0, 1, 3, 4, 12, 13, 15, 16]]
    assert grid.positions(2).tolist() == expected
    few = grid.keep_tokens(torch.tensor([[0, 3, 7], [1, 2, 4]]))
    assert few == (1, 1, 3) and few.positions(2).tolist() == [[10, 14, 35], [1, 3, 12]]
    again = few.keep_tokens(torch.tensor([[2], [0]]))
    assert again.tokens.tolist() == [[35], [1]] and again.whole == (4, 3, 3)
    each = grid.keep_tokens(torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]), frames=2)
    assert each == (2, 1, 2) and each.positions(2).tolist()[1] == [3, 4, 15, 16]
    with pytest.raises(ValueError, match="select frames and windows before single tokens"):
        few.keep_frames(torch.tensor([[0], [0]]))
    with pytest.raises(ValueError, match="select frames and windows before single tokens"):
        few.crop(rows([0, 0, 1, 1], [0, 0, 1, 1]), (1, 1))
    copy_of_it = pickle.loads(pickle.dumps(few))
    assert torch.equal(copy_of_it.tokens, few.tokens) and copy_of_it.whole == few.whole


def test_all_of_a_grid_may_be_selected():
    grid = Grid((2, 2, 2)).keep_frames(torch.tensor([[0, 1]]))
    assert grid.is_selected and grid.is_whole
    assert Grid((2, 2, 2), torch.tensor([[0, 3]])).is_whole is False  # the whole size is unknown
    pooled = Grid((8, 8, 8)).keep_frames(torch.arange(6)[None]).pooled((3, 4, 4))
    assert pooled.whole == (4, 4, 4) and not pooled.is_whole


def test_a_side_of_one_token_is_pooled_as_the_other():
    crop = torch.tensor([[6, 4, 1, 4]])
    pooled = Grid((1, 8, 8)).crop(crop, (1, 4)).pooled((1, 1, 2))
    assert pooled.whole == (1, 4, 4) and pooled.windows.tolist() == [[[3, 2, 1, 2]]]
    assert pooled.positions(1).tolist() == [[14, 15]]


def test_rows_of_frames_are_computed_once_for_all_blocks():
    frames = torch.tensor([[0, 3, 7], [1, 2, 4]])
    grid = Grid((8, 4, 4)).keep_frames(frames)
    rows_of = grid.frame_rows(9)  # a table that reaches four frames
    assert rows_of.tolist()[0] == [[4, 1, 0], [7, 4, 0], [8, 8, 4]]
    pooled = grid.pooled((3, 2, 2))
    cropped = pooled.crop(rows(*[[0, 0, 1, 1]] * 6), (1, 1))
    assert all(other.frame_rows(9) is rows_of for other in (grid, pooled, cropped))
    assert torch.equal(cropped.frame_rows(15), frames[:, :, None] - frames[:, None] + 7)
    fewer = cropped.keep_frames(torch.tensor([[0, 2], [1, 2]]))
    assert fewer.frame_rows(9).tolist() == [[[4, 0], [8, 4]], [[4, 2], [6, 4]]]
    assert "_frame_rows" not in repr(pickle.dumps(grid))
