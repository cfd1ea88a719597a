"""The checkpoints in OUTPUT_DIR: where they lie, what a run starts from, what is tested."""

import logging
import os
import re
from collections.abc import Sequence

from iopath.common.file_io import g_pathmgr
from torch import nn

from stts_slowfast.checkpoints import Loaded, check, load_weights, read_checkpoint

logger = logging.getLogger(__name__)


class Start:
    """Where training begins: epoch, and the optimizer's and the scaler's state to go on with.

    ``path`` is the checkpoint it goes on from; None for weights alone. ``trained`` is whether there
    are weights of any kind.
    """

    def __init__(
        self, path: str | None = None, checkpoint: dict | None = None, trained: bool = False
    ):
        checkpoint = checkpoint or {}
        self.path = path
        self.trained = trained or path is not None
        if path and not isinstance(checkpoint.get("epoch"), int):
            raise ValueError(
                f"{path} does not say after which epoch it was written: start from its weights "
                "with TRAIN.CHECKPOINT_FILE_PATH, in another OUTPUT_DIR"
            )
        self.epoch = checkpoint["epoch"] + 1 if path else 0
        self.optimizer_state = checkpoint.get("optimizer_state") if path else None
        self.scaler_state = checkpoint.get("scaler_state") if path else None


def checkpoint_path(cfg, epoch: int) -> str:
    """Where the checkpoint after ``epoch`` epochs lies."""
    task = f"{cfg.TASK}_" if cfg.TASK else ""
    name = f"{task}checkpoint_epoch_{epoch:05d}.pyth"
    return os.path.join(cfg.OUTPUT_DIR, "checkpoints", name)


def last_checkpoint(cfg) -> str | None:
    """The checkpoint of the latest epoch in OUTPUT_DIR; None where there is none."""
    folder = os.path.dirname(checkpoint_path(cfg, 0))
    if not g_pathmgr.isdir(folder):
        return None
    task = re.escape(f"{cfg.TASK}_" if cfg.TASK else "")
    whole = re.compile(rf"{task}checkpoint_epoch_\d+\.pyth")
    names = sorted(name for name in g_pathmgr.ls(folder) if whole.fullmatch(name))
    return os.path.join(folder, names[-1]) if names else None


def starting_point(cfg, model: nn.Module) -> Start:
    """Loads what training starts from into the model.

    The last checkpoint in OUTPUT_DIR with TRAIN.AUTO_RESUME; else TRAIN.CHECKPOINT_FILE_PATH,
    weights alone with TRAIN.CHECKPOINT_EPOCH_RESET; else nothing.

    Raises:
        FileNotFoundError: where a named checkpoint is missing.
        ValueError: where it is not one, or is of another model or another run.
    """
    path = last_checkpoint(cfg) if cfg.TRAIN.AUTO_RESUME else None
    if path:
        checkpoint = read_checkpoint(path)
        loaded = _load(cfg, model, checkpoint, path, "resume")
        if loaded.missing or loaded.unexpected or loaded.mismatched:
            raise ValueError(
                f"{path} is of another model ({loaded}): choose another OUTPUT_DIR, or set "
                "TRAIN.AUTO_RESUME False"
            )
        logger.info("Resuming from %s", path)
        return Start(path, checkpoint)
    path = cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path:
        return Start(
            trained=cfg.TIMESFORMER.PRETRAINED_MODEL != "" and cfg.MODEL.MODEL_NAME == "TimeSformer"
        )
    checkpoint = _clear_names(read_checkpoint(path), cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN)
    _load(cfg, model, checkpoint, path, "finetune")
    if cfg.TRAIN.CHECKPOINT_EPOCH_RESET or "epoch" not in checkpoint:
        return Start(trained=True)
    start = Start(path, checkpoint)
    if start.epoch >= cfg.SOLVER.MAX_EPOCH:
        raise ValueError(
            f"TRAIN.CHECKPOINT_FILE_PATH {path} is after epoch {start.epoch} and SOLVER.MAX_EPOCH "
            f"is {cfg.SOLVER.MAX_EPOCH}: set TRAIN.CHECKPOINT_EPOCH_RESET True to train on from "
            "its weights"
        )
    return start


def load_for_test(cfg, model: nn.Module) -> None:
    """Loads the weights to test into the model, see :func:`test`.

    Raises:
        FileNotFoundError: where a named checkpoint is missing.
        ValueError: where it is not one, or not of the model that the config asks for.
    """
    path = cfg.TEST.CHECKPOINT_FILE_PATH or last_checkpoint(cfg) or cfg.TRAIN.CHECKPOINT_FILE_PATH
    if not path:
        logger.warning("No checkpoint is named or found: testing random weights")
        return
    _load(cfg, model, read_checkpoint(path), path, "test")


def _load(cfg, model: nn.Module, checkpoint: dict, path: str, purpose: str) -> Loaded:
    check(model, checkpoint, cfg, purpose, path)
    try:
        loaded = load_weights(model, checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    logger.info("Loaded %s: %s", path, loaded)
    return loaded


def _clear_names(checkpoint: dict, patterns: Sequence[str]) -> dict:
    """Cuts each pattern out of the parameters' names once, as SlowFast does."""
    state = checkpoint.get("model_state")
    if not patterns or not state:
        return checkpoint
    for pattern in patterns:
        state = {name.replace(pattern, "", 1): value for name, value in state.items()}
    return {**checkpoint, "model_state": state}
