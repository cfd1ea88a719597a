"""Checkpoint files: reading what may be damaged, writing so that a file is whole or absent."""

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from iopath.common.file_io import g_pathmgr
from torch import Tensor

from stts_slowfast.backbones.state_dict import State
from stts_slowfast.plugins import MissingPackageError, require

logger = logging.getLogger(__name__)

# --- reading ------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU: PyTorch's kind, or ``.safetensors``.

    Every record of PyTorch's files has a CRC-32, as in any zip archive, and what we write has a
    SHA-256 of all it holds besides: both are verified. If the first hold and the last does not,
    somebody has changed what we wrote and saved it again: that is logged, and read.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read as a checkpoint (truncated, damaged, of another kind).
    """
    path = os.fspath(path)
    if not g_pathmgr.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with g_pathmgr.open(path, "rb") as f:
            if path.endswith(".safetensors"):
                checkpoint = _read_safetensors(f)
            else:
                checkpoint = _read_pytorch(f, path)
    except Exception as error:
        if isinstance(error, MissingPackageError):
            raise
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is about its own arguments
            reason = "it is no file of PyTorch's, or holds more than tensors, numbers and texts"
        else:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = text if isinstance(error, _DamagedError) else f"{text} (is it truncated?)"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of parameters")
    return checkpoint


class _DamagedError(Exception):
    """The file is not what was once written."""


def _read_pytorch(f, path: str) -> object:
    if f.read(1) == b"":
        raise _DamagedError("it is empty: its writing was interrupted, or the disk was full")
    f.seek(0)
    archived = zipfile.is_zipfile(f)
    if archived:
        with zipfile.ZipFile(f) as archive:
            damaged = archive.testzip()
        if damaged:
            raise _DamagedError(f"its checksum does not hold at {damaged}, the file is damaged")
    f.seek(0)
    checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("checksum"), str):
        checksum = checkpoint.pop("checksum")
        if not _holds(checkpoint, checksum):
            if not archived:
                raise _DamagedError(f"{_BROKEN}, or was edited in a format that cannot tell")
            logger.warning("%s was edited after it was written: its bytes are whole", path)
    return checkpoint


_BROKEN = "its checksum does not hold, the file is damaged"


def _holds(content, checksum: str) -> bool:
    return checksum == _sha256(content)


def _read_safetensors(f) -> dict:
    data = f.read()
    state = require("safetensors.torch").load(data)
    length = int.from_bytes(data[:8], "little")
    notes = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    text = notes.get("stts_slowfast", "{}")
    if "sha256" in notes and not _holds([text, dict(sorted(state.items()))], notes["sha256"]):
        raise _DamagedError(
            f"{_BROKEN}, or was edited with the sha256 of its metadata left as it was"
        )
    return {**json.loads(text), "model_state": state}


def _sha256(content) -> str:
    digest = hashlib.sha256()

    def add(value) -> None:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (dict, list, tuple)):
            parts = value.items() if isinstance(value, dict) else value
            digest.update(f"{len(value)} {isinstance(value, dict)}\n".encode())
            for part in parts:
                add(part)
        else:
            digest.update(f"{value!r}\n".encode())

    add(content)
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint, or a bare state dict, at ``path``: use it inside :func:`atomic_write`.

    A checkpoint gains ``checksum``; a state dict stays what ``load_state_dict`` takes.

    Raises:
        OSError: with ``needed``, the file's size in bytes, where the disk has no room for it.
    """
    if not all(isinstance(value, Tensor) for value in checkpoint.values()):
        checkpoint = {**checkpoint, "checksum": _sha256(checkpoint)}
    with open(path, "wb") as f:
        sink = _Sink(f)
        torch.save(checkpoint, sink)
        sink.finish()


def save_bytes(data: bytes, path: str) -> None:
    """Writes ``data`` at ``path``: use it inside :func:`atomic_write`; raises as :func:`save`."""
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        error.needed = len(data)
        raise


def safetensors_bytes(state: State, notes: dict) -> bytes:
    """A safetensors file of parameters, with ``notes`` (JSON) and a checksum in its metadata."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    text = json.dumps(notes)
    digest = _sha256([text, dict(sorted(state.items()))])
    metadata = {"format": "pt", "sha256": digest, "stts_slowfast": text}
    return require("safetensors.torch").save(state, metadata)


class _Sink(io.RawIOBase):
    """A file for ``torch.save``, which aborts the interpreter where a write fails as it closes.

    After a failed write it only counts, so that what was needed is known when it is told.
    """

    def __init__(self, file):
        self.file, self.needed, self.error = file, 0, None

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        self.needed += size
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return size

    def finish(self) -> None:
        """Raises what went wrong, if anything did."""
        try:
            self.file.flush()
        except OSError as error:
            self.error = self.error or error
        if self.error is not None:
            self.error.needed = self.needed
            raise self.error


def atomic_write(
    path: str | os.PathLike,
    write: Callable[[str], None],
    overwrite: bool = True,
    sources: Sequence[str | os.PathLike] = (),
) -> None:
    """Has ``write`` fill a file beside ``path``, then renames it: a file is whole or absent.

    A missing folder is made, a link followed; what killed processes left half-written there is
    removed. Every file that a run or a command leaves behind is written by this function.

    Args:
        path: where the file is to be; also a remote path that iopath opens.
        write: is given the path of a local file to fill.
        overwrite: whether a file that is there may be replaced (``--force`` of the commands).
        sources: files that must not be replaced, since they are what is being written from.

    Raises:
        FileExistsError: where there is a file, and it may not be replaced.
        ValueError: where ``path`` is a folder, a device or another special file, or a source.
        OSError: where the disk is full, saying what was needed and what is free.
    """
    path = os.fspath(path)
    if "://" in path:
        _write_remote(path, write, overwrite)
        return
    check_output_path(path, overwrite, sources)
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    _remove_leftovers(folder)
    # SlowFast resumes from any file there with "checkpoint" in its name; torch.save names the
    # archive inside after what stands before the last dot, which must not be empty.
    partial = os.path.join(folder, f".partial-{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        write(partial)
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise _no_room(error, partial, path) or error from error
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def check_output_path(
    path: str | os.PathLike, overwrite: bool, sources: Sequence[str | os.PathLike] = ()
) -> None:
    """Raises as :func:`atomic_write` would, for commands that work long before they write."""
    path = os.path.realpath(path)
    if not os.path.exists(path):
        return
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file in it")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is a device or another special file: name a regular file")
    for source in sources:
        if os.path.exists(source) and os.path.samefile(source, path):
            raise ValueError(f"{path} would replace the file that is read: name another")
    if not overwrite:
        raise FileExistsError(f"{path} is there already: name another, or add --force")


def _write_remote(path: str, write: Callable[[str], None], overwrite: bool) -> None:
    if not overwrite and g_pathmgr.exists(path):
        raise FileExistsError(f"{path} is there already: name another, or add --force")
    with tempfile.TemporaryDirectory() as folder:
        partial = os.path.join(folder, "partial.tmp")
        write(partial)
        # Remote stores publish a file when it is closed.
        with open(partial, "rb") as source, g_pathmgr.open(path, "wb") as target:
            shutil.copyfileobj(source, target)


def _no_room(error: OSError, partial: str, path: str) -> OSError | None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    written = os.path.getsize(partial) if os.path.exists(partial) else 0
    if os.path.exists(partial):
        os.remove(partial)  # so that what is free is what there was before
    needed = getattr(error, "needed", None)
    needs = f"it needs {_size(needed)}" if needed else f"it needs more than {_size(written)}"
    free = shutil.disk_usage(os.path.dirname(path)).free
    return OSError(f"{path} was not written: {needs}, and the disk has {_size(free)} free")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} bytes"


def _remove_leftovers(folder: str) -> None:
    """Removes what processes of this machine that are gone left half-written, and what is old."""
    for leftover in Path(folder).glob(".partial-*.tmp"):
        host, _, process = leftover.stem.removeprefix(".partial-").rpartition("-")
        try:
            old = time.time() - leftover.stat().st_mtime > 24 * 3600
            here = host in ("", socket.gethostname()) and process.isdigit()
            if old or (here and not os.path.exists(f"/proc/{process}")):
                leftover.unlink()
        except OSError:
            continue  # another process was faster, or it is not ours to remove
