"""Keeps account of the videos that cannot be read, or that are damaged, on all processes."""

import contextlib
import fcntl
import json
import logging
import os
from typing import NamedTuple

import torch
from iopath.common.file_io import g_pathmgr

__all__ = ["FILE", "BadVideos", "Finding", "too_many"]

logger = logging.getLogger(__name__)

FILE = "bad_videos.jsonl"
FATES = {
    ("unreadable", False): "another one takes its place",
    ("unreadable", True): "it counts as wrong",
    ("damaged", False): "it is used all the same",
    ("damaged", True): "it is used all the same",
}


class Finding(NamedTuple):
    """What a worker found about the video ``index`` of a list: ``kind`` is unreadable (nothing of
    it is used) or damaged (frames are missing, or the decoder made some of them up)."""

    index: int
    path: str
    kind: str
    reason: str


class BadVideos:
    """The findings of one loader. ``OUTPUT_DIR/bad_videos.jsonl`` gets a line for each video and
    kind, whichever process meets it first, also over restarts; each process logs it once."""

    def __init__(self, cfg, split: str):
        self.split, self.folder = split, cfg.OUTPUT_DIR
        self.epoch: dict[tuple[int, str], Finding] = {}
        self._told: set[tuple[str, str]] = set()

    def begin_epoch(self) -> None:
        """Counts anew."""
        self.epoch.clear()

    def add(self, findings: list[Finding], epoch: int = 0) -> None:
        for finding in findings:
            self.epoch.setdefault((finding.index, finding.kind), finding)
            key = finding.path, finding.kind
            if key not in self._told:
                self._told.add(key)
                fate = FATES[finding.kind, self.split == "test"]
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
        missing = sorted(item[1:] for item in found if item.kind == "unreadable")
        if missing and not allow_missing:
            lines = [f"\n  {path}: {reason}" for path, _, reason in missing[:20]]
            more = f"\n  and {len(missing) - 20} more" if len(missing) > 20 else ""
            raise ValueError(
                f"{len(missing)} of the test videos cannot be read, so the accuracy is not that "
                f"of the list. Mend them, or set TEST.ALLOW_MISSING True to count them as wrong "
                f"(all are in {os.path.join(self.folder, FILE)}):{''.join(lines)}{more}"
            )

    def _everywhere(self) -> dict[tuple[int, str], Finding]:
        if not torch.distributed.is_initialized():
            return self.epoch
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, self.epoch)
        return {key: finding for part in parts for key, finding in part.items()}

    def _write(self, finding: Finding, epoch: int) -> None:
        record = {**finding._asdict(), "split": self.split, "epoch": epoch + 1}
        del record["index"]
        g_pathmgr.mkdirs(self.folder)
        with g_pathmgr.open(os.path.join(self.folder, FILE), "a+") as file, _locked(file):
            file.seek(0)
            known = (_key(line) for line in file)
            if (finding.path, finding.kind) not in known:
                file.write(json.dumps(record) + "\n")
                file.flush()


def _key(line: str) -> tuple[str, str] | None:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        record = json.loads(line)
        return record["path"], record["kind"]
    return None  # a line that a killed process left unfinished


@contextlib.contextmanager
def _locked(file):
    """Processes of a run write one after the other, where the file system has locks."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fcntl.flock(file, fcntl.LOCK_EX)
    yield  # closing the file lets go


def too_many(bad: int, seen: int, total: int, limit: float) -> bool:
    """Whether more than the share ``limit`` of a list's ``total`` videos is bad, as far as is
    known: for certain by counting, or beyond doubt by the ``seen`` ones (four standard deviations
    of a share), so that no run ends because it happened to meet its bad videos first."""
    return bad > limit * total or bad / seen - 2 / seen**0.5 > limit
