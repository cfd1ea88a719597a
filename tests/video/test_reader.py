"""Frames by index equal those of a full decoding, however few packets are decoded or even read."""

import io
import os
import pickle
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from stts_slowfast.video import (
    Video,
    VideoError,
    decode_clip,
    frame_index,
    probe,
    reader,
    run_with_timeout,
)
from stts_slowfast.video.lru_cache import LRUCache

SIZE = (32, 48)

needs_index = pytest.mark.skipif(
    not hasattr(av.stream.Stream, "index_entries"), reason="PyAV before 17 tells of no index"
)


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(reader, "_cache", LRUCache())


def write_video(
    path, num_frames=60, codec="libx264", pts=None, time_base=None, mux=None, turn=0, **options
):
    """Frames of noise on a grey that changes, so that no two are alike."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    size = SIZE if codec not in ("libsvtav1", "libx265") else (64, 96)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = size
        if turn:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("PyAV before 18 writes no videos that are turned")
            stream.set_display_rotation(turn)
        stream.pix_fmt = "yuv420p"
        if time_base:
            stream.time_base = stream.codec_context.time_base = time_base
        for number in range(num_frames):
            image = rng.integers(0, 30, (*size, 3), dtype=np.uint8) + np.uint8(number * 3 % 200)
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


def x265(params):
    return {
        "codec": "libx265",
        "x265-params": f"log-level=none:pools=none:frame-threads=1:{params}",
    }


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
    "h264_without_times.avi": x264("keyint=12:bframes=3:b-adapt=0:scenecut=0"),
    "mpeg4.mp4": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "mpeg4_without_b_frames.avi": {"codec": "mpeg4", "g": "12"},
    "mpeg2.mpg": {"codec": "mpeg2video", "g": "12", "bf": "2"},
    "hevc.mp4": x265("keyint=12:bframes=3"),
    "hevc_open_gops.mkv": x265("keyint=12:bframes=4:b-pyramid=1:open-gop=1"),
    "hevc_open_gops.mp4": x265("keyint=12:bframes=4:b-adapt=0:open-gop=1:scenecut=0"),
    "hevc_layers.mp4": x265("keyint=24:bframes=7:temporal-layers=3"),
    "av1.mp4": {"codec": "libsvtav1", "preset": "12", "g": "20"},
    "motion_jpeg.avi": {"codec": "mjpeg", "strict": "unofficial"},
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
    rng = random.Random(0)
    sets = [[start, start + 1, start + 4] for start in (0, 7, 11, 12, 13, 23, 30, 48, 55)]
    sets += [sorted(rng.sample(range(60), count)) for count in (1, 1, 2, 3, 9, 20)] + [range(60)]
    with Video(path) as video:
        assert video.num_frames == len(expected) == 60
        for indices in sets:
            frames = video.decode(indices)
            assert frames.dtype == torch.uint8 and frames.shape[1:] == expected[0].shape
            np.testing.assert_array_equal(frames, np.stack([expected[i] for i in indices]))
        assert video.damage == ""


def test_frames_that_no_other_needs_are_passed_over(tmp_path):
    path = write_video(tmp_path / "a.mp4", g="30", **x264("bframes=3:b-adapt=0:scenecut=0"))
    with Video(path) as video:
        video.decode(range(0, 60, 4))
        assert video.num_decoded < 45


def test_groups_without_a_wanted_frame_are_passed_over(tmp_path):
    path = write_video(tmp_path / "long.mp4", num_frames=600, g="12", bf="2")
    with Video(path) as video:
        video.decode([3, 300, 303, 590])
        assert video.num_decoded < 3 * (12 + 8)


def count_packets(monkeypatch):
    """A list to which every packet that is read out of a container adds its time."""
    read = []

    class Counting:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, *streams):
            for packet in self.container.demux(*streams):
                read.append(packet.pts)
                yield packet

    real = av.open

    def counting_open(file, mode="r", **keys):
        opened = real(file, mode, **keys)
        return Counting(opened) if mode == "r" else opened

    monkeypatch.setattr(reader.av, "open", counting_open)
    return read


@needs_index
def test_an_index_saves_reading_the_packets(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", num_frames=600, g="12", bf="2")
    expected = decode_all(path)
    read = count_packets(monkeypatch)
    with Video(path) as video:
        assert video.num_frames == 600 and not read
        frames = video.decode([302, 304])
        assert len(read) < 5 * 12
        np.testing.assert_array_equal(frames, np.stack([expected[302], expected[304]]))


@needs_index
def test_an_index_that_is_wrong_is_not_believed(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", g="12", bf="2")
    expected = decode_all(path)
    real = frame_index.from_index

    def wrong(*args):
        found = real(*args)
        found.decoded[1:] += 512
        found.starts[1:] += 1
        return found

    monkeypatch.setattr(reader, "from_index", wrong)
    np.testing.assert_array_equal(decode_clip(path, range(60)), np.stack(expected))


def test_an_edit_list_leaves_frames_out(tmp_path):
    """Players begin at time 0: what lies before is decoded, not shown."""
    pts = 40 * np.arange(60) - 400
    path = write_video(tmp_path / "a.mp4", pts=pts, time_base=Fraction(1, 1000), g="12", bf="2")
    expected = decode_all(path)
    with Video(path) as video:
        assert video.num_frames == len(expected) < 60
        indices = [0, 1, 5, 20, video.num_frames - 1]
        frames = video.decode(indices)
        np.testing.assert_array_equal(frames, np.stack([expected[i] for i in indices]))


@pytest.mark.parametrize("name", ["new.webm", "gop_12_with_b_frames.mp4", "no_time_stamps.h264"])
def test_what_was_found_out_is_remembered_as_long_as_the_file_stays(tmp_path, monkeypatch, name):
    path = write_video(tmp_path / name, **FILES[name])
    expected = decode_clip(path, [5, 59])
    read = count_packets(monkeypatch)
    with Video(path) as video:
        assert not read and video.num_frames == 60
        assert torch.equal(video.decode([5, 59]), expected)
    write_video(path, num_frames=30, **FILES[name])
    assert probe(path).num_frames == 30


def test_what_is_remembered_is_bounded():
    memory = LRUCache(limit=100_000)
    for number in range(50):
        empty = np.empty(0, np.int64)
        memory.put(number, frame_index.FrameIndex(np.arange(1000), empty, empty))
    assert 5 < len(memory.items) < 13 and memory.get(49) and not memory.get(30)


def test_large_files_are_opened_in_little_memory(tmp_path):
    path = tmp_path / "large.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 512, 512, "yuv420p"
        for number in range(200):
            image = np.full((512, 512, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    assert path.stat().st_size > 75e6
    code = (
        "import resource, sys; from stts_slowfast.video import Video;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = peak();"
        "print(Video(sys.argv[1]).num_frames, peak() - before)"
    )
    output = subprocess.check_output([sys.executable, "-c", code, str(path)], text=True)
    frames, kilobytes = map(int, output.split())
    assert frames == 200 and kilobytes < 25_000


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


def test_probe_gives_frames_rate_and_size(tmp_path):
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


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_refused(tmp_path, kind):
    path = {"pipe": tmp_path / "a.mp4", "device": "/dev/zero", "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(VideoError, match="it is not a regular file"):
        Video(path)


def test_reading_is_waited_for_only_so_long():
    class Hung(io.BytesIO):
        def read(self, *args):
            time.sleep(30)

    start = time.perf_counter()
    with pytest.raises(VideoError, match=r"hung\.mp4: .*longer than DATA\.READ_TIMEOUT, 0\.2 s"):
        run_with_timeout(0.2, "hung.mp4", lambda: Video(Hung(bytes(100))))
    assert time.perf_counter() - start < 10
    assert (
        run_with_timeout(5, "quick.mp4", lambda: 3)
        == run_with_timeout(0, "quick.mp4", lambda: 3)
        == 3
    )
    with pytest.raises(KeyError):
        run_with_timeout(5, "failing.mp4", lambda: {}["no"])


@pytest.mark.parametrize("turn", [90, 180, -90])
def test_videos_are_turned_as_players_do(tmp_path, turn):
    path = write_video(tmp_path / "a.mp4", turn=turn)
    stored = np.stack(decode_all(path))[[3, 40]]
    with Video(path, rotate=False) as video:
        np.testing.assert_array_equal(video.decode([3, 40]), stored)
    with Video(path) as video:
        expected = np.rot90(stored, turn // 90, axes=(1, 2))  # counterclockwise
        np.testing.assert_array_equal(video.decode([3, 40]), expected)
        sides = SIZE if turn == 180 else SIZE[::-1]
        assert (video.info.height, video.info.width) == sides
        short = (16, 24) if turn == 180 else (24, 16)
        assert video.decode([0], short_side=16).shape == (1, *short, 3)


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


CUT = {
    "a.mp4": {"movflags": "faststart"},
    "a.mov": {"movflags": "faststart"},
    "fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "a.mkv": {},
    "of_no_length.mkv": {"live": "1"},
    "a.ts": {},
    "with_times.m2ts": {"mpegts_m2ts_mode": "1"},
    "a.avi": {},
}


@pytest.mark.parametrize("name", CUT)
def test_files_that_end_early_are_called_damaged(tmp_path, name):
    """On opening, whatever is asked for."""
    data = Path(write_video(tmp_path / name, g="12", bf="2", mux=CUT[name])).read_bytes()
    for share in (0.6, 0.85):  # of 60 frames, which is far less than a second
        size = int(len(data) * share) // 188 * 188 + 100
        with Video(data[:size]) as video:
            assert video.damage, size
    with Video(data) as video:
        video.decode(range(video.num_frames))
        assert video.damage == ""


@needs_index
@pytest.mark.parametrize("name", ["a.mp4", "a.avi"])
def test_a_missing_last_frame_is_damage(tmp_path, name):
    path = write_video(tmp_path / name, codec="mpeg4", g="12", mux=CUT[name])
    with av.open(path) as container:
        last = container.streams.video[0].index_entries[59].pos
    with Video(Path(path).read_bytes()[:last]) as video:
        assert video.num_frames == 59 and "ends early" in video.damage


def test_fewer_frames_than_the_header_declares_are_damage(tmp_path):
    data = Path(write_video(tmp_path / "a.avi", codec="mpeg4", g="12")).read_bytes()
    count = data.index(b"strh") + 40
    with Video(data[:count] + (300).to_bytes(4, "little") + data[count + 4 :]) as video:
        assert video.damage == "it ends early: only 60 of 300 frames are present"


def test_a_transport_stream_cut_between_packets_is_damaged_if_it_shows(tmp_path, monkeypatch):
    """Where frames have lengths, on opening; else once its last frame is decoded. Between two
    frames nothing in the file says that others followed."""
    monkeypatch.setitem(globals(), "SIZE", (128, 192))
    for omit in "01":
        mux = {"omit_video_pes_length": omit}
        path = write_video(tmp_path / "a.ts", g="12", bf="0", crf="20", mux=mux)
        data = Path(path).read_bytes()
        packets = [data[place : place + 188] for place in range(0, len(data), 188)]
        begins = [place for place, packet in enumerate(packets) if packet[1:3] == b"\x41\x00"]
        assert len(begins) == 60 and begins[41] - begins[40] > 5
        with Video(b"".join(packets[: begins[40] + 3])) as video:
            assert bool(video.damage) == (omit == "0")
            video.decode([video.num_frames - 1])
            assert video.damage
        with Video(b"".join(packets[: begins[41]])) as video:
            video.decode(range(video.num_frames))
            assert video.num_frames == 41 and video.damage == ""


def flip_bytes(path, count, seed=0):
    data = bytearray(path.read_bytes())
    damage = random.Random(seed)
    for _ in range(count):
        data[damage.randrange(len(data) // 2, len(data))] = damage.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("count", [5, 60, 300])
def test_damage_that_the_decoder_conceals_is_recorded(tmp_path, count):
    write_video(tmp_path / "a.mp4", g="12", bf="2", mux={"movflags": "faststart"})
    with Video(flip_bytes(tmp_path / "a.mp4", count)) as video:
        video.decode(range(12))
        assert video.damage == ""  # the first half is whole
        video.decode(range(video.num_frames))
        assert "decode" in video.damage


def test_damage_in_other_frames_of_the_pass_is_recorded(tmp_path):
    """It spoils those that were: two wrong bytes show in nearly all of these files."""
    write_video(tmp_path / "a.mp4", g="12", bf="2", mux={"movflags": "faststart"})
    damaged = 0
    for seed in range(30):
        with Video(flip_bytes(tmp_path / "a.mp4", 2, seed)) as video:
            video.decode(range(3, video.num_frames, 8))
            damaged += bool(video.damage)
    assert damaged >= 15


def test_damaged_packets_never_crash(tmp_path):
    write_video(tmp_path / "a.mp4", g="12", bf="2", mux={"movflags": "faststart"})
    with Video(flip_bytes(tmp_path / "a.mp4", 300)) as video:
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


@pytest.mark.parametrize("name", ["song.mp3", "song.m4a"])
def test_the_cover_of_a_sound_file_is_no_video(tmp_path, name):
    path = tmp_path / name
    codec = "libmp3lame" if name.endswith("mp3") else "aac"
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w", format="mp3" if name.endswith("mp3") else "mp4") as container:
        sound = container.add_stream(codec, rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 48, "yuvj420p"
        cover.disposition = 0x0400  # attached picture
        image = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
        pictures = [*cover.encode(image), *cover.encode()]
        for number in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts = 44100, 1024 * number
            container.mux(sound.encode(frame))
        container.mux(pictures)
        container.mux(sound.encode())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(VideoError, match="no video stream, only the cover picture"):
        Video(path)
