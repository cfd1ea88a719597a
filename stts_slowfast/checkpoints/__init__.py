"""Checkpoints: formats are recognised and renamed, files read and written, what is loaded checked.

``formats.py`` knows state dicts, ``files.py`` knows files, ``check.py`` knows configs.
"""

from stts_slowfast.checkpoints.formats import (
    Loaded,
    convert,
    detect_format,
    load_pretrained,
    load_weights,
    note_new,
    save_checkpoint,
    slowfast_state,
    state_dict_of,
)
from stts_slowfast.checkpoints.hf_folder import pretrained_state
from stts_slowfast.checkpoints.io import atomic_write, read_checkpoint
from stts_slowfast.checkpoints.validate import validate_checkpoint

__all__ = [
    "Loaded",
    "atomic_write",
    "convert",
    "detect_format",
    "load_pretrained",
    "load_weights",
    "note_new",
    "pretrained_state",
    "read_checkpoint",
    "save_checkpoint",
    "slowfast_state",
    "state_dict_of",
    "validate_checkpoint",
]
