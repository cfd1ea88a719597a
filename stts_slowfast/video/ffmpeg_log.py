"""FFmpeg's log level, changed only during our calls."""

import threading

import av

_lock = threading.Lock()
_calls, _level = 0, None


class quiet:
    """Context in which FFmpeg prints nothing and PyAV counts its errors (`errors`), which we raise
    as a VideoError with the file's name."""

    def __enter__(self) -> None:
        global _calls, _level
        with _lock:
            if not _calls:
                _level = av.logging.get_level()
                av.logging.set_level(av.logging.PANIC)
            _calls += 1

    def __exit__(self, *exc_info) -> None:
        global _calls
        with _lock:
            _calls -= 1
            if not _calls:
                av.logging.set_level(_level)


def errors() -> tuple[int, str]:
    """How many errors FFmpeg has logged inside `quiet`, and the last of them."""
    count, last = av.logging.get_last_error()
    return count, last[2] if last else ""
