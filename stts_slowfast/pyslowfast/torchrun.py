"""Processes that torchrun started, as SlowFast counts them: GPUs of a machine, and shards.

SlowFast starts its own processes and does not look at torchrun's, of which each would be a whole
run. ``TRAIN.BATCH_SIZE`` is that of a machine, as it is without torchrun.
"""

import os
from typing import NamedTuple

from stts_slowfast.pyslowfast import compat

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Process(NamedTuple):
    """Which of torchrun's processes this is: among all, and among those of its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def shards(self) -> int:
        return self.world // self.local_world

    @property
    def shard(self) -> int:
        return self.rank // self.local_world


def process() -> Process | None:
    """What torchrun says of this process; None if it started no other, or not this one."""
    if any(name not in os.environ for name in NAMES):
        return None
    found = Process(*(int(os.environ[name]) for name in NAMES))
    return found if found.world > 1 else None


def count_machines(cfg) -> None:
    """Sets NUM_SHARDS and SHARD_ID to torchrun's machines, by which SlowFast scales the learning
    rate, in a config that :func:`check` would accept."""
    found = process()
    if found and compat.asks_for_us(cfg) and cfg.NUM_SHARDS == 1 and _fits(cfg, found):
        cfg.NUM_SHARDS, cfg.SHARD_ID = found.shards, found.shard


def check(cfg, found: Process) -> None:
    """Refuses a config that says otherwise than torchrun how many processes there are.

    Raises:
        ValueError: naming the key and what would be right.
    """
    if found.world % found.local_world:
        raise ValueError(
            f"torchrun started {found.world} processes, {found.local_world} of them here: SlowFast "
            "needs as many on every machine"
        )
    if not _fits(cfg, found):
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS}, but torchrun started {found.local_world} processes on "
            f"this machine, and each GPU has one: set NUM_GPUS {found.local_world} (0 for the "
            "CPU), or start one process a machine without torchrun, for which SlowFast starts the "
            "others itself"
        )
    if (cfg.NUM_SHARDS, cfg.SHARD_ID) not in ((1, 0), (found.shards, found.shard)):
        raise ValueError(
            f"--num_shards is {cfg.NUM_SHARDS} and --shard_id {cfg.SHARD_ID}, but torchrun started "
            f"processes on {found.shards} machines: leave both out"
        )


def _fits(cfg, found: Process) -> bool:
    return cfg.NUM_GPUS in (0, found.local_world)
