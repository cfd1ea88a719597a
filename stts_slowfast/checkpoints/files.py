"""Checkpoint files: reading what may be damaged, writing so that a file is whole or absent."""

import os
import pickle
from collections.abc import Callable

import torch
from iopath.common.file_io import g_pathmgr


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it cannot be read as a checkpoint (truncated, another kind of file).
    """
    path = os.fspath(path)
    if not g_pathmgr.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with g_pathmgr.open(path, "rb") as f:
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's advice is about its own arguments
            reason = "it is no file of PyTorch's, or holds more than tensors, numbers and texts"
        else:
            reason = f"{str(error).strip().splitlines()[0]} (is it truncated?)"
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of parameters")
    return checkpoint


def write_whole(path: str, write: Callable[[str], None]) -> None:
    """Has ``write`` fill a file beside ``path``, then renames it: a local file is whole or absent.

    Raises:
        FileNotFoundError: where the folder does not exist.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"folder {folder} does not exist: make it, or write elsewhere")
    # SlowFast resumes from any file there with "checkpoint" in its name; torch.save names the
    # archive inside after what stands before the last dot, which must not be empty.
    partial = os.path.join(folder, f".partial-{os.getpid()}.tmp")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
