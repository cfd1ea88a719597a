"""Frames that are kept are those that decoding gives, of the file as it is, up to a size."""

import numpy as np
import pytest

from stts_slowfast.tools.demo.make_data import write_frames
from stts_slowfast.video import Video, VideoError, cache_frames, frame_cache, open_video


@pytest.fixture
def opened(monkeypatch):
    """The names of the files that are opened."""
    names = []

    class Counting(Video):
        def __init__(self, path, *more, **keys):
            names.append(path)
            super().__init__(path, *more, **keys)

    monkeypatch.setattr(frame_cache, "Video", Counting)
    return names


def write(path, seed=0):
    frames = np.random.default_rng(seed).integers(0, 255, (12, 32, 48, 3), np.uint8)
    write_frames(str(path), frames, 8)
    return str(path)


def read(path, wanted, short_side=0, **keys):
    with open_video(path, **keys) as video:
        return [image.copy() for image in video.iter_frames(wanted, short_side)]


def test_a_frame_is_decoded_once_for_each_size(tmp_path, opened):
    path = write(tmp_path / "a.mp4")
    requests = [([0, 4, 7], 0), ([4, 9], 0), ([0, 4, 7, 9], 0), ([4], 16), ([4], 16)]
    expected = [read(path, *request) for request in requests]
    del opened[:]
    with cache_frames(2**20):
        found = [read(path, *request) for request in requests]
        assert len(opened) == 4  # what it is, and each request that asks for a new frame
        with open_video(path) as video:
            assert (video.num_frames, video.fps, video.damage) == (12, 8.0, "")
        assert len(opened) == 4
    for images, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(images, others)
    read(path, [4])
    assert len(opened) == 5  # off again


def test_a_file_that_changed_is_read_anew(tmp_path, opened):
    path = write(tmp_path / "a.mp4")
    with cache_frames(2**20):
        before = read(path, [3])
        write(path, seed=1)
        after = read(path, [3])
    np.testing.assert_array_equal(after, read(path, [3]))
    assert np.abs(after[0].astype(int) - before[0]).mean() > 10


def test_no_more_is_kept_than_was_said(tmp_path, opened):
    paths = [write(tmp_path / f"{number}.mp4", number) for number in range(4)]
    with cache_frames(3 * (12 * 32 * 48 * 3 + 500)):
        for path in paths:
            read(path, list(range(12)))
        del opened[:]
        for path in paths[::-1]:
            read(path, list(range(12)))
        assert set(opened) == {paths[0]}
    assert not frame_cache._cache.items


def test_damage_is_reported_again_and_unreadable_files_are_tried_again(tmp_path, opened):
    path = write(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    start = whole.index(b"mdat") + 900
    (tmp_path / "a.mp4").write_bytes(whole[:start] + b"\xff" * 3000 + whole[start + 3000 :])
    with open_video(path) as video:
        list(video.iter_frames(list(range(12))))
        assert video.damage
    (tmp_path / "b.mp4").write_bytes(b"")
    with cache_frames(2**20):
        for _ in range(2):
            with open_video(path) as kept:
                list(kept.iter_frames(list(range(12))))
                assert kept.damage == video.damage
            with pytest.raises(VideoError, match="empty"):
                open_video(str(tmp_path / "b.mp4"))
    assert opened.count(str(tmp_path / "b.mp4")) == 2
