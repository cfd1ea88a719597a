"""What SlowFast loads into a model: whether it is of that model, and that a run starts trained.

What is checked is what SlowFast has read and loaded, by hooks in its own loading: a second reading
of the file could fail where the first did not, and the check would be gone.
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
from stts_slowfast.pyslowfast.preflight import OFF

_ABSENT = object()

_SCORER = re.compile(r"(^|\.)stts\.(time|space)_\d+\.")

# The loading that runs in this thread.
_loading: ContextVar["Loading | None"] = ContextVar("loading", default=None)


def wrap_load_checkpoint(checkpoint) -> None:
    """``slowfast.utils.checkpoint.load_checkpoint``, through which every checkpoint comes, and
    ``normal_to_sub_bn``, to which it gives the weights it has read."""
    wrap(checkpoint, "load_checkpoint", _load)
    wrap(checkpoint, "normal_to_sub_bn", _note_read)


def register_config(model: nn.Module, cfg) -> None:
    """Notes with which config SlowFast built a model with selectors: its loader is not told."""
    _inner(model).__dict__["stts_config"] = cfg


def config_of(model: nn.Module):
    """What :func:`register_config` noted, else the config that SlowFast's own model holds, else that of
    the job that runs, else None."""
    held, job = _inner(model).__dict__, run_state.running()
    found = held.get("stts_config"), held.get("cfg"), job.cfg if job else None
    # Under `cfg` a model of the user's own may hold anything.
    return next((cfg for cfg in found if isinstance(cfg, yacs.CfgNode)), None)


def mark_pretrained(model: nn.Module) -> None:
    """Notes that a model, wrapped by DDP or not, has weights of an earlier training."""
    _inner(model).__dict__["stts_trained"] = True


def is_trained(model: nn.Module) -> bool:
    """Whether :func:`mark_pretrained` was told of this model."""
    return _inner(model).__dict__.get("stts_trained", False)


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "module", model)


class Loading:
    """One call of ``load_checkpoint``: what was asked for, read and loaded.

    Attributes:
        read: whether the file could be read.
        missing: names of the model's weights that were not loaded.
    """

    def __init__(self, asked: dict, cfg):
        self.path, self.optimizer, self.cfg = asked["path_to_checkpoint"], asked["optimizer"], cfg
        self.patterns = asked["clear_name_pattern"]
        self.model = _inner(asked["model"])
        # Weights of other kinds, and 2D ones that are inflated, have other names and shapes.
        self.plain = not asked["inflation"] and not asked["convert_from_caffe2"]
        self.read, self.missing = False, []
        if self.optimizer is None:
            self.purpose = "test"
        elif asked["epoch_reset"] or self.path == cfg.TRAIN.CHECKPOINT_FILE_PATH:
            self.purpose = "finetune"
        else:
            self.purpose = "resume"

    @contextlib.contextmanager
    def watched(self):
        """While SlowFast loads: its reading, its model and its optimizer call back."""
        token = _loading.set(self)
        hooks = [self.model.register_load_state_dict_post_hook(self._note_loaded)]
        optimizer = getattr(self.optimizer, "optim", self.optimizer)  # inside SlowFast's LARS
        if optimizer is not None and is_enabled(self.cfg):
            hooks.append(optimizer.register_load_state_dict_pre_hook(self._check_optimizer))
        try:
            yield
        finally:
            _loading.reset(token)
            for hook in hooks:
                hook.remove()

    def note_read(self, state: dict) -> None:
        """Refuses weights that are not of the model, as soon as SlowFast has read them."""
        self.read = True
        if self.plain:
            checkpoints.validate_checkpoint(
                self.model, self._own(state), self.cfg, self.purpose, self.path
            )

    def _own(self, state: dict) -> dict:
        """The part of the weights that is of the module with selectors, by the names in it."""
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
        """Refuses scorers that learn, that are to be used, and that got no weights.

        Raises:
            ValueError: naming them.
        """
        random = [key for key in self.missing if _SCORER.search(key)]
        if random and self.purpose != "finetune":
            raise ValueError(
                f"from {self.path} no weights were loaded for {len(random)} parameters of the "
                f"scorers ({', '.join(random[:2])}, ...), which would choose at random: train them "
                "first (TRAIN.CHECKPOINT_FILE_PATH), or set STTS.TIME.SCORER and STTS.SPACE.SCORER "
                f"uniform, random or change, which need no weights, {OFF}"
            )

    def explain(self, error: Exception) -> None:
        """Raises the error of a file that could not be read with its name.

        Raises:
            RuntimeError: naming the file, and the checkpoint before it if there is one.
        """
        way = "give another file"
        if self.purpose == "resume":
            way = "move it away to begin anew"
            if before := previous_checkpoint(self.path):
                way = f"move it away to resume from {before}"
        raise RuntimeError(
            f"{self.path} cannot be read ({type(error).__name__}: {error}), as a file that was not "
            f"written to its end: {way}"
        ) from error

    def _note_loaded(self, module: nn.Module, incompatible) -> None:
        self.missing = list(incompatible.missing_keys)
        checkpoints.note_new(self.model, self.missing)  # a head for other classes, say

    def _check_optimizer(self, optimizer, state: dict) -> None:
        _check_optimizer(state, optimizer, self.cfg, self.purpose, self.path)


def _load(load_checkpoint, *args, **kwargs):
    call = inspect.signature(load_checkpoint).bind(*args, **kwargs)
    call.apply_defaults()
    model = call.arguments["model"]
    cfg = config_of(model)
    if cfg is None or "STTS" not in cfg:
        epoch = load_checkpoint(*args, **kwargs)
        mark_pretrained(model)
        return epoch
    loading = Loading(call.arguments, cfg)
    try:
        with loading.watched():
            epoch = load_checkpoint(*args, **kwargs)
    except Exception as error:
        if not loading.read and loading.plain and is_enabled(cfg):
            loading.explain(error)
        raise
    if is_enabled(cfg):
        loading.check_loaded()
        mark_pretrained(model)
    return epoch


def _note_read(normal_to_sub_bn, checkpoint_sd, model_sd):
    if loading := _loading.get():
        loading.note_read(checkpoint_sd)
    return normal_to_sub_bn(checkpoint_sd, model_sd)


def _config_in(path: str) -> str | None:
    """The config in a checkpoint, for a message; None if the file is not read this simply."""
    with contextlib.suppress(Exception):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["cfg"]


def _check_optimizer(state: dict, optimizer, cfg, purpose: str, path: str) -> None:
    """Refuses an optimizer state of other parameters, of which torch's message names no key.

    Raises:
        ValueError: naming the keys of ``STTS`` that have changed, and the way out.
    """
    mismatch = optimizer_mismatch(state, optimizer)
    if not mismatch:
        return
    way = (
        "choose another OUTPUT_DIR, or set TRAIN.AUTO_RESUME False"
        if purpose == "resume"
        else "set TRAIN.CHECKPOINT_EPOCH_RESET True to start from its weights alone"
    )
    changed = "; ".join(_changed_keys(_config_in(path), cfg))
    raise ValueError(
        f"{path} holds the state of an optimizer for other parameters ({mismatch}), so that run "
        "cannot be resumed: " + (f"since then {changed}; set it back, or " if changed else "") + way
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
