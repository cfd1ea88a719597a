"""The log of unreadable and damaged videos over all processes, for both engines."""

import contextlib
import fcntl
import json
import logging
import os
from typing import NamedTuple

import torch
from iopath.common.file_io import g_pathmgr

logger = logging.getLogger(__name__)

FILE_NAME = "bad_videos.jsonl"
# The label of a test video that cannot be read: no prediction equals it, so it counts as wrong.
UNREADABLE = -1
CONSEQUENCES = {
    ("unreadable", False): "another one replaces it",
    ("unreadable", True): "it counts as wrong",
    ("damaged", False): "it is still used",
    ("damaged", True): "it is still used",
}


class VideoIssue(NamedTuple):
    """A problem of the video ``index`` of a list: ``kind`` is unreadable (nothing of it is used) or
    damaged (frames are missing, or were decoded with errors)."""

    index: int
    path: str
    kind: str
    reason: str


class VideoErrorLog:
    """The issues of one loader. ``OUTPUT_DIR/bad_videos.jsonl`` has one line for each video and
    kind, over all processes and restarts; each process logs one warning per video and
    kind."""

    def __init__(self, cfg, split: str):
        self.split, self.folder = split, cfg.OUTPUT_DIR
        self.epoch: dict[tuple[int, str], VideoIssue] = {}
        self._logged: set[tuple[str, str]] = set()

    def begin_epoch(self) -> None:
        """Resets the counts."""
        self.epoch.clear()

    def add(self, issues: list[VideoIssue], epoch: int | None = 0) -> None:
        """Counts issues of an epoch (from 0; None: of no epoch), and logs those that are new."""
        for issue in issues:
            self.epoch.setdefault((issue.index, issue.kind), issue)
            key = issue.path, issue.kind
            if key not in self._logged:
                self._logged.add(key)
                consequence = CONSEQUENCES[issue.kind, self.split == "test"]
                logger.warning("%s is %s: %s; %s", *key, issue.reason, consequence)
                self._write(issue, epoch)

    def count(self) -> dict[str, int]:
        """``{"unreadable": ..., "damaged": ...}``: videos of this epoch, each counted once over all
        processes. Every process of a group must call it."""
        found = [kind for _, kind in self._all_ranks()]
        return {kind: found.count(kind) for kind in ("unreadable", "damaged")}

    def require_all(self, allow_missing: bool) -> None:
        """Raises ValueError with the list of unreadable videos, unless they are allowed. Every
        process of a group must call it, and all raise."""
        found = self._all_ranks().values()
        if not allow_missing:
            missing = {item.path: item.reason for item in found if item.kind == "unreadable"}
            raise_if_unreadable(missing, self.folder)

    def _all_ranks(self) -> dict[tuple[int, str], VideoIssue]:
        if not torch.distributed.is_initialized():
            return self.epoch
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.epoch)
        return {key: issue for part in parts for key, issue in part.items()}

    def _write(self, issue: VideoIssue, epoch: int | None) -> None:
        record = {**issue._asdict(), "split": self.split}
        del record["index"]
        if epoch is not None:
            record["epoch"] = epoch + 1
        g_pathmgr.mkdirs(self.folder)
        with g_pathmgr.open(os.path.join(self.folder, FILE_NAME), "a+") as file, _locked(file):
            if (issue.path, issue.kind) not in _records(file):
                file.write(json.dumps(record) + "\n")
                file.flush()


def read_log(folder: str, kind: str) -> dict[str, str]:
    """The videos of a kind in the log of a run, each with its reason."""
    path = os.path.join(folder, FILE_NAME)
    if not g_pathmgr.exists(path):
        return {}
    with g_pathmgr.open(path) as file:
        return {path: reason for (path, found), reason in _records(file).items() if found == kind}


def _records(file) -> dict[tuple[str, str], str]:
    file.seek(0)
    found = {}
    for line in file:
        # A line may be cut off by a killed process.
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            found[record["path"], record["kind"]] = record["reason"]
    return found


def raise_if_unreadable(missing: dict[str, str], folder: str) -> None:
    """Raises ValueError with the list of unreadable test videos, if any: ``{path: reason}``."""
    if missing:
        lines = [f"\n  {path}: {reason}" for path, reason in sorted(missing.items())[:20]]
        more = f"\n  and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise ValueError(
            f"{len(missing)} of the test videos cannot be read, so the result would not "
            f"cover the whole list. Repair them, or set TEST.ALLOW_MISSING True to count them as "
            f"wrong, without labels to leave them out (all are in "
            f"{os.path.join(folder, FILE_NAME)}):{''.join(lines)}{more}"
        )


@contextlib.contextmanager
def _locked(file):
    """Processes of a run write one after the other, if the file system has locks."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file unlocks it


def exceeds_limit(bad: int, seen: int, total: int, limit: float) -> bool:
    """Whether more than the share ``limit`` of a list's ``total`` videos is bad: counted over
    the list, or significant (four standard deviations) among the ``seen`` videos read so far, so
    that no run ends because it happened to read its bad videos first."""
    return bad > limit * total or bad / seen - 2 / seen**0.5 > limit
