"""Keeps account of the videos that cannot be read, or that are damaged, on all processes."""

import contextlib
import fcntl
import json
import logging
import os
from typing import NamedTuple

import torch
from iopath.common.file_io import g_pathmgr

logger = logging.getLogger(__name__)

FILE = "bad_videos.jsonl"
# The label of a test video that cannot be read: no prediction equals it, so it counts as wrong.
UNREADABLE = -1
CONSEQUENCES = {
    ("unreadable", False): "another one takes its place",
    ("unreadable", True): "it counts as wrong",
    ("damaged", False): "it is used all the same",
    ("damaged", True): "it is used all the same",
}


class VideoIssue(NamedTuple):
    """What a worker found about the video ``index`` of a list: ``kind`` is unreadable (nothing of
    it is used) or damaged (frames are missing, or the decoder made some of them up)."""

    index: int
    path: str
    kind: str
    reason: str


class VideoErrorLog:
    """The findings of one loader. ``OUTPUT_DIR/bad_videos.jsonl`` gets a line for each video and
    kind, whichever process meets it first, also over restarts; each process logs it once."""

    def __init__(self, cfg, split: str):
        self.split, self.folder = split, cfg.OUTPUT_DIR
        self.epoch: dict[tuple[int, str], VideoIssue] = {}
        self._told: set[tuple[str, str]] = set()

    def begin_epoch(self) -> None:
        """Counts anew."""
        self.epoch.clear()

    def add(self, findings: list[VideoIssue], epoch: int | None = 0) -> None:
        for finding in findings:
            self.epoch.setdefault((finding.index, finding.kind), finding)
            key = finding.path, finding.kind
            if key not in self._told:
                self._told.add(key)
                fate = CONSEQUENCES[finding.kind, self.split == "test"]
                logger.warning("%s is %s: %s; %s", *key, finding.reason, fate)
                self._write(finding, epoch)

    def count(self) -> dict[str, int]:
        """``{"unreadable": ..., "damaged": ...}``: videos of this epoch, each counted once over all
        processes. Every process of a group must call it."""
        kinds = [kind for _, kind in self._everywhere()]
        return {kind: kinds.count(kind) for kind in ("unreadable", "damaged")}

    def require_all(self, allow_missing: bool) -> None:
        """Raises ValueError with the list of unreadable videos, unless they are allowed. Every
        process of a group must call it, and all raise."""
        found = self._everywhere().values()
        if not allow_missing:
            missing = {item.path: item.reason for item in found if item.kind == "unreadable"}
            raise_if_unreadable(missing, self.folder)

    def _everywhere(self) -> dict[tuple[int, str], VideoIssue]:
        if not torch.distributed.is_initialized():
            return self.epoch
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.epoch)
        return {key: finding for part in parts for key, finding in part.items()}

    def _write(self, finding: VideoIssue, epoch: int | None) -> None:
        record = {**finding._asdict(), "split": self.split}
        del record["index"]
        if epoch is not None:
            record["epoch"] = epoch + 1
        g_pathmgr.mkdirs(self.folder)
        with g_pathmgr.open(os.path.join(self.folder, FILE), "a+") as file, _locked(file):
            if (finding.path, finding.kind) not in _records(file):
                file.write(json.dumps(record) + "\n")
                file.flush()


def read_log(folder: str, kind: str) -> dict[str, str]:
    """The videos of a kind that the processes of a run have written down, each with its reason."""
    path = os.path.join(folder, FILE)
    if not g_pathmgr.exists(path):
        return {}
    with g_pathmgr.open(path) as file:
        return {path: reason for (path, its), reason in _records(file).items() if its == kind}


def _records(file) -> dict[tuple[str, str], str]:
    file.seek(0)
    found = {}
    for line in file:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed process's half line
            record = json.loads(line)
            found[record["path"], record["kind"]] = record["reason"]
    return found


def raise_if_unreadable(missing: dict[str, str], folder: str) -> None:
    """Raises ValueError with the list where test videos are missing; ``missing`` has reasons."""
    if missing:
        lines = [f"\n  {path}: {reason}" for path, reason in sorted(missing.items())[:20]]
        more = f"\n  and {len(missing) - 20} more" if len(missing) > 20 else ""
        raise ValueError(
            f"{len(missing)} of the test videos cannot be read, so the accuracy is not that "
            f"of the list. Mend them, or set TEST.ALLOW_MISSING True to count them as wrong "
            f"(all are in {os.path.join(folder, FILE)}):{''.join(lines)}{more}"
        )


@contextlib.contextmanager
def _locked(file):
    """Processes of a run write one after the other, where the file system has locks."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file lets go


def exceeds_limit(bad: int, seen: int, total: int, limit: float) -> bool:
    """Whether more than the share ``limit`` of a list's ``total`` videos is bad, as far as is
    known: for certain by counting, or beyond doubt by the ``seen`` ones (four standard deviations
    of a share), so that no run ends because it happened to meet its bad videos first."""
    return bad > limit * total or bad / seen - 2 / seen**0.5 > limit
