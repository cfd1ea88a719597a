"""Opens a video's source (a path, bytes or an open file), and limits the time of reading it."""

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

    def __reduce__(self):  # keeps both arguments when a DataLoader worker raises it
        return type(self), (self.name, self.reason)


def source_name(source: Source) -> str:
    """The path of a source, or the name of an open file or of the type, for messages."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", f"<{type(source).__name__}>"))


def open_source(source: Source, name: str) -> tuple[BinaryIO, bool]:
    """A seekable binary file, and whether we have to close it."""
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
    """Raises VideoError for a pipe or a device, since opening one may wait forever. Missing files,
    and paths that only iopath knows, pass."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise VideoError(path, "it is not a regular file")


def stat_key(source: Source) -> tuple | None:
    """Path, size and modification time of a local file; None for any other source."""
    if not isinstance(source, str | os.PathLike):
        return None
    try:
        found = os.stat(source)
    except OSError:
        return None
    return os.path.abspath(source), found.st_size, found.st_mtime_ns


def run_with_timeout(seconds: float, name: str, read: Callable):
    """Returns or raises as ``read()`` does, or raises VideoError after ``seconds`` (0: no limit).
    Reading from a hung mount cannot be interrupted: the thread is left behind, and ends when the
    mount answers."""
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
        raise VideoError(name, f"reading it took longer than DATA.READ_TIMEOUT, {seconds:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@functools.cache
def tune_malloc() -> None:
    """Makes glibc reuse freed memory in a DataLoader worker. By default it returns blocks as large
    as clips to the system at once, and paging them in for the next clip takes as long as
    decoding."""
    if get_worker_info() is None:
        return
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(option, value)


_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # of <malloc.h>
