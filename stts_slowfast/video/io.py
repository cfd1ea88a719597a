"""Opening what a video is in: a path, bytes or an open file; and waiting for it only so long."""

import contextlib
import ctypes
import functools
import io
import os
import stat
import threading
from collections.abc import Callable
from typing import BinaryIO

from iopath.common.file_io import g_pathmgr
from torch.utils.data import get_worker_info

Source = str | os.PathLike | bytes | BinaryIO


class VideoError(RuntimeError):
    """A video that cannot be read; ``name`` is the file, ``reason`` what is wrong with it."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"cannot read video {name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self):  # keeps both arguments on the way out of a DataLoader's worker
        return type(self), (self.name, self.reason)


def source_name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def open_source(source: Source, name: str) -> tuple[BinaryIO, bool]:
    """A seekable binary file, and whether closing it is our business."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), True
    if not isinstance(source, str | os.PathLike):
        return source, False
    path = os.fspath(source)
    try:
        require_regular(path)
        return g_pathmgr.open(path, "rb"), True
    except OSError as error:
        raise VideoError(name, error.strerror or str(error)) from error


def require_regular(path: str) -> None:
    """Raises VideoError for a pipe or a device: opening one waits for its other end, perhaps for
    ever. What is not there, or what only iopath knows, is passed over."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise VideoError(path, "it is no regular file")


def stat_key(source: Source) -> tuple | None:
    """What stays the same as long as a file does; None for what is no local file."""
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        found = os.stat(source)
    except OSError:
        return None
    return os.path.abspath(source), found.st_size, found.st_mtime_ns


def run_with_timeout(seconds: float, name: str, read: Callable):
    """What ``read()`` returns or raises, or VideoError where it takes longer than ``seconds``
    (0: any time). A hung mount can be waited for, but not interrupted: the thread that reads is
    left behind, and ends when the mount answers."""
    if not seconds:
        return read()
    outcome: list = []

    def work() -> None:
        try:
            outcome.append((read(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True, name=f"reading {name}")
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise VideoError(name, f"reading it takes more than DATA.READ_TIMEOUT {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@functools.cache
def tune_malloc() -> None:
    """In a DataLoader's worker: memory that is freed is used again. The C library (glibc; others
    do as they do) gives what is as large as clips back to the system at once, and fetching it page
    by page for the next clip takes as long as decoding."""
    if get_worker_info() is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(option, value)


_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of <malloc.h>
