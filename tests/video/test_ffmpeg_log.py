"""FFmpeg's log is ours only while we call it."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import av
import pytest

from stts_slowfast.video import Video, VideoError, ffmpeg_log

FILES = Path(__file__).parents[1] / "fixtures" / "videos"


@pytest.fixture(params=[None, av.logging.WARNING])
def level(request):
    before = av.logging.get_level()
    av.logging.set_level(request.param)
    yield request.param
    av.logging.set_level(before)


def test_importing_and_reading_leave_the_log_as_it_was(level):
    code = "import av; import stts_slowfast.video; assert av.logging.get_level() is None"
    subprocess.run([sys.executable, "-c", code], check=True)
    with Video(FILES / "xvid.avi") as video:
        assert av.logging.get_level() == level
        for _ in video.iter_frames([3, 40]):
            assert av.logging.get_level() == level
    with pytest.raises(VideoError):
        Video(b"no video at all")
    assert av.logging.get_level() == level


def test_what_we_call_prints_nothing_and_what_others_call_does(level, caplog):
    data = bytearray((FILES / "hflip.mp4").read_bytes())
    data[5000:15000] = bytes(10000)
    caplog.set_level(logging.WARNING, "libav")
    with Video(bytes(data)) as video:
        video.decode(range(75))
        assert video.damage and not caplog.records
    av.logging.log(av.logging.WARNING, "theirs", "a message")
    assert bool(caplog.records) == (level is not None)


def test_calls_at_the_same_time_restore_the_level_once(level):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ffmpeg_log.quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with ffmpeg_log.quiet():
        thread.start()
        inside.wait(10)
    assert av.logging.get_level() == av.logging.PANIC
    leave.set()
    thread.join()
    assert av.logging.get_level() == level
