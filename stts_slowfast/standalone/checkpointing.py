"""The checkpoints in OUTPUT_DIR: their paths, what a run resumes from, what is tested."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from iopath.common.file_io import g_pathmgr
from torch import nn

from stts_slowfast.backbones import family_of
from stts_slowfast.checkpoints import (
    Loaded,
    load_weights,
    pretrained_state,
    read_checkpoint,
    validate_checkpoint,
)
from stts_slowfast.checkpoints.names import checkpoint_name, latest_first
from stts_slowfast.standalone.run_logger import write_json

logger = logging.getLogger(__name__)


@dataclass
class ResumeState:
    """Where training starts, and the state that it resumes with.

    Attributes:
        path: the checkpoint it resumes from; None if there is none, or for weights only.
        epoch, iteration: the first ones to train, from 0.
        trained: whether its weights came from a file.
        length: iterations of the epoch that ``iteration`` is in; 0 if an epoch starts.
        totals: the sums of the epoch's meter so far.
    """

    path: str | None = None
    epoch: int = 0
    iteration: int = 0
    trained: bool = False
    length: int = 0
    totals: list[float] = field(default_factory=list)
    optimizer_state: dict | None = None
    scaler_state: dict | None = None


def _of_task(cfg, name: str) -> str:
    return f"{cfg.TASK}_{name}" if cfg.TASK else name


def checkpoint_path(cfg, epoch: int, iteration: int = 0) -> str:
    """The path of the checkpoint after ``epoch`` epochs, or after iterations of the next one."""
    name = checkpoint_name(epoch, iteration, cfg.TASK)
    return os.path.join(cfg.OUTPUT_DIR, "checkpoints", name)


def checkpoints(cfg) -> list[str]:
    """The checkpoints in OUTPUT_DIR, the last one first; also those inside epochs."""
    folder = os.path.dirname(checkpoint_path(cfg, 0))
    if not g_pathmgr.isdir(folder):
        return []
    names = latest_first(g_pathmgr.ls(folder), cfg.TASK)
    return [os.path.join(folder, name) for name in names]


def last_checkpoint(cfg) -> str | None:
    """The last checkpoint in OUTPUT_DIR; None if there is none."""
    return next(iter(checkpoints(cfg)), None)


def remove_unfinished(cfg) -> None:
    """Removes the partial files that a killed process left beside the checkpoints."""
    folder = os.path.dirname(checkpoint_path(cfg, 0))
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            if name.startswith(".partial-"):
                os.remove(os.path.join(folder, name))


def past_validations(cfg, start: ResumeState) -> dict[int, dict[str, float]]:
    """The errors of each epoch that the run in OUTPUT_DIR validated before it was stopped.

    They have a file of their own, as a checkpoint is written before its epoch's validation.
    """
    path = _validations_path(cfg)
    own = start.path and os.path.dirname(start.path) == os.path.dirname(checkpoint_path(cfg, 0))
    if not own or not g_pathmgr.isfile(path):
        return {}
    with g_pathmgr.open(path) as file:
        past = {int(epoch): errors for epoch, errors in json.load(file).items()}
    return {epoch: errors for epoch, errors in past.items() if epoch < start.epoch}


def write_validations(cfg, validations: dict[int, dict[str, float]]) -> None:
    """Writes the file that :func:`past_validations` reads."""
    write_json(_validations_path(cfg), validations)


def _validations_path(cfg) -> str:
    return os.path.join(cfg.OUTPUT_DIR, _of_task(cfg, "validations.json"))


def load_initial_state(cfg, model: nn.Module, strict: bool = False) -> ResumeState:
    """Loads the weights that training starts from into the model.

    The last checkpoint in OUTPUT_DIR with TRAIN.AUTO_RESUME; else TRAIN.CHECKPOINT_FILE_PATH,
    only its weights with TRAIN.CHECKPOINT_EPOCH_RESET; else nothing.

    Args:
        strict: raise an error if the last checkpoint is corrupt, else resume from the one before.

    Raises:
        FileNotFoundError: if a named checkpoint is missing.
        ValueError: if it is not one, or is of another model or another run.
    """
    path, checkpoint = _last_readable(cfg, strict) if cfg.TRAIN.AUTO_RESUME else (None, {})
    if path:
        _load(cfg, model, checkpoint, path, "resume")
        logger.info("Resuming from %s", path)
        return _resume_state(path, checkpoint)
    path = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path:
        folder = family_of(cfg).init_folder(cfg)
        if folder:
            _load(cfg, model, pretrained_state(model, folder), folder, "finetune")
        return ResumeState(trained=has_pretrained(cfg))
    checkpoint = _clear_names(read_checkpoint(path), cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN)
    _load(cfg, model, checkpoint, path, "finetune")
    if cfg.TRAIN.CHECKPOINT_EPOCH_RESET or "epoch" not in checkpoint:
        return ResumeState(trained=True)
    start = _resume_state(path, checkpoint)
    if start.epoch >= cfg.SOLVER.MAX_EPOCH:
        raise ValueError(
            f"TRAIN.CHECKPOINT_FILE_PATH {path} is after epoch {start.epoch} and SOLVER.MAX_EPOCH "
            f"is {cfg.SOLVER.MAX_EPOCH}: set TRAIN.CHECKPOINT_EPOCH_RESET True to train from "
            "its weights"
        )
    return start


def has_pretrained(cfg) -> bool:
    """Whether building the model already loads weights from a file."""
    family = family_of(cfg)
    return bool(family.init_folder(cfg) or family.pretrained(cfg))


def _resume_state(path: str, checkpoint: dict) -> ResumeState:
    if not isinstance(checkpoint.get("epoch"), int):
        raise ValueError(
            f"{path} does not contain its epoch: start from its weights "
            "with TRAIN.CHECKPOINT_FILE_PATH, in another OUTPUT_DIR"
        )
    return ResumeState(
        path,
        checkpoint["epoch"] + 1,
        trained=True,
        optimizer_state=checkpoint.get("optimizer_state"),
        scaler_state=checkpoint.get("scaler_state"),
        **checkpoint.get("within_epoch", {}),
    )


def _last_readable(cfg, strict: bool) -> tuple[str | None, dict]:
    for path in checkpoints(cfg):
        try:
            return path, read_checkpoint(path)
        except ValueError as error:
            if strict:
                raise ValueError(
                    f"{error}; remove it, or omit --strict-resume to resume from the one before"
                ) from error
            logger.warning("%s: resuming from the checkpoint before", error)
    return None, {}


def load_for_test(cfg, model: nn.Module, strict: bool = False) -> None:
    """Loads the weights to test into the model, see ``engine.test``.

    Raises:
        FileNotFoundError: if a named checkpoint is missing.
        ValueError: if it is not one, or not of the config's model.
    """
    path, checkpoint = cfg.TEST.CHECKPOINT_FILE_PATH, None
    if not path:
        path, checkpoint = _last_readable(cfg, strict)
    path = path or cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path and (path := family_of(cfg).init_folder(cfg)):
        checkpoint = pretrained_state(model, path)
    if not path:
        logger.warning("no checkpoint is given or found: testing random weights")
        return
    _load(cfg, model, checkpoint or read_checkpoint(path), path, "test")


def _load(cfg, model: nn.Module, checkpoint: dict, path: str, purpose: str) -> Loaded:
    validate_checkpoint(model, checkpoint, cfg, purpose, path)
    try:
        loaded = load_weights(model, checkpoint, strict=False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    logger.info("Loaded %s: %s", path, loaded)
    return loaded


def _clear_names(checkpoint: dict, patterns: Sequence[str]) -> dict:
    """Removes each pattern from the parameters' names once, as SlowFast does."""
    state = checkpoint.get("model_state")
    if not patterns or not state:
        return checkpoint
    for pattern in patterns:
        # A name that is not a string is refused later.
        state = {n.replace(pattern, "", 1) if isinstance(n, str) else n: state[n] for n in state}
    return {**checkpoint, "model_state": state}
