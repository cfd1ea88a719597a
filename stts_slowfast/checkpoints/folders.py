"""Folders of transformers' ``save_pretrained``: the selectors that were saved in them."""

import json
from pathlib import Path

from torch import nn

from stts_slowfast.backbones.names import State
from stts_slowfast.extras import need

PREFIX = "stts."


def read_selectors(folder: str | Path) -> State:
    """The parameters of the selectors in a folder, under the names of ``model.state_dict()``.

    Nothing else is read: a backbone may have other names in the file than in the model, which
    transformers' ``from_pretrained`` knows. Empty where the model was saved without selectors.

    Raises:
        FileNotFoundError: where the folder holds no ``model.safetensors``, whole or in shards.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    state = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: is it one of save_pretrained?")
        with need("safetensors").safe_open(folder / name, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(PREFIX)]  # noqa: SIM118  no dict
            state.update((key, file.get_tensor(key)) for key in keys)
    return state


def own_weights(model: nn.Module, folder: str | Path) -> dict:
    """What a model that was built from a folder has from there, as a checkpoint.

    Its parameters, but for those that are new (``model.new``), and the folder's selectors.
    """
    new = tuple(getattr(model, "new", ()))
    state = {
        key: value
        for key, value in model.state_dict().items()
        if not key.startswith((PREFIX, *new))
    }
    return {"model_state": {**state, **read_selectors(folder)}}


def load_selectors(model: nn.Module, folder: str | Path) -> None:
    """Loads the selectors of a folder into a model that has the same, in place.

    Raises:
        FileNotFoundError: as :func:`read_selectors`.
        ValueError: where model and folder have other selectors.
    """
    state = read_selectors(folder)
    own = {key: value for key, value in model.state_dict().items() if key.startswith(PREFIX)}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    if theirs != {key: tuple(value.shape) for key, value in own.items()}:
        found, wanted = [_selectors(keys) for keys in (state, own)]
        raise ValueError(
            f"{folder} has the selectors {found} and this {type(model).__name__} has {wanted}"
            + (", of other widths" if found == wanted else "")
            + ": attach those that were saved before you load them"
        )
    model.load_state_dict(state, strict=False)


def _selectors(keys) -> str:
    return ", ".join(dict.fromkeys(key.split(".")[1] for key in keys)) or "none"
