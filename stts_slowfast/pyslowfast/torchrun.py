"""torchrun's processes as SlowFast counts them: GPUs of a machine, and machines (shards).

SlowFast starts its own processes and ignores torchrun's, each of which would be a whole run.
``TRAIN.BATCH_SIZE`` is that of a machine, as without torchrun.
"""

import os
from typing import NamedTuple

from stts_slowfast.pyslowfast import compat

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Process(NamedTuple):
    """A process of torchrun: its rank among all, and among those of its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def num_shards(self) -> int:
        return self.world_size // self.local_world_size

    @property
    def shard_id(self) -> int:
        return self.rank // self.local_world_size


def current_process() -> Process | None:
    """This process, from torchrun's environment variables; None without torchrun, or if single."""
    if any(name not in os.environ for name in VARIABLES):
        return None
    process = Process(*(int(os.environ[name]) for name in VARIABLES))
    return process if process.world_size > 1 else None


def set_shards(cfg) -> None:
    """Sets NUM_SHARDS and SHARD_ID, by which SlowFast scales the learning rate, to torchrun's
    machines; a config that :func:`check_process_counts` refuses stays as it is."""
    process = current_process()
    if process and compat.uses_stts(cfg) and cfg.NUM_SHARDS == 1 and _fits_num_gpus(cfg, process):
        cfg.NUM_SHARDS, cfg.SHARD_ID = process.num_shards, process.shard_id


def check_process_counts(cfg, process: Process) -> None:
    """Refuses a config whose number of processes is not torchrun's.

    Raises:
        ValueError: naming the key and what would be right.
    """
    if process.world_size % process.local_world_size:
        raise ValueError(
            f"torchrun started {process.world_size} processes, {process.local_world_size} of them "
            "here: SlowFast needs the same number on every machine"
        )
    if not _fits_num_gpus(cfg, process):
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS}, but torchrun started {process.local_world_size} "
            "processes on this machine, one for each GPU: set NUM_GPUS "
            f"{process.local_world_size} (0 for the CPU), or start one process a machine without "
            "torchrun: SlowFast starts the others itself"
        )
    shards = process.num_shards, process.shard_id
    if (cfg.NUM_SHARDS, cfg.SHARD_ID) not in ((1, 0), shards):
        raise ValueError(
            f"--num_shards is {cfg.NUM_SHARDS} and --shard_id {cfg.SHARD_ID}, but torchrun started "
            f"processes on {process.num_shards} machines: leave both out"
        )


def _fits_num_gpus(cfg, process: Process) -> bool:
    return cfg.NUM_GPUS in (0, process.local_world_size)
