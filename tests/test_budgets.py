import pytest

from stts_slowfast.budgets import (
    interpolate_sizes,
    keep_range,
    kept_frames,
    kept_window,
    plan_grids,
    window_stride,
)


@pytest.mark.parametrize("keep, frames", [(0.875, 7), (0.75, 6), (0.625, 5), (0.5, 4), (0.375, 3)])
def test_frames_of_the_published_points(keep, frames):
    assert kept_frames(8, keep) == frames


@pytest.mark.parametrize("keep, side", [(0.863, 13), (0.7367, 12), (0.6174, 11), (1.0, 14)])
def test_windows_of_the_published_points(keep, side):
    assert kept_window(14, 14, keep) == (side, side)


def test_rounding_errors_lose_no_frame():
    assert 0.29 * 100 < 29 and kept_frames(100, 0.29) == 29


def test_a_window_keeps_the_shape_of_its_grid():
    assert kept_window(8, 16, 0.25) == (4, 8)


@pytest.mark.parametrize(
    "low, high", [((2,), (7,)), ((3, 3), (6, 6)), ((2, 4), (4, 8)), ((4,), (4,))]
)
def test_every_size_of_a_range_is_as_likely_both_ends_among_them(low, high):
    drawn = [interpolate_sizes(low, high, (number + 0.5) / 840) for number in range(840)]
    sizes = sorted(set(drawn))
    assert (
        (sizes[0], sizes[-1])
        == (low, high)
        == (interpolate_sizes(low, high, 0), interpolate_sizes(low, high, 1))
    )
    assert len(sizes) == max(b - a for a, b in zip(low, high)) + 1
    assert {drawn.count(size) for size in sizes} == {840 // len(sizes)}


def test_a_single_share_is_a_range_of_one():
    assert keep_range(0.5) == (0.5, 0.5) and keep_range([0.25, 0.9]) == (0.25, 0.9)


def test_neighbouring_windows_have_the_default_stride_unless_one_is_given():
    assert [window_stride(14, side, 0) for side in (6, 13, 14)] == [4, 1, 1]
    assert window_stride(14, 6, 3) == 3


def test_grids_shrink_by_each_selection_and_by_pooling_after_it():
    grids = [(8, 28, 28), (8, 14, 14), (8, 14, 14)]
    assert plan_grids({0: (0.5, 1.0)}, {0: 0.5, 2: 0.25}, grids, end=0) == {
        "time_0": ((8, 28, 28), (4, 28, 28)),
        "space_0": ((4, 28, 28), (4, 19, 19)),
        "space_2": ((4, 10, 10), (4, 5, 5)),
    }


@pytest.mark.parametrize(
    "time, space, message",
    [
        ({1: 0.1}, {}, r"STTS.TIME.KEEP 0.1 leaves no frame of the 8 frames .* block 1: .*0.126"),
        ({}, {0: 0.001}, r"STTS.SPACE.KEEP 0.001 leaves no window of the 4x4 tokens .*0.063"),
    ],
)
def test_a_share_that_keeps_nothing_is_refused_with_the_least_that_would(time, space, message):
    with pytest.raises(ValueError, match=message):
        plan_grids(time, space, [(8, 4, 4)] * 2, end=1)
