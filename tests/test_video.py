"""Frames by index equal those of a full decoding; clips are sampled as SlowFast defines it."""

import io
import pickle
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from stts_slowfast.video import (
    Video,
    VideoError,
    clip_size,
    clip_span,
    decode_clip,
    frame_indices,
    probe,
    segment_indices,
)

SIZE = (32, 48)


def write_video(
    path, num_frames=60, codec="libx264", pts=None, time_base=None, mux=None, **options
):
    """Frames of noise on a grey that changes, so that no two are alike."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        for number in range(num_frames):
            image = rng.integers(0, 30, (*SIZE, 3), dtype=np.uint8) + np.uint8(number * 3 % 200)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = int(pts[number]), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def decode_all(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def x264(params):
    return {"x264-params": params}


FILES = {
    "default.mp4": {},
    "intra_only.mp4": {"g": "1"},
    "short_gops_with_b_frames.mp4": x264("keyint=2:bframes=1:scenecut=0"),
    "gop_12_with_b_frames.mp4": {"g": "12", "bf": "3"},
    "open_gops.mp4": x264("keyint=10:open-gop=1:bframes=3:b-pyramid=normal:scenecut=0"),
    "no_frame_count.mkv": {"g": "12", "bf": "3"},
    "fragmented.mp4": {"g": "12", "mux": {"movflags": "frag_keyframe+empty_moov"}},
    "starts_after_zero.ts": {"g": "12", "bf": "3"},
    "no_time_stamps.h264": {"g": "12", "bf": "3"},
    "old.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "new.webm": {"codec": "libvpx-vp9", "g": "20", "lag-in-frames": "16", "cpu-used": "8"},
    "variable_rate.mkv": {
        "pts": np.cumsum(np.random.default_rng(1).integers(10, 90, 60)),
        "time_base": Fraction(1, 1000),
        "g": "12",
        "bf": "2",
    },
    "late_start.mp4": {
        "pts": 70000 + 40 * np.arange(60),
        "time_base": Fraction(1, 1000),
        "g": "12",
        "bf": "2",
    },
}


@pytest.mark.parametrize("name", FILES)
def test_frames_by_index_equal_a_full_decoding(tmp_path, name):
    path = write_video(tmp_path / name, **FILES[name])
    expected = decode_all(path)
    with Video(path) as video:
        assert video.num_frames == len(expected) == 60
        for start in (0, 7, 11, 12, 13, 23, 30, 48, 55):
            indices = [start, start + 1, start + 4]
            frames = video.decode(indices)
            assert frames.dtype == torch.uint8 and frames.shape == (3, *SIZE, 3)
            np.testing.assert_array_equal(frames, np.stack([expected[i] for i in indices]))


def test_order_and_repeats_are_the_callers(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="12")
    expected = decode_all(path)
    frames = decode_clip(path, [40, 3, 3, 59])
    np.testing.assert_array_equal(frames, np.stack([expected[i] for i in (40, 3, 3, 59)]))


def test_short_clip_of_a_long_video_decodes_few_frames(tmp_path):
    path = write_video(tmp_path / "long.mp4", num_frames=900, g="24", bf="2")
    with Video(path) as video:
        video.decode(range(700, 716))
        assert video.num_decoded < 16 + 24 + 8
        assert video.num_frames == 900


def test_bytes_and_open_files_are_read_like_paths(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    expected = decode_clip(path, [5, 30])
    assert torch.equal(decode_clip(data, [5, 30]), expected)
    with io.BytesIO(data) as file:
        assert torch.equal(decode_clip(file, [5, 30]), expected)
        assert not file.closed
    assert torch.equal(decode_clip(tmp_path / "a.mp4", [5, 30]), expected)


def test_threads_do_not_change_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="12", bf="2")
    assert torch.equal(decode_clip(path, [5, 30], threads=0), decode_clip(path, [5, 30]))


def test_probe_tells_frames_rate_and_size(tmp_path):
    info = probe(write_video(tmp_path / "a.mkv", num_frames=50))
    assert info == (50, 25.0, 2.0, *SIZE)


def test_short_side_only_scales_down(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert decode_clip(path, [0, 9], short_side=16).shape == (2, 16, 24, 3)
    assert decode_clip(path, [0], short_side=64).shape == (1, *SIZE, 3)


def broken_files(tmp_path):
    write_video(tmp_path / "whole.mp4")
    data = (tmp_path / "whole.mp4").read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "empty.mp4": b"",
        "text.mp4": b"this is no video\n" * 20,
        "cut.mp4": data[: len(data) // 2],
        "zeros.mp4": bytes(5000),
        "sound.mp4": (tmp_path / "sound.mp4").read_bytes(),
    }


def test_unreadable_files_are_named_in_one_line(tmp_path):
    reasons = {"empty.mp4": "empty", "sound.mp4": "no video stream", "cut.mp4": "truncated"}
    for name, data in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(VideoError, match=reasons.get(name, "not a video")) as error:
            decode_clip(str(tmp_path / name), [0])
        assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(VideoError, match=r"nowhere\.mp4: No such file"):
        probe(tmp_path / "nowhere.mp4")


def test_truncated_download_gives_the_frames_it_has(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="12", mux={"movflags": "faststart"})
    whole = decode_all(path)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 6 // 10])
    with Video(tmp_path / "half.mp4") as video:
        assert 20 < video.num_frames < 55
        np.testing.assert_array_equal(video.decode([15])[0], whole[15])
        assert video.decode([video.num_frames - 1]).shape == (1, *SIZE, 3)


def test_damaged_packets_never_crash(tmp_path):
    write_video(tmp_path / "a.mp4", g="12", bf="2", mux={"movflags": "faststart"})
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    damage = random.Random(0)
    for _ in range(300):
        data[damage.randrange(len(data) // 2, len(data))] = damage.randrange(256)
    with Video(bytes(data)) as video:
        last = video.num_frames - 1
        assert video.decode([0, last // 2, last]).shape == (3, *SIZE, 3)


def test_frames_outside_the_video_are_an_error(tmp_path):
    with Video(write_video(tmp_path / "a.mp4", num_frames=9)) as video:
        with pytest.raises(IndexError, match=r"frames 0 \.\. 8, not 9"):
            video.decode([9])
        with pytest.raises(ValueError, match="at least one"):
            video.decode([])


def test_error_survives_pickling():
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "broken")))
    assert (error.name, error.reason) == ("a.mp4", "broken")


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
