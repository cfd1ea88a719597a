"""Checks the checkpoints that SlowFast loads, and marks models that start from trained weights.

The checks are hooks in SlowFast's own loading, not a second reading of the file: that could fail
if SlowFast's succeeds, and the check would be skipped.
"""

import contextlib
import inspect
import re
from contextvars import ContextVar

import torch
import yaml
from fvcore.common.config import CfgNode
from torch import nn
from yacs import config as yacs

from stts_slowfast import checkpoints
from stts_slowfast.checkpoints.names import previous_checkpoint
from stts_slowfast.checkpoints.optimizer_state import optimizer_mismatch
from stts_slowfast.configfiles.values import all_keys
from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.pyslowfast import run_state
from stts_slowfast.pyslowfast.config_access import is_enabled
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import TURN_OFF

_ABSENT = object()

_SCORER = re.compile(r"(^|\.)stts\.(time|space|tokens)_\d+\.")

_current: ContextVar["CheckpointLoad | None"] = ContextVar("stts_load", default=None)


def wrap_load_checkpoint(checkpoint) -> None:
    """``slowfast.utils.checkpoint.load_checkpoint``, which loads every checkpoint, and
    ``normal_to_sub_bn``, which it calls with the weights it has read."""
    wrap(checkpoint, "load_checkpoint", _load_checkpoint)
    wrap(checkpoint, "normal_to_sub_bn", _normal_to_sub_bn)


def register_config(model: nn.Module, cfg) -> None:
    """Stores a model's config in it: SlowFast's ``load_checkpoint`` does not get the config."""
    _inner(model).__dict__["stts_config"] = cfg


def config_of(model: nn.Module):
    """The config of a model: from :func:`register_config`, else the one that SlowFast's own model
    holds, else that of the current job, else None."""
    held, job = _inner(model).__dict__, run_state.current_job()
    found = held.get("stts_config"), held.get("cfg"), job.cfg if job else None
    # A user's own model may have anything as its attribute `cfg`.
    return next((cfg for cfg in found if isinstance(cfg, yacs.CfgNode)), None)


def mark_pretrained(model: nn.Module) -> None:
    """Marks a model, inside DDP or not, as having weights of an earlier training."""
    _inner(model).__dict__["stts_trained"] = True


def is_pretrained(model: nn.Module) -> bool:
    """Whether :func:`mark_pretrained` has marked a model."""
    return _inner(model).__dict__.get("stts_trained", False)


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


class CheckpointLoad:
    """One call of ``load_checkpoint``.

    Attributes:
        same_names: whether the file's weights have the model's names and shapes, as Caffe2's and
            inflated 2D weights do not.
        purpose: test, finetune or resume.
        was_read: whether SlowFast could read the file.
        missing: names of the model's weights that were not loaded.
    """

    def __init__(self, call: dict, cfg):
        self.path, self.optimizer, self.cfg = call["path_to_checkpoint"], call["optimizer"], cfg
        self.patterns = call["clear_name_pattern"]
        self.model = _inner(call["model"])
        self.same_names = not call["inflation"] and not call["convert_from_caffe2"]
        self.was_read = False
        self.missing: list[str] = []
        if self.optimizer is None:
            self.purpose = "test"
        elif call["epoch_reset"] or self.path == cfg.TRAIN.CHECKPOINT_FILE_PATH:
            self.purpose = "finetune"
        else:
            self.purpose = "resume"

    @contextlib.contextmanager
    def hooked(self):
        """Context manager: SlowFast's reading, the model and the optimizer call the checks."""
        token = _current.set(self)
        hooks = [self.model.register_load_state_dict_post_hook(self._on_loaded)]
        optimizer = getattr(self.optimizer, "optim", self.optimizer)  # inside SlowFast's LARS
        if optimizer is not None and is_enabled(self.cfg):
            hooks.append(optimizer.register_load_state_dict_pre_hook(self._check_optimizer))
        try:
            yield
        finally:
            _current.reset(token)
            for hook in hooks:
                hook.remove()

    def check_read(self, state: dict) -> None:
        """Refuses weights of another model, as soon as SlowFast has read them."""
        self.was_read = True
        if self.same_names:
            state = self._selected_module_state(state)
            checkpoints.validate_checkpoint(self.model, state, self.cfg, self.purpose, self.path)

    def _selected_module_state(self, state: dict) -> dict:
        """The weights of the module with selectors, by their names in it."""
        path = next(iter(modules_with_selectors(self.model)), "")
        if not path:
            return state
        for pattern in self.patterns:
            state = {key.replace(pattern, "", 1): value for key, value in state.items()}
        return {
            key.removeprefix(f"{path}."): value
            for key, value in state.items()
            if key.startswith(f"{path}.")
        }

    def check_loaded(self) -> None:
        """Raises ``ValueError`` if learned scorers got no weights, except for fine-tuning."""
        random = [key for key in self.missing if _SCORER.search(key)]
        if random and self.purpose != "finetune":
            raise ValueError(
                f"from {self.path} no weights were loaded for {len(random)} parameters of the "
                f"scorers ({', '.join(random[:2])}, ...), which would select at random: train them "
                "first (TRAIN.CHECKPOINT_FILE_PATH), or set SCORER of STTS.TIME, STTS.SPACE and "
                f"STTS.TOKENS to uniform, random or change, which need no weights, {TURN_OFF}"
            )

    def read_error(self, error: Exception) -> RuntimeError:
        """An error that names the file, and the previous checkpoint if there is one."""
        remedy = "use another file"
        if self.purpose == "resume":
            remedy = "move it away to train from the start"
            if previous := previous_checkpoint(self.path):
                remedy = f"move it away to resume from {previous}"
        return RuntimeError(
            f"{self.path} cannot be read ({type(error).__name__}: {error}); it may be truncated: "
            f"{remedy}"
        )

    def _on_loaded(self, module: nn.Module, incompatible) -> None:
        self.missing = list(incompatible.missing_keys)
        checkpoints.note_new(self.model, self.missing)  # a head for other classes, say

    def _check_optimizer(self, optimizer, state: dict) -> None:
        _check_optimizer(state, optimizer, self.cfg, self.purpose, self.path)


def _load_checkpoint(load_checkpoint, *args, **kwargs):
    call = inspect.signature(load_checkpoint).bind(*args, **kwargs)
    call.apply_defaults()
    model = call.arguments["model"]
    cfg = config_of(model)
    if cfg is None or "STTS" not in cfg:
        epoch = load_checkpoint(*args, **kwargs)
        mark_pretrained(model)
        return epoch
    load = CheckpointLoad(call.arguments, cfg)
    try:
        with load.hooked():
            epoch = load_checkpoint(*args, **kwargs)
    except Exception as error:
        if not load.was_read and load.same_names and is_enabled(cfg):
            raise load.read_error(error) from error
        raise
    if is_enabled(cfg):
        load.check_loaded()
        mark_pretrained(model)
    return epoch


def _normal_to_sub_bn(normal_to_sub_bn, checkpoint_sd, model_sd):
    if load := _current.get():
        load.check_read(checkpoint_sd)
    return normal_to_sub_bn(checkpoint_sd, model_sd)


def _config_in(path: str) -> str | None:
    """The config in a checkpoint, for an error; None if the file cannot be read this way."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["cfg"]
    except Exception:
        return None


def _check_optimizer(state: dict, optimizer, cfg, purpose: str, path: str) -> None:
    """Refuses an optimizer state of other parameters; torch's own error would name no key.

    Raises:
        ValueError: naming the keys of ``STTS`` that changed, and the remedy.
    """
    mismatch = optimizer_mismatch(state, optimizer)
    if not mismatch:
        return
    remedy = (
        "choose another OUTPUT_DIR, or set TRAIN.AUTO_RESUME False"
        if purpose == "resume"
        else "set TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights only"
    )
    changed = "; ".join(_changed_keys(_config_in(path), cfg))
    raise ValueError(
        f"{path} has the optimizer state of other parameters ({mismatch}), so it cannot be "
        "resumed: " + (f"since then {changed}; change it back, or " if changed else "") + remedy
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
