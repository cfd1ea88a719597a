"""Which process of a run this is: alone, one of those that this command starts, or one that
torchrun, Slurm or ``--shard_id`` placed on a machine.
"""

import os
import re
from dataclasses import dataclass

import torch

from stts_slowfast.standalone.fabric import ClusterEnvironment, SLURMEnvironment

INIT_METHOD = "tcp://localhost:9999"


@dataclass
class ProcessInfo(ClusterEnvironment):
    """One process of a run. To Fabric each is a machine of its own, with one device.

    Attributes:
        rank, world: which process this is, of how many.
        local_index, local_world: the same among those of its machine.
        host, port: where all meet; those of rank 0.
        hosted: they meet at the command that starts them all.
    """

    rank: int
    world: int
    local_index: int
    local_world: int
    host: str
    port: int
    local_rendezvous: bool = False

    creates_processes_externally = True

    @property
    def main_address(self) -> str:
        return self.host

    @property
    def main_port(self) -> int:
        return self.port

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self.world

    def global_rank(self) -> int:
        return self.rank

    def node_rank(self) -> int:
        return self.rank

    def local_rank(self) -> int:
        return 0

    def set_world_size(self, size: int) -> None:
        pass

    def set_global_rank(self, rank: int) -> None:
        pass

    @property
    def device_index(self) -> int:
        """Which GPU: its own where it sees all of the machine's, else the only one it sees."""
        return self.local_index if torch.cuda.device_count() > self.local_index else 0


# --- who started what -----------------------------------------------------------------------------


def resolve_processes(
    cfg, init_method: str = INIT_METHOD, processes: int | None = None
) -> list[ProcessInfo]:
    """The processes that this one stands for: itself, or those that it has to start.

    What torchrun or Slurm's srun say in the environment comes first; else there are NUM_SHARDS
    machines with ``processes`` each. ``NUM_SHARDS`` and ``SHARD_ID`` are set to what was found.

    Args:
        cfg: with ``NUM_GPUS``, ``NUM_SHARDS`` and ``SHARD_ID``.
        init_method: ``tcp://host:port`` of shard 0.
        processes: on each machine; ``NUM_GPUS`` by default, and at least 1.

    Raises:
        ValueError: where these contradict each other.
    """
    match = re.fullmatch(r"tcp://(.+):(\d+)", init_method)
    if match is None:
        raise ValueError(f"--init_method is {init_method!r}: give tcp://host:port of shard 0")
    host, port = match.group(1), int(match.group(2))
    started = _by_torchrun(cfg) or _by_slurm(cfg, init_method)
    if started is not None and started.local_world > 1:
        _check_started(cfg, started, processes)
        cfg.NUM_SHARDS = started.world // started.local_world
        cfg.SHARD_ID = started.rank // started.local_world
        return [started]
    if started is not None:  # one on each machine, which may start others
        cfg.NUM_SHARDS, cfg.SHARD_ID = started.world, started.rank
        host, port = started.host, started.port
    if processes and cfg.NUM_GPUS not in (0, processes):
        raise ValueError(
            f"--processes is {processes} and NUM_GPUS is {cfg.NUM_GPUS}: each GPU has one process"
        )
    local = processes or max(cfg.NUM_GPUS, 1)
    hosted = cfg.NUM_SHARDS == 1 and local > 1 and init_method == INIT_METHOD
    world, first = local * cfg.NUM_SHARDS, local * cfg.SHARD_ID
    return [ProcessInfo(first + i, world, i, local, host, port, hosted) for i in range(local)]


def open_rendezvous(places: list[ProcessInfo]) -> torch.distributed.TCPStore | None:
    """Where places meet that are all started here: on a port that is taken from the beginning.
    None for others, which meet at rank 0."""
    if not places[0].local_rendezvous:
        return None
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for place in places:
        place.port = store.port
    return store


def _by_torchrun(cfg) -> ProcessInfo | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    if "MASTER_ADDR" not in os.environ or any(name not in os.environ for name in names):
        return None
    rank, world, local_index, local_world, port = (int(os.environ[name]) for name in names)
    if world == 1:
        return None
    if cfg.NUM_SHARDS > 1:
        raise ValueError(
            f"torchrun started {world} processes and --num_shards is {cfg.NUM_SHARDS}: "
            "let one of them say how many there are"
        )
    if local_world == 1 and cfg.NUM_GPUS > 1:
        raise ValueError(
            f"torchrun started 1 process on this machine and NUM_GPUS is {cfg.NUM_GPUS}: "
            f"start {cfg.NUM_GPUS} (--nproc_per_node), or set NUM_GPUS 1"
        )
    return ProcessInfo(rank, world, local_index, local_world, os.environ["MASTER_ADDR"], port)


def _by_slurm(cfg, init_method: str) -> ProcessInfo | None:
    """What srun says to each task. --num_shards on the command line comes first; a batch script,
    which is no task, has no SLURM_STEP_ID."""
    env = os.environ
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or cfg.NUM_SHARDS > 1:
        return None
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if world == 1:
        return None
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    if world % nodes:
        raise ValueError(
            f"Slurm started {world} tasks on {nodes} nodes: give every node as many "
            "(--ntasks-per-node)"
        )
    if init_method != INIT_METHOD:
        host, _, port = init_method.removeprefix("tcp://").rpartition(":")
    else:
        names = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
        host = env.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(names)
        port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
    local_index = int(env.get("SLURM_LOCALID", 0))
    return ProcessInfo(
        int(env["SLURM_PROCID"]), world, local_index, world // nodes, host, int(port)
    )


def _check_started(cfg, started: ProcessInfo, processes: int | None) -> None:
    local = started.local_world
    for name, number in (("NUM_GPUS", cfg.NUM_GPUS), ("--processes", processes)):
        if number and number != local:
            raise ValueError(
                f"{local} processes were started on this machine and {name} is {number}: "
                "they must be alike" + (", or NUM_GPUS 0 for the CPU" if name == "NUM_GPUS" else "")
            )


def check_gpus(cfg, place: ProcessInfo) -> None:
    """Raises ``ValueError`` where this machine has not the GPUs that NUM_GPUS asks for."""
    gpus = torch.cuda.device_count()
    one_each = gpus == 1 and "SLURM_STEP_ID" in os.environ  # srun --gpus-per-task 1
    if cfg.NUM_GPUS and gpus < place.local_world and not one_each:
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS} but this machine has {gpus}: lower it; 0 uses the CPU"
        )
