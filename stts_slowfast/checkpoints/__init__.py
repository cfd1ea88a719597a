"""Checkpoints: files (``io.py``, ``names.py``, ``hf_folder.py``), the formats of state dicts
(``formats.py``), and checks that they fit a run (``validate.py``, ``optimizer_state.py``).
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
