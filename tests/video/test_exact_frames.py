"""Frame i is what a decoding from the first frame to the last yields as number i: of any file,
however few frames are asked for, by a process that has not met the file and by one that has."""

import contextlib
import itertools
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stts_slowfast.video import Video, decode_clip, exact_index, frame_index, reader
from stts_slowfast.video.lru_cache import LRUCache

FILES = Path(__file__).parents[1] / "fixtures" / "videos"
NAMES = sorted(path.name for path in FILES.iterdir() if path.suffix not in (".jpg", ".png"))
# What nobody decodes on opening; the others are not what they claim.
BELIEVED = {"el_short.mp4", "hflip.mp4", "rot270flip.mp4", "transpose.mp4", "rec.webm"}


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(reader, "_cache", LRUCache())


def decode_all(path):
    """All frames, past packets that cannot be decoded."""
    images = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.InvalidDataError):
                images += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return images


def check(path, monkeypatch, step=1, clips=8):
    """Compares frames alone, each asked of a process that has not met the file, and clips, asked of
    one that knows more and more."""
    expected = decode_all(path)
    for index in range(0, len(expected), step):
        forget(monkeypatch)
        with Video(path, rotate=False) as video:
            assert video.num_frames == len(expected)
            np.testing.assert_array_equal(video.decode([index])[0], expected[index], str(index))
            assert video.num_frames == len(expected)
    forget(monkeypatch)
    rng = random.Random(0)
    for number in range(clips):
        count = min(rng.choice([1, 3, 8]), len(expected))
        indices = sorted(rng.sample(range(len(expected)), count))
        with Video(path, rotate=False) as video:
            if number % 2:
                video._decoded = []  # as if the file had been indexed by an earlier reading
            found = video.decode(indices)
            np.testing.assert_array_equal(found, np.stack([expected[i] for i in indices]))


@pytest.mark.parametrize("name", NAMES)
def test_files_that_claim_what_they_are_not(name, monkeypatch):
    check(FILES / name, monkeypatch, step=6, clips=6)
    forget(monkeypatch)
    with Video(FILES / name) as video:
        assert isinstance(video._index, frame_index.FrameIndex) == (name in BELIEVED)
        assert video.damage == ""


def write(path, codec, mux=None, pix_fmt="yuv420p", size=(32, 48), **options):
    """24 frames of noise on a grey that changes; skips what this FFmpeg cannot write."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=mux or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        for number in range(24):
            image = rng.integers(0, 30, (*size, 3), dtype=np.uint8) + np.uint8(number * 8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def x264(params):
    return {"codec": "libx264", "x264-params": params}


def x265(params):
    quiet = "log-level=none:pools=none:frame-threads=1:keyint=8"
    return {"codec": "libx265", "size": (64, 96), "x265-params": f"{quiet}:{params}"}


CODECS = {
    "h264": x264("keyint=8:bframes=2:b-adapt=0:scenecut=0"),
    "h264 open groups": x264("keyint=8:open-gop=1:bframes=3:b-pyramid=normal:b-adapt=0:scenecut=0"),
    "h264 intra refresh": x264("keyint=8:intra-refresh=1:bframes=0"),
    "h264 interlaced": x264("keyint=8:interlaced=1"),
    "h264 baseline": {"codec": "libx264", "g": "8", "profile": "baseline"},
    "hevc": x265("bframes=3:b-adapt=0:open-gop=0"),
    "hevc open groups": x265("bframes=3:b-adapt=0:open-gop=1"),
    "mpeg4": {"codec": "mpeg4", "g": "8"},
    "mpeg4 with B-frames": {"codec": "mpeg4", "g": "8", "bf": "2"},
    "mpeg2 with B-frames": {"codec": "mpeg2video", "g": "8", "bf": "2"},
    "h263": {"codec": "h263p", "g": "8"},
    "wmv": {"codec": "wmv2", "g": "8"},
    "vp8": {"codec": "libvpx", "g": "8", "lag-in-frames": "8", "auto-alt-ref": "1",
            "deadline": "realtime", "cpu-used": "8"},
    "vp9": {"codec": "libvpx-vp9", "g": "8", "lag-in-frames": "16", "cpu-used": "8"},
    "av1": {"codec": "libsvtav1", "size": (64, 96), "preset": "12", "g": "8"},
    "motion jpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "prores": {"codec": "prores", "pix_fmt": "yuv422p10le"},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"},
}  # fmt: skip
CONTAINERS = ["mp4", "mkv", "avi", "ts", "flv", "asf", "mpg", "mxf", "gif"]
MUXING = {"fragmented.mp4": {"movflags": "frag_keyframe+empty_moov"}}


@pytest.mark.parametrize("codec", CODECS)
def test_any_codec_in_any_container(tmp_path, monkeypatch, codec):
    tried = 0
    for name in [*CONTAINERS, *MUXING]:
        path = tmp_path / f"a.{name}"
        try:
            write(path, mux=MUXING.get(name), **CODECS[codec])
            if len(decode_all(path)) < 20:
                continue
        except (av.FFmpegError, ValueError, IndexError):  # these two do not go together
            continue
        tried += 1
        check(path, monkeypatch, step=9, clips=3)
    assert tried


def remux(source, target, change, mux=None):
    """Copies packets; ``change(number, packet)`` may change or drop them (by None)."""
    with av.open(str(source)) as given, av.open(str(target), "w", options=mux or {}) as made:
        stream = made.add_stream_from_template(given.streams.video[0])
        numbers = itertools.count()
        for packet in given.demux(video=0):
            if packet.size:
                packet = change(next(numbers), packet)
                if packet is not None:
                    packet.stream = stream
                    made.mux(packet)


def times_of_decoding(number, packet):
    packet.pts = packet.dts = packet.dts + 2048
    return packet


def all_keyframes(number, packet):
    packet.is_keyframe = True
    return packet


def from_the_middle(number, packet):
    return packet if number >= 5 else None


def without_later_keyframes(number, packet):
    """The frames behind refer to what is not there: the decoder makes it up."""
    return None if number and packet.is_keyframe else packet


def with_a_hole(number, packet):
    return packet if number not in (10, 11) else None


CHANGES = [times_of_decoding, all_keyframes, from_the_middle, without_later_keyframes, with_a_hole]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("codec", ["h264", "h264 open groups", "hevc", "mpeg4", "vp9"])
def test_packets_that_were_tampered_with(tmp_path, monkeypatch, codec, change):
    write(tmp_path / "a.mp4", **CODECS[codec])
    for name in ("b.mp4", "b.mkv"):
        try:
            remux(tmp_path / "a.mp4", tmp_path / name, change)
        except av.FFmpegError:
            continue
        if decode_all(tmp_path / name):  # old versions of PyAV copy no headers
            check(tmp_path / name, monkeypatch, step=5, clips=2)


def test_an_untrue_file_is_decoded_once_and_its_frames_are_kept():
    with Video(FILES / "xvid.avi") as video:
        assert video.num_decoded == 73
        video.decode([0, 30, 72])
        assert video.num_decoded == 73
    with Video(FILES / "xvid.avi") as video:
        assert video.num_decoded == 0 and video.num_frames == 73
        video.decode([3, 30])
        assert 0 < video.num_decoded < 40  # from the start on


@pytest.fixture
def long_files(monkeypatch):
    """All files are long: so that no frames are kept, and seeking is tried."""
    monkeypatch.setattr(exact_index, "MAX_FRAME_BYTES", 0)


@pytest.mark.parametrize("name", sorted({*NAMES} - BELIEVED))
def test_long_files_that_claim_what_they_are_not(name, monkeypatch, long_files):
    check(FILES / name, monkeypatch, step=9)


def test_a_long_file_is_read_from_a_keyframe_if_that_gives_its_pixels(long_files):
    with Video(FILES / "xvid.avi") as video:
        assert not video._decoded
    with Video(FILES / "xvid.avi") as video:
        np.testing.assert_array_equal(video.decode([70])[0], decode_all(FILES / "xvid.avi")[70])
        assert 0 < video.num_decoded < 40 and video._index.seekable


def test_a_seek_that_gives_other_pixels_is_noticed(long_files):
    """Every sample of this file is marked as a keyframe, and every frame depends on the first."""
    expected = decode_all(FILES / "nostss_m4.mp4")
    with Video(FILES / "nostss_m4.mp4") as video:
        video._index.keys = np.arange(1, 75)
        np.testing.assert_array_equal(video.decode([50, 51])[0], expected[50])
        assert not video._index.seekable


def test_a_contradiction_found_late_changes_neither_count_nor_numbers(tmp_path, monkeypatch):
    """A packet in the middle of an mp4 that decodes to nothing: its index cannot show it."""
    write(tmp_path / "a.mp4", **CODECS["h264"])
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    with av.open(str(tmp_path / "a.mp4")) as container:
        packet = [p for p in container.demux(video=0) if p.size][11]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / "b.mp4").write_bytes(data)

    def ask(indices):
        with Video(tmp_path / "b.mp4") as video:
            frames = video.decode(indices).numpy()
            assert video.num_frames == 24
            return frames

    last = ask([20, 23])
    forget(monkeypatch)
    whole = ask(range(24))
    np.testing.assert_array_equal(last, whole[[20, 23]])
    np.testing.assert_array_equal(ask([20, 23]), last)
    np.testing.assert_array_equal(last[1], decode_all(tmp_path / "a.mp4")[23])


def test_frames_that_the_decoder_keeps_to_itself_are_damage(tmp_path):
    """Those behind keyframes that are missing, of which it does not complain."""
    params = "keyint=12:bframes=7:b-pyramid=normal:ref=8:b-adapt=2"
    write(tmp_path / "a.mp4", size=(64, 96), **x264(params))
    remux(tmp_path / "a.mp4", tmp_path / "b.mp4", without_later_keyframes)
    expected = decode_all(tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        packets = container.streams.video[0].frames
    if len(expected) == packets:
        pytest.skip("this decoder gives them")
    for _ in range(2):
        with Video(tmp_path / "b.mp4") as video:
            video.decode([0, packets - 1])
            assert video.num_frames == packets
            assert f"{len(expected)} of {packets} frames" in video.damage


def test_a_file_without_end_of_its_first_group_is_read_by_index(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", **CODECS["h264"])
    with Video(tmp_path / "a.mp4") as video:
        assert video.num_decoded == 0
        video.decode([23])
        assert video.num_decoded < 12


@pytest.mark.parametrize(
    ("name", "fps", "frames"),
    [("rec.webm", 16.53, 75), ("vfr_h264.avi", 13.6, 38), ("catoff.mkv", 25, 75)],
)
def test_rates_are_those_of_the_frames(name, fps, frames):
    with Video(FILES / name) as video:
        assert video.fps == pytest.approx(fps, abs=0.01) and video.num_frames == frames
        assert video.duration == pytest.approx(frames / fps, abs=0.01)


def test_slots_are_equal_parts_of_the_time_that_a_video_lasts():
    path = FILES / "rec.webm"
    with av.open(str(path)) as container:
        shown = np.array([frame.time for frame in container.decode(video=0)])
    with Video(path) as video:
        found = video.frames_at(range(75))
        middles = (np.arange(75) + 0.5) / video.fps
        assert all(shown[frame] <= middle + 1e-3 for frame, middle in zip(found, middles))
        late = [m - shown[f + 1] for f, m in zip(found, middles) if f + 1 < 75]
        assert max(late) <= 1e-3 and found[0] == 0 and found[-1] == 74
    with Video(FILES / "hflip.mp4") as video:
        assert video.frames_at([0, 5, 74]) == [0, 5, 74]


def test_even_times_that_are_rounded_are_even(tmp_path):
    """Matroska's are whole milliseconds: 33, 67, 100 ..."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(30000, 1001))
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for number in range(90):
            image = np.full((32, 48, 3), number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with Video(path) as video:
        assert video.fps == 30000 / 1001 and video.frames_at(range(90)) == list(range(90))


def test_frames_that_an_edit_list_leaves_out_are_no_damage():
    with Video(FILES / "el_short.mp4") as video:
        assert video.num_frames == 5 and video.damage == ""


def test_a_clip_of_bytes_is_that_of_the_file():
    data = (FILES / "xvid.avi").read_bytes()
    path = FILES / "xvid.avi"
    np.testing.assert_array_equal(decode_clip(data, [3, 50]), decode_clip(path, [3, 50]))
