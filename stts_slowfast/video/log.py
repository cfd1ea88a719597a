"""FFmpeg's log: ours while we call it, as it was before and afterwards."""

import contextlib
import threading
from collections.abc import Iterator

import av

_lock = threading.Lock()
_calls, _level = 0, None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, FFmpeg prints nothing, and PyAV counts its errors (`errors`): what goes wrong is
    raised as a VideoError, with the file's name."""
    global _calls, _level
    with _lock:
        if not _calls:
            _level = av.logging.get_level()
            if _level != av.logging.PANIC:
                av.logging.set_level(av.logging.PANIC)
        _calls += 1
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls and _level != av.logging.PANIC:
                av.logging.set_level(_level)


def errors() -> tuple[int, str]:
    """How many errors FFmpeg logged inside of `quiet` so far, and the last of them."""
    count, last = av.logging.get_last_error()
    return count, last[2].strip() if last else ""
