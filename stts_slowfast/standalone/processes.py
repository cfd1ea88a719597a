"""The processes of a run: one for each GPU of each machine, and how a run in them ends."""

import logging
import re
import time
from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment

from stts_slowfast.standalone.defaults import check_supported
from stts_slowfast.standalone.report import log_to

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the text says where it goes on, ``status`` for exit."""

    status = 130


class Shards(LightningEnvironment):
    """Which process this is: NUM_SHARDS machines with NUM_GPUS processes each (one on the CPU)."""

    def __init__(self, cfg, init_method: str, local_rank: int = 0):
        super().__init__()
        match = re.fullmatch(r"tcp://(.+):(\d+)", init_method)
        if match is None:
            raise ValueError(f"--init_method is {init_method!r}: give tcp://host:port of shard 0")
        self._host, self._port = match.group(1), int(match.group(2))
        self._local_rank, self._shard = local_rank, cfg.SHARD_ID
        self.local_world = max(cfg.NUM_GPUS, 1)
        self.processes = self.local_world * cfg.NUM_SHARDS
        self.set_global_rank(cfg.SHARD_ID * self.local_world + local_rank)
        self.set_world_size(self.processes)

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self._host

    @property
    def main_port(self) -> int:
        return self._port

    def local_rank(self) -> int:
        return self._local_rank

    def node_rank(self) -> int:
        return self._shard


def launch(job: Callable[..., dict], cfg, init_method: str, callbacks: Sequence[Callback]) -> dict:
    """Runs a job in this process, or in a process for each GPU of this machine."""
    cfg = cfg.clone()
    cfg.defrost()
    check_machine(cfg)
    if cfg.NUM_GPUS <= 1:
        return _work(0, job, cfg, init_method, callbacks)
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    arguments = (job, cfg, init_method, callbacks, results)
    # When one process fails PyTorch ends the others, and would tell of each.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        torch.multiprocessing.spawn(_spawned, arguments, nprocs=cfg.NUM_GPUS)
    except torch.multiprocessing.ProcessRaisedException as raised:
        if results.empty():
            raise
        raise results.get() from raised  # the error itself, so that it can be told from others
    return results.get()


def _spawned(local_rank: int, job, cfg, init_method: str, callbacks, results) -> None:
    try:
        result = _work(local_rank, job, cfg, init_method, callbacks)
    except Exception as error:
        results.put(error)
        raise
    if local_rank == 0:
        results.put(result)


def _work(local_rank: int, job, cfg, init_method: str, callbacks: Sequence[Callback]) -> dict:
    environment = Shards(cfg, init_method, local_rank)
    with log_to(cfg.OUTPUT_DIR, main=environment.global_rank() == 0):
        start = time.perf_counter()
        result = job(cfg, environment, callbacks)
        logger.info("done in %.1f s", time.perf_counter() - start)
        return result


def check_machine(cfg) -> None:
    """Raises ``ValueError`` for what no run on this machine can do."""
    check_supported(cfg)
    for key in ("LOG_PERIOD", "NUM_SHARDS"):
        if cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]}: it must be at least 1")
    for key in ("EVAL_PERIOD", "CHECKPOINT_PERIOD"):
        if cfg.TRAIN[key] < 1:
            raise ValueError(f"TRAIN.{key} is {cfg.TRAIN[key]}: it must be at least 1")
    if cfg.AUG.NUM_SAMPLE < 1:
        raise ValueError(f"AUG.NUM_SAMPLE is {cfg.AUG.NUM_SAMPLE}: it must be at least 1")
    for key in ("SAMPLING_RATE", "TARGET_FPS"):
        if cfg.DATA[key] <= 0:
            raise ValueError(f"DATA.{key} is {cfg.DATA[key]}: it must be above 0")
    if len(cfg.DATA.TRAIN_JITTER_SCALES) != 2:
        raise ValueError(
            f"DATA.TRAIN_JITTER_SCALES is {cfg.DATA.TRAIN_JITTER_SCALES}: give the range's two ends"
        )
    if not 0 <= cfg.SHARD_ID < cfg.NUM_SHARDS:
        raise ValueError(
            f"SHARD_ID is {cfg.SHARD_ID} but NUM_SHARDS is {cfg.NUM_SHARDS}: shards count from 0"
        )
    gpus = torch.cuda.device_count()
    if gpus < cfg.NUM_GPUS:
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS} but this machine has {gpus}: lower it; 0 uses the CPU"
        )
