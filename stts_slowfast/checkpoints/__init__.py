"""Checkpoints: formats are recognised and renamed, files read and written, what is loaded checked.

``formats.py`` knows state dicts, ``files.py`` knows files, ``check.py`` knows configs.
"""

from stts_slowfast.checkpoints.check import check
from stts_slowfast.checkpoints.files import read_checkpoint, write_whole
from stts_slowfast.checkpoints.folders import own_weights
from stts_slowfast.checkpoints.formats import (
    Loaded,
    convert,
    load_pretrained,
    load_weights,
    note_new,
    recognize,
    save_checkpoint,
    slowfast_state,
    state_dict_of,
)

__all__ = [
    "Loaded",
    "check",
    "convert",
    "load_pretrained",
    "load_weights",
    "note_new",
    "own_weights",
    "read_checkpoint",
    "recognize",
    "save_checkpoint",
    "slowfast_state",
    "state_dict_of",
    "write_whole",
]
