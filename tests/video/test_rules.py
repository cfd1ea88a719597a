"""Clips are sampled as SlowFast defines it."""

import random

import numpy as np

from stts_slowfast.video import clip_size, clip_span, frame_indices, segment_indices


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
