"""Folders of transformers' and peft's ``save_pretrained``: the selectors saved in them."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from stts_slowfast.backbones.state_dict import State
from stts_slowfast.plugins import require

# A selector's parameter, wherever in a model: `videomae.stts.time_0.scorer...`; peft's adapters put
# `base_model.model.` before it, and their copies under `stts.modules_to_save.NAME`.
_SELECTOR = re.compile(
    r"^(?P<path>(?:.*\.)?)stts\.(?P<copy>original_module\.|modules_to_save\.[^.]+\.)?"
    r"(?P<name>[a-z]+_\d+\..*)$"
)
_WRAPPERS = re.compile(r"(^|(?<=\.))(base_model\.model|module|_orig_mod)\.")


def read_selectors(folder: str | Path) -> State:
    """The parameters of the selectors in a folder, under their names in the model.

    Nothing else is read: the backbone's names in the file may differ from the model's, which
    ``from_pretrained`` resolves. Empty if the model was saved without selectors.

    Raises:
        FileNotFoundError: if the folder holds neither ``model.safetensors``, whole or in shards,
            nor peft's ``adapter_model.safetensors``.
    """
    folder = Path(folder)
    state = {}
    for name in _files(folder):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: is it one of save_pretrained?")
        with require("safetensors").safe_open(folder / name, framework="pt") as file:
            keys = [key for key in file.keys() if _SELECTOR.match(key)]  # noqa: SIM118  no dict
            state.update((key, file.get_tensor(key)) for key in keys)
    return state


def _files(folder: Path) -> list[str]:
    if (folder / "adapter_config.json").is_file():
        return ["adapter_model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return ["model.safetensors"]


def pretrained_state(model: nn.Module, folder: str | Path) -> dict:
    """The weights that a model built from a folder has from it, as a checkpoint.

    These are its parameters except new ones (``model.stts_new``), and the folder's selectors.
    """
    new = tuple(getattr(model, "stts_new", ()))
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not _SELECTOR.match(key) and not key.startswith(new)
    }
    selectors = {
        f"stts.{name}": value for (_, name), value in _by_module(read_selectors(folder)).items()
    }
    return {"model_state": {**state, **selectors}}


def load_selectors(model: nn.Module, folder: str | Path) -> int:
    """Loads the selectors of a folder into a model with the same ones anywhere in it, in place.

    Returns:
        The number of tensors; 0 if neither has selectors with weights.

    Raises:
        FileNotFoundError: as :func:`read_selectors`.
        ValueError: if model and folder have other selectors, or not all tensors of the same.
    """
    theirs = _by_module(read_selectors(folder))
    state = model.state_dict()
    copies = {key for key in state if "original_module" not in key.split(".")}
    own = _by_module({key: key for key in state if key in copies})
    paths, saved = {path for path, _ in own}, {path for path, _ in theirs}
    if len(paths) == len(saved) == 1 and _may_be_same(paths.pop(), saved.pop()):
        own = {("", name): key for (_, name), key in own.items()}
        theirs = {("", name): value for (_, name), value in theirs.items()}
    if own.keys() != theirs.keys():
        raise ValueError(_differ(model, folder, own, theirs))
    wrong = [key for name, key in own.items() if state[key].shape != theirs[name].shape]
    if wrong:
        raise ValueError(
            f"{folder} has selectors of other widths than this {type(model).__name__}: {wrong[0]} "
            "and more; attach those that were saved"
        )
    model.load_state_dict({key: theirs[name] for name, key in own.items()}, strict=False)
    return len(own)


def _may_be_same(path: str, other: str) -> bool:
    """Whether two paths may be of one module, in a model with or without its head or a wrapper."""
    short, long = sorted((path, other), key=len)
    return f".{long}".endswith(f".{short}" if short else "")


def _by_module(state: dict) -> dict[tuple[str, str], object]:
    """Values by the path of the module with selectors and the name in its ``stts``."""
    found = {}
    for key, value in state.items():
        if match := _SELECTOR.match(key):
            found[_WRAPPERS.sub("", match["path"]), match["name"]] = value
    return found


def _differ(model: nn.Module, folder: str | Path, own: dict, theirs: dict) -> str:
    kind = type(model).__name__
    found, wanted = _selectors(theirs), _selectors(own)
    if found != wanted:
        return (
            f"{folder} has the selectors {found} and this {kind} has {wanted}: attach those that "
            "were saved before you load them"
        )
    texts = []
    for title, names in (("missing", own.keys() - theirs), ("unexpected", theirs.keys() - own)):
        if names:
            shown = ", ".join(f"{path}stts.{name}" for path, name in sorted(names)[:3])
            texts.append(f"{len(names)} tensors are {title} ({shown}{', ...' * (len(names) > 3)})")
    return f"{folder} does not have the selectors of this {kind}: {'; '.join(texts)}"


def _selectors(names: Iterable[tuple[str, str]]) -> str:
    return ", ".join(sorted({name.split(".")[0] for _, name in names})) or "none"
