"""Checkpoint files: verified when read, written whole or not at all."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NoReturn

import torch
from iopath.common.file_io import g_pathmgr

from stts_slowfast.backbones.state_dict import State
from stts_slowfast.plugins import MissingPackageError, require

# --- reading ------------------------------------------------------------------------------------


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU: PyTorch's format, or ``.safetensors``.

    A damaged file is noticed: PyTorch's files are zip archives with a CRC-32 of each record, and
    ours in safetensors, a format without checksums, have a SHA-256 in their metadata.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as a checkpoint (truncated, damaged, of another format).
    """
    path = os.fspath(path)
    if not g_pathmgr.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with g_pathmgr.open(path, "rb") as f:
            read = _read_safetensors if path.endswith(".safetensors") else _read_pytorch
            checkpoint = read(f)
    except MissingPackageError:
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is about its own arguments
            reason = (
                "it is not a PyTorch file, or it contains objects other than tensors, numbers and "
                "strings"
            )
        else:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            reason = text if isinstance(error, _DamagedError) else f"{text} (is it truncated?)"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} contains a {type(checkpoint).__name__}, not a dict of parameters")
    return checkpoint


class _DamagedError(Exception):
    """The file is not as it was written."""


def _read_pytorch(f: IO[bytes]) -> object:
    if f.read(1) == b"":
        raise _DamagedError("the file is empty: writing was interrupted, or the disk was full")
    f.seek(0)
    # Files of PyTorch before 1.6 are not zip archives.
    if zipfile.is_zipfile(f) and (damaged := _damaged_record(f)):
        raise _DamagedError(f"the checksum of {damaged} does not match: the file is corrupt")
    f.seek(0)
    checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("checksum"), str):
        del checkpoint["checksum"]  # the SHA-256 of files of version 0.1
    return checkpoint


def _damaged_record(f: IO[bytes]) -> str | None:
    """The first damaged record of a zip archive; torch.load compares no CRC."""
    with zipfile.ZipFile(f) as archive:
        for record in archive.infolist():
            # Of a "directory" torch.load reads nothing, and leaves the tensor uninitialized.
            if record.external_attr & _DOS_DIRECTORY and record.file_size:
                return record.filename
        return archive.testzip()


_DOS_DIRECTORY = 0x10


def _read_safetensors(f: IO[bytes]) -> dict:
    data = f.read()
    state = require("safetensors.torch").load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    notes = metadata.get("stts_slowfast", "{}")
    if "sha256" in metadata and _sha256(notes, state) != metadata["sha256"]:
        raise _DamagedError(
            "the checksum does not match: the file is corrupt, or it was edited without updating "
            "`sha256` in its metadata"
        )
    return {**json.loads(notes), "model_state": state}


def _sha256(notes: str, state: State) -> str:
    """Digest of a safetensors file's notes and parameters."""
    digest = hashlib.sha256(f"2 False\n{notes!r}\n{len(state)} True\n".encode())
    for key, value in sorted(state.items()):
        digest.update(f"2 False\n{key!r}\n{value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- writing ------------------------------------------------------------------------------------


def save(checkpoint: dict, path: str) -> None:
    """Writes a checkpoint, or a bare state dict, at ``path``: use it inside :func:`atomic_write`.

    Raises:
        OSError: with ``needed``, the file's size in bytes, if the disk has no room for it.
    """
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
    metadata = {"format": "pt", "sha256": _sha256(text, state), "stts_slowfast": text}
    return require("safetensors.torch").save(state, metadata)


class _Sink(io.RawIOBase):
    """A file for ``torch.save``, which aborts the interpreter if a write fails as it closes.

    After a failed write it only counts bytes, so that the error can name the needed size.
    """

    def __init__(self, file: IO[bytes]):
        self.file, self.needed = file, 0
        self.error: OSError | None = None

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
        """Raises the first error, if there was one."""
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
    """Writes a file beside ``path``, then renames it: a file is whole or absent.

    A missing folder is created and a link followed; half-written files of killed processes in the
    folder are removed. Every file that a run or a command writes is written by this function.

    Args:
        path: the file; also a remote path that iopath opens.
        write: called with the path of a local file to fill.
        overwrite: whether an existing file may be replaced (``--force`` of the commands).
        sources: files that must not be replaced, since ``write`` reads them.

    Raises:
        FileExistsError: if the file exists and may not be replaced.
        ValueError: if ``path`` is a folder, a device or another special file, or a source.
        OSError: if the disk is full, naming the needed and the free space.
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
    # archive inside after the name before the last dot, which must not be empty.
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
        folder = os.path.dirname(path)
        while not os.path.exists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{path} cannot be written: {folder} is read-only for you")
        return
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: name a file in it")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is a device or another special file: name a regular file")
    for source in sources:
        if os.path.exists(source) and os.path.samefile(source, path):
            raise ValueError(f"{path} would overwrite an input file: choose another path")
    if not overwrite:
        _refuse_existing(path)


def _refuse_existing(path: str) -> NoReturn:
    raise FileExistsError(f"{path} already exists: choose another path, or add --force")


def _write_remote(path: str, write: Callable[[str], None], overwrite: bool) -> None:
    if not overwrite and g_pathmgr.exists(path):
        _refuse_existing(path)
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
        os.remove(partial)  # so that its space counts as free
    needed = getattr(error, "needed", None)
    needs = f"it needs {_size(needed)}" if needed else f"it needs more than {_size(written)}"
    free = shutil.disk_usage(os.path.dirname(path)).free
    return OSError(f"{path} was not written: {needs}, and the disk has {_size(free)} free")


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count} bytes"


def _remove_leftovers(folder: str) -> None:
    """Removes half-written files of dead processes of this machine, and all that are a day old."""
    for leftover in Path(folder).glob(".partial-*.tmp"):
        host, _, process = leftover.stem.removeprefix(".partial-").rpartition("-")
        try:
            old = time.time() - leftover.stat().st_mtime > 24 * 3600
            here = host in ("", socket.gethostname()) and process.isdigit()
            if old or (here and not os.path.exists(f"/proc/{process}")):
                leftover.unlink()
        except OSError:
            continue  # another process was faster, or it is not ours to remove
