"""State dicts of every checkpoint format: recognised by names, renamed, loaded, converted.

Every format is renamed to one set of names, SlowFast's (for models that SlowFast does not have, the
family's own), and from there to the model's; the formats are in the families' files.
"""

import functools
import logging
import os
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import yaml
from torch import Tensor, nn

import stts_slowfast
from stts_slowfast.backbones import FAMILIES, Family, Format, family_of
from stts_slowfast.backbones.state_dict import AUTHORS_SCORER, State
from stts_slowfast.checkpoints.hf_folder import load_selectors
from stts_slowfast.checkpoints.io import atomic_write, read_checkpoint, save
from stts_slowfast.hosts import modules_with_selectors

logger = logging.getLogger(__name__)

# Constants and counters, not weights.
CONSTANT = re.compile(r"(relative_position_index|num_batches_tracked)$")

_OWN = Format("the model's own names", lambda state: True, lambda state, selectors: state)


@dataclass
class Loaded:
    """What :func:`load_weights` did.

    Attributes:
        format: the file's format.
        missing: the model's parameters that the file lacks; they keep their values.
        unexpected: the file's parameters that the model lacks, by the file's names.
        mismatched: parameters of another shape than the model's (a head for other classes, say),
            with both shapes; they keep the model's values.
        notes: other changes of the model.
    """

    format: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"recognised as {self.format}"]
        for name in ("missing", "unexpected", "mismatched"):
            entries = getattr(self, name)
            if entries:
                shown = ", ".join(entries[:4]) + (", ..." if len(entries) > 4 else "")
                parts.append(f"{len(entries)} {name} ({shown})")
        return "; ".join(parts + self.notes)


def load_weights(
    model: nn.Module, path_or_state_dict: str | os.PathLike | dict, strict: bool = True
) -> Loaded:
    """Loads weights of any known format into a model, in place.

    Parameters that the file lacks are noted in the model (``stts_new``), so that they learn from
    the first step (:func:`stts_slowfast.param_groups`).

    Args:
        model: a standalone model, with or without selectors.
        path_or_state_dict: a checkpoint file (any path iopath opens), the dict read from one, a
            bare state dict, or a folder of transformers' or peft's ``save_pretrained``: of a folder
            only the selectors, wherever in the model, and all of them, since ``from_pretrained``
            loads the rest.
        strict: whether file and model must have the same tensors; False loads those that fit, for
            fine-tuning from a model without selectors or with other classes.

    Returns:
        The format, and the missing and unexpected parameters.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a checkpoint, if none of its parameters fits the model, or,
            if ``strict``, not all fit; then the model is unchanged.
    """
    checkpoint = path_or_state_dict
    if isinstance(checkpoint, (str, os.PathLike)) and os.path.isdir(checkpoint):
        if load_selectors(model, checkpoint):
            return Loaded("a save_pretrained folder; only its selectors were loaded")
        if not modules_with_selectors(model):
            raise ValueError(
                f"{checkpoint} contains no selectors, and this {type(model).__name__} has none: "
                "nothing was loaded (from_pretrained loads the backbone)"
            )
        return Loaded("a save_pretrained folder; neither has selectors with weights")
    source = "the state dict"
    if isinstance(checkpoint, (str, os.PathLike)):
        source = os.fspath(checkpoint)
        checkpoint = read_checkpoint(checkpoint)
    state = state_dict_of(checkpoint)
    known = detect_format(state)
    loaded = _copy_into(model, state, to_model(state, model), known.name, source if strict else "")
    family = _family_of(model)
    if family:
        loaded.notes += family.set_metadata(model, _metadata(checkpoint, family, known))
    return loaded


def load_pretrained(model: nn.Module, cfg) -> Loaded | None:
    """Loads the initial weights of the family's node, such as ``TIMESFORMER.PRETRAINED_MODEL``.

    Returns:
        As :func:`load_weights`; None if the node names no file.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_weights` with ``strict=False``.
    """
    path = family_of(cfg).pretrained(cfg)
    if not path:
        return None
    loaded = load_weights(model, path, strict=False)
    logger.info("Loaded %s: %s", path, loaded)
    return loaded


def state_dict_of(checkpoint: dict) -> State:
    """The parameters inside a checkpoint, whatever key holds them, without DDP's prefix.

    Raises:
        ValueError: if there are none.
    """
    for key in ("model_state", "state_dict", "model"):
        if isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    named = {key: value for key, value in checkpoint.items() if isinstance(key, str)}
    state = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(
            "the checkpoint holds no parameters: no tensor with a name, model_state or state_dict"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    cfg,
    epoch: int,
    optimizer_state: dict | None = None,
    scaler_state: dict | None = None,
    extra: dict | None = None,
) -> None:
    """Writes a SlowFast ``.pyth`` checkpoint, parameters under SlowFast's names.

    The file is whole or absent, see :func:`atomic_write`. Beside SlowFast's entries it has, under
    ``stts``, the version and commit of this package, and the node.

    Args:
        path: any path iopath opens.
        model: a standalone model.
        cfg: stored as text, as SlowFast does.
        epoch: the finished epoch, counted from 0.
        optimizer_state: the optimizer's ``state_dict()``.
        scaler_state: the gradient scaler's ``state_dict()``.
        extra: entries that SlowFast ignores.
    """
    checkpoint = {
        "epoch": epoch,
        "model_state": slowfast_state(model),
        "optimizer_state": optimizer_state or {},
        "cfg": cfg.dump(),
        "stts": {
            "version": stts_slowfast.__version__,
            "commit": commit(),
            "node": yaml.safe_load(cfg.STTS.dump()),
        },
        **(extra or {}),
    }
    if scaler_state is not None:
        checkpoint["scaler_state"] = scaler_state
    if family := _family_of(model):
        metadata = family.read_metadata(model)
        checkpoint.update({k: v for k, v in metadata.items() if v != family.metadata.get(k)})
    atomic_write(path, lambda partial: save(checkpoint, partial))


@functools.cache
def commit() -> str:
    """The commit of the working tree that this package runs from; empty if it is none."""
    root = Path(stts_slowfast.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    options = ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(root), "describe", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def slowfast_state(model: nn.Module) -> State:
    """The model's parameters under SlowFast's names and shapes (a torchvision MViT is renamed)."""
    family = _family_of(model)
    state = dict(model.state_dict())
    return family.to_slowfast(state, model) if family else state


def targets() -> list[str]:
    """What :func:`convert` can write, over all families."""
    formats = [known for _, family in FAMILIES for known in family.formats.values()]
    return sorted({known.target for known in formats if known.target} | {"slowfast"})


def convert(checkpoint: dict, to: str, selectors: Sequence[str]) -> tuple[dict, Format, list[str]]:
    """Turns a checkpoint of any known format into another's; it needs no model.

    Args:
        checkpoint: as read from a file.
        to: ``slowfast`` (as :func:`save_checkpoint`), or another of :func:`targets`.
        selectors: the model's selectors, such as ``["time_0", "space_4"]``; needed only for the
            STTS authors' files.

    Returns:
        The new checkpoint, the format that was recognised, and the names of score predictors for
        which ``selectors`` has no name (they keep the authors').

    Raises:
        ValueError: if the format is unknown, or the target does not have this family.
    """
    state = state_dict_of(checkpoint)
    family, source = _detect_format(state)
    if family is None:
        raise ValueError(f"no known format has parameters such as {next(iter(state))}")
    own_names = Format("", lambda state: False, source.to_slowfast, dict, "slowfast", "model_state")
    known = {"slowfast": own_names}
    known.update((row.target, row) for row in family.formats.values() if row.target)
    if to not in known:
        raise ValueError(
            f"recognised as {source.name}, which has no {to} form: use {', '.join(sorted(known))}"
        )
    target = known[to]
    renamed = source.to_slowfast(state, selectors)
    left_over = [key for key in renamed if AUTHORS_SCORER.match(key)]
    converted = target.from_slowfast(renamed)
    if target.wrapper:
        converted = {target.wrapper: converted}
    if to == "slowfast":
        metadata = _metadata(checkpoint, family, source)
        converted.update({k: v for k, v in metadata.items() if v != family.metadata.get(k)})
        if isinstance(checkpoint.get("cfg"), str):
            converted["cfg"] = checkpoint["cfg"]
    return converted, source, left_over


def detect_format(state: State) -> Format:
    """The format of a state dict; the model's own names if it is unknown."""
    return _detect_format(state)[1]


def _detect_format(state: State) -> tuple[Family | None, Format]:
    for _, family in FAMILIES:
        for known in family.formats.values():
            if known.recognize(state):
                return family, known
    return None, _OWN


def _metadata(checkpoint: Mapping, family: Family, source: Format) -> dict:
    """Metadata of the file, else of its format, else of the family."""
    known = {**family.metadata, **source.metadata}
    return {key: checkpoint.get(key, value) for key, value in known.items()}


def _family_of(model: nn.Module) -> Family | None:
    """The family of a model, by its class or by the names of its parameters."""
    by_class = next((family for _, family in FAMILIES if isinstance(model, family.models)), None)
    return by_class or _detect_format(dict(model.state_dict()))[0]


def is_standalone(model: nn.Module) -> bool:
    """Whether the model was built by a family, not by SlowFast or another library."""
    return any(isinstance(model, family.models) for _, family in FAMILIES)


def to_model(state: State, model: nn.Module) -> State:
    """A state dict of any known format under the model's names, the file's parameters first."""
    renamed = detect_format(state).to_slowfast(state, list(getattr(model, "stts", ())))
    family = _family_of(model)
    return family.from_slowfast(renamed, model) if family else renamed


def _copy_into(model: nn.Module, state: State, renamed: State, name: str, strict: str) -> Loaded:
    """Copies what fits; if all must fit, ``strict`` is the source's name for messages."""
    loaded = Loaded(name)
    own = model.state_dict()
    fitting = {}
    # Some formats split one parameter of the model into several.
    names = state if len(state) <= len(renamed) else renamed
    for theirs, (key, value) in zip_longest(names, renamed.items()):
        if key not in own:
            loaded.unexpected.append(theirs)
        elif own[key].shape != value.shape:
            shapes = f"{tuple(value.shape)}, the model's is {tuple(own[key].shape)}"
            loaded.mismatched.append(f"{key} {shapes}")
        else:
            fitting[key] = value
    loaded.missing = [key for key in own if key not in renamed]
    if not fitting and name == _OWN.name:
        raise ValueError(f"no known format, and no parameter of it fits {_name(model)}")
    if not fitting:
        raise ValueError(f"recognised as {name}, but no parameter of it fits {_name(model)}")
    differ = loaded.missing + loaded.unexpected + loaded.mismatched
    if strict and not all(CONSTANT.search(key) for key in differ):
        raise ValueError(
            f"{strict} does not fit {_name(model)}: {loaded}. load_weights(model, ..., "
            "strict=False) loads what fits, to fine-tune from it; a save_pretrained folder is for "
            "from_pretrained, and its selectors for load_weights(model, folder)"
        )
    model.load_state_dict(fitting, strict=False)
    note_new(model, own.keys() - fitting)
    return loaded


def note_new(model: nn.Module, missing: Collection[str]) -> None:
    """Records in a model which parameters no file has filled yet, besides scorers."""
    parameters = {name for name, _ in model.named_parameters() if "stts" not in name.split(".")}
    missing = parameters.intersection(missing)
    if "stts_new" in vars(model):
        missing = {n for n in missing if any(f"{n}.".startswith(f"{m}.") for m in model.stts_new)}
    model.stts_new = tuple(sorted(missing))


def _name(model: nn.Module) -> str:
    return f"this {type(model).__name__}"
