"""Clips are sampled as SlowFast defines it."""

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np

from stts_slowfast.video import (
    clip_frames,
    clip_size,
    clip_span,
    frame_indices,
    frames_between,
    segment_indices,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_clip_size_follows_the_target_rate():
    assert clip_size(16, 4, fps=30) == 64
    assert clip_size(16, 4, fps=15) == 32
    assert clip_size(16, 4, fps=30, target_fps=60) == 32
    assert clip_size(1, 1, fps=1) == 1


def test_uniform_views_start_at_the_first_frame():
    starts = [clip_span(300, 64, clip, 5)[0] for clip in range(5)]
    np.testing.assert_allclose(starts, [0, 47.2, 94.4, 141.6, 188.8])


def test_uniform_views_with_offset_reach_the_last_frame():
    spans = [clip_span(300, 64, clip, 5, use_offset=True) for clip in range(5)]
    assert spans == [(0, 63), (59, 122), (118, 181), (177, 240), (236, 299)]
    assert clip_span(300, 64, 0, 1, use_offset=True) == (118, 181)


def test_random_clips_cover_the_video_and_follow_the_seed():
    rng = random.Random(0)
    spans = [clip_span(100, 20, rng=rng) for _ in range(500)]
    assert all(start >= 0 and end <= 99 for start, end in spans)
    assert min(spans)[0] < 3 and max(spans)[0] > 77
    assert spans[0] == clip_span(100, 20, rng=random.Random(0))


def test_short_video_repeats_its_last_frame():
    start, end = clip_span(10, 64, 2, 5, use_offset=True)
    assert frame_indices(start, end, 8, 10) == [0, 9, 9, 9, 9, 9, 9, 9]


def test_frame_indices_are_even_and_rounded_down():
    assert frame_indices(0, 63, 8, 300) == [0, 9, 18, 27, 36, 45, 54, 63]
    assert frame_indices(4.8, 67.8, 4, 300) == [4, 25, 46, 67]


def test_segments_give_their_middle_frame_in_testing():
    assert segment_indices(41, 8) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert segment_indices(4, 8) == [0, 0, 1, 1, 2, 2, 2, 3]


def test_segments_give_a_random_frame_in_training():
    draws = np.array([segment_indices(41, 8, train=True, rng=random.Random(i)) for i in range(99)])
    assert (draws.min(0) == np.arange(8) * 5).all() and (draws.max(0) == np.arange(8) * 5 + 5).all()


def test_a_start_between_two_frames_is_the_next_one():
    """Clips of a video that is longer than they are begin with a frame that is decoded."""
    assert clip_frames(300, 30.0, 4, 16, clip_idx=1, num_clips=5) == [48, 69, 90, 110]
    assert clip_frames(300, 30.0, 4, 16, clip_idx=0, num_clips=5) == [0, 21, 42, 63]


def test_a_video_no_longer_than_its_clip_is_sampled_from_the_start_itself():
    """Which lies between two frames if the clip covers less of it: 15 frames a second."""
    assert clip_frames(60, 15.0, 4, 16, clip_idx=1, num_clips=5) == [5, 15, 26, 36]


def test_starts_are_counted_in_units_of_the_time_base():
    assert frames_between(4.8, 9.2, 100) == range(5, 10)
    assert frames_between(4.8, 9.2, 100, ticks=512) == range(5, 10)
    assert frames_between(4.001, 9.999, 100, ticks=512) == range(4, 10)
    assert frames_between(4.8, 9.2, 100, ticks=1) == range(4, 10)
    assert frames_between(4.8, 9.2, 8) == range(5, 8)
    assert not frames_between(4.2, 4.8, 100)


def test_clips_are_slowfasts():
    """As its own ``decode`` drew them (tests/slowfast/test_lazy_clip.py wrote the table)."""
    for row in json.loads((FIXTURES / "slowfast_clips.json").read_text()):
        case = dict(row["case"])
        fps, (numerator, denominator) = float(Fraction(*case.pop("fps"))), case.pop("time_base")
        case.update(fps=fps, ticks=denominator / fps / numerator, rng=random.Random(row["seed"]))
        assert clip_frames(**case) == row["frames"], row
