"""What SlowFast loads into a model: whether it is of that model, and that a run starts trained."""

import inspect
import weakref

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn

from stts_slowfast import checkpoints
from stts_slowfast.keys import all_keys
from stts_slowfast.pyslowfast.guard import enabled
from stts_slowfast.pyslowfast.wrap import wrap

_ABSENT = object()

_trained = weakref.WeakSet()
_configs = weakref.WeakKeyDictionary()


def wrap_load_checkpoint(checkpoint) -> None:
    """``slowfast.utils.checkpoint.load_checkpoint``, through which every checkpoint comes."""
    wrap(checkpoint, "load_checkpoint", _load)


def note_config(model: nn.Module, cfg) -> None:
    """Notes with which config SlowFast built a model: its loader is not told."""
    if "STTS" in cfg:
        _configs[model] = cfg


def note_trained(model: nn.Module) -> None:
    """Notes that a model, wrapped by DDP or not, has weights of an earlier training."""
    _trained.add(_inner(model))


def is_trained(model: nn.Module) -> bool:
    """Whether :func:`note_trained` was told of this model."""
    return _inner(model) in _trained


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


def _load(load_checkpoint, *args, **kwargs):
    call = inspect.signature(load_checkpoint).bind(*args, **kwargs)
    call.apply_defaults()
    asked = call.arguments
    cfg = _configs.get(_inner(asked["model"]))
    # Files of other kinds, and 2D ones that are inflated, are left to SlowFast.
    if cfg is not None and not asked["inflation"] and not asked["convert_from_caffe2"]:
        state = _read(asked["path_to_checkpoint"])
        if state is not None:
            _check(state, cfg, asked)
    missing = []
    hook = _inner(asked["model"]).register_load_state_dict_post_hook(
        lambda module, keys: missing.extend(keys.missing_keys)
    )
    try:
        epoch = load_checkpoint(*args, **kwargs)
    finally:
        hook.remove()
    note_trained(asked["model"])
    checkpoints.note_new(_inner(asked["model"]), missing)  # a head for other classes, say
    return epoch


def _read(path: str) -> dict | None:
    """A local checkpoint's contents, its tensors left on disk; None where SlowFast may complain."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return None
    return state if isinstance(state, dict) else None


def _check(state: dict, cfg, asked: dict) -> None:
    path, model, optimizer = asked["path_to_checkpoint"], asked["model"], asked["optimizer"]
    goes_on = optimizer is not None and not asked["epoch_reset"] and "epoch" in state
    if optimizer is None:
        purpose = "test"
    elif goes_on and path != cfg.TRAIN.CHECKPOINT_FILE_PATH:
        purpose = "resume"
    else:
        purpose = "finetune"
    checkpoints.check(model, state, cfg, purpose, path)
    if goes_on and enabled(cfg):
        _check_optimizer(state, optimizer, cfg, purpose, path)


def _check_optimizer(state: dict, optimizer, cfg, purpose: str, path: str) -> None:
    """Refuses an optimizer state of other parameters, of which torch's message names no key.

    Raises:
        ValueError: naming the keys of ``STTS`` that have changed, and the way out.
    """
    theirs = state.get("optimizer_state", {})
    if hasattr(optimizer, "stts_split"):
        optimizer.stts_split(theirs)
    found = [len(group["params"]) for group in theirs.get("param_groups", ())]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if found == sizes and _fits(theirs.get("state", {}), optimizer):
        return
    way = (
        "choose another OUTPUT_DIR, or set TRAIN.AUTO_RESUME False"
        if purpose == "resume"
        else "set TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights alone"
    )
    changed = "; ".join(_changed_keys(state.get("cfg"), cfg))
    raise ValueError(
        f"{path} holds the state of an optimizer for other parameters (groups of {found}, where "
        f"this run has {sizes}), so that run cannot go on: "
        + (f"since then {changed}; set it back, or " if changed else "")
        + way
    )


def _fits(state: dict, optimizer) -> bool:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return all(
        value.shape == parameters[number].shape
        for number, entry in state.items()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )


def _changed_keys(dump: str | None, cfg) -> list[str]:
    """``STTS.TIME.BLOCKS [0] became [1]`` for each key, by the config in the checkpoint."""
    then = yaml.safe_load(dump or "") or {}
    if "STTS" not in then:
        return ["the node STTS was added"] if then else []
    now = CfgNode({"STTS": cfg.STTS})
    changed = []
    for key in all_keys(now):
        was, value = then, now
        for name in key.split("."):
            was = was.get(name, _ABSENT) if isinstance(was, dict) else _ABSENT
            value = value[name]
        if was is not _ABSENT and was != value:
            changed.append(f"{key} {was} became {value}")
    return changed
