"""Names of checkpoint files: SlowFast's after an epoch, our own inside one.

``[TASK_]checkpoint_epoch_00001.pyth`` is written after the first epoch, as by SlowFast;
``[TASK_]within_epoch_00001_iteration_0000010.pyth`` after ten iterations of the second. SlowFast,
which cannot resume inside an epoch, does not take the latter for a checkpoint.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

_NAME = re.compile(
    r"(?:(?P<task>.+)_)?"
    r"(?:checkpoint_epoch_(?P<epoch>\d+)|within_epoch_(?P<within>\d+)_iteration_(?P<iteration>\d+))"
    r"\.pyth"
)


class CheckpointName(NamedTuple):
    """What a file's name says: finished epochs, and iterations of the next one."""

    epoch: int
    iteration: int
    task: str


def checkpoint_name(epoch: int, iteration: int = 0, task: str = "") -> str:
    """The file name of the checkpoint after ``epoch`` epochs and ``iteration`` iterations."""
    name = f"checkpoint_epoch_{epoch:05d}.pyth"
    if iteration:
        name = f"within_epoch_{epoch:05d}_iteration_{iteration:07d}.pyth"
    return f"{task}_{name}" if task else name


def parse_name(name: str) -> CheckpointName | None:
    """The inverse of :func:`checkpoint_name`; None for any other file."""
    if not (match := _NAME.fullmatch(name)):
        return None
    epoch = int(match["epoch"] or match["within"])
    return CheckpointName(epoch, int(match["iteration"] or 0), match["task"] or "")


def latest_first(names: Iterable[str], task: str | None = "", mid_epoch: bool = True) -> list[str]:
    """The names of checkpoints among ``names``, by number.

    Args:
        names: of files in one folder.
        task: that of the checkpoints; None for any.
        mid_epoch: whether to include those inside an epoch.
    """
    found = {name: parsed for name in names if (parsed := parse_name(name))}
    kept = [
        name
        for name, parsed in found.items()
        if task in (None, parsed.task) and (mid_epoch or not parsed.iteration)
    ]
    return sorted(kept, key=lambda name: found[name], reverse=True)


def previous_checkpoint(path: str) -> str | None:
    """The checkpoint after an earlier epoch in the folder of ``path``; None if there is none."""
    folder, name = os.path.split(path)
    parsed = parse_name(name)
    if parsed is None or not os.path.isdir(folder):
        return None
    names = latest_first(os.listdir(folder), parsed.task, mid_epoch=False)
    earlier = (each for each in names if parse_name(each) < parsed)
    return next((os.path.join(folder, each) for each in earlier), None)
