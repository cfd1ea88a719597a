"""The processes of a run: their ranks, how they were launched, and a watchdog between them.

A run is one process, several that this command starts, or processes that torchrun, Slurm or
``--num_shards`` and ``--shard_id`` place on one or more machines.
"""

import contextlib
import os
import re
import select
import socket
import threading
from dataclasses import dataclass

import torch

from stts_slowfast.standalone.fabric import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from stts_slowfast.standalone.signals import hard_exit

INIT_METHOD = "tcp://localhost:9999"
CONNECT_TIMEOUT = 60.0  # seconds in which the processes of a run must connect to the first


@dataclass
class ProcessInfo(ClusterEnvironment):
    """One process of a run. Fabric sees each process as a separate machine with one device.

    Attributes:
        rank, world: global rank and number of processes.
        local_index, local_world: the same among the processes of this machine.
        host, port: the rendezvous, of rank 0.
        local_rendezvous: the command that starts all processes opens the rendezvous.
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
        """The GPU of this process: by its local rank, or the only one that it sees."""
        return self.local_index if torch.cuda.device_count() > self.local_index else 0


# --- ranks ----------------------------------------------------------------------------------------


def resolve_processes(
    cfg, init_method: str = INIT_METHOD, processes: int | None = None
) -> list[ProcessInfo]:
    """The processes that this one represents: itself, or those that it has to start.

    The environment of torchrun or of Slurm's srun comes first; else there are NUM_SHARDS machines
    with ``processes`` each. ``NUM_SHARDS`` and ``SHARD_ID`` are set to what was found.

    Args:
        cfg: with ``NUM_GPUS``, ``NUM_SHARDS`` and ``SHARD_ID``.
        init_method: ``tcp://host:port`` of shard 0.
        processes: on each machine; ``NUM_GPUS`` by default, and at least 1.

    Raises:
        ValueError: if these contradict each other.
    """
    match = re.fullmatch(r"tcp://(.+):(\d+)", init_method)
    if match is None:
        raise ValueError(f"--init_method is {init_method!r}: give tcp://host:port of shard 0")
    host, port = match.group(1), int(match.group(2))
    launched = _from_torchrun(cfg) or _from_slurm(cfg, init_method)
    if launched is not None and launched.local_world > 1:
        _check_launched(cfg, launched, processes)
        cfg.NUM_SHARDS = launched.world // launched.local_world
        cfg.SHARD_ID = launched.rank // launched.local_world
        return [launched]
    if launched is not None:  # one on each machine, which may start others
        cfg.NUM_SHARDS, cfg.SHARD_ID = launched.world, launched.rank
        host, port = launched.host, launched.port
    if processes and cfg.NUM_GPUS not in (0, processes):
        raise ValueError(
            f"--processes is {processes} and NUM_GPUS is {cfg.NUM_GPUS}: each GPU has one process"
        )
    local = processes or max(cfg.NUM_GPUS, 1)
    local_rendezvous = cfg.NUM_SHARDS == 1 and local > 1 and init_method == INIT_METHOD
    world, first = local * cfg.NUM_SHARDS, local * cfg.SHARD_ID
    return [
        ProcessInfo(first + i, world, i, local, host, port, local_rendezvous) for i in range(local)
    ]


def open_rendezvous(processes: list[ProcessInfo]) -> torch.distributed.TCPStore | None:
    """The rendezvous of processes that are all started here, on a port that stays taken.

    Returns:
        None for processes whose rendezvous is opened by rank 0.
    """
    if not processes[0].local_rendezvous:
        return None
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for process in processes:
        process.port = store.port
    return store


def _from_torchrun(cfg) -> ProcessInfo | None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if any(name not in os.environ for name in names):
        return None
    env, local_world = TorchElasticEnvironment(), int(os.environ["LOCAL_WORLD_SIZE"])
    rank, world = env.global_rank(), env.world_size()
    if world == 1:
        return None
    if cfg.NUM_SHARDS > 1:
        raise ValueError(
            f"torchrun started {world} processes and --num_shards is {cfg.NUM_SHARDS}: "
            "let one of them set the number of processes"
        )
    if local_world == 1 and cfg.NUM_GPUS > 1:
        raise ValueError(
            f"torchrun started 1 process on this machine and NUM_GPUS is {cfg.NUM_GPUS}: "
            f"start {cfg.NUM_GPUS} (--nproc_per_node), or set NUM_GPUS 1"
        )
    return ProcessInfo(rank, world, env.local_rank(), local_world, env.main_address, env.main_port)


def _from_slurm(cfg, init_method: str) -> ProcessInfo | None:
    """A task of srun. --num_shards on the command line comes first; a batch script is not a task
    and has no SLURM_STEP_ID.

    Fabric's SLURMEnvironment refuses ``srun --ntasks`` without ``--ntasks-per-node``, and takes the
    job's nodes for the step's.
    """
    env = os.environ
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or cfg.NUM_SHARDS > 1:
        return None
    world = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if world == 1:
        return None
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    if world % nodes:
        raise ValueError(
            f"Slurm started {world} tasks on {nodes} nodes: start the same number on every "
            "node (--ntasks-per-node)"
        )
    if init_method != INIT_METHOD:
        host, _, port = init_method.removeprefix("tcp://").rpartition(":")
    else:
        names = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
        host = env.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(names)
        port = env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000
    rank, local_index = int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0))
    return ProcessInfo(rank, world, local_index, world // nodes, host, int(port))


def _check_launched(cfg, launched: ProcessInfo, processes: int | None) -> None:
    local = launched.local_world
    for name, number in (("NUM_GPUS", cfg.NUM_GPUS), ("--processes", processes)):
        if number and number != local:
            raise ValueError(
                f"{local} processes were started on this machine and {name} is {number}: they "
                "must be equal" + (", or NUM_GPUS 0 for the CPU" if name == "NUM_GPUS" else "")
            )


def check_gpus(cfg, process: ProcessInfo) -> None:
    """Raises ``ValueError`` if this machine has fewer GPUs than NUM_GPUS asks for."""
    gpus = torch.cuda.device_count()
    one_each = gpus == 1 and "SLURM_STEP_ID" in os.environ  # srun --gpus-per-task 1
    if cfg.NUM_GPUS and gpus < process.local_world and not one_each:
        raise ValueError(
            f"NUM_GPUS is {cfg.NUM_GPUS} but this machine has {gpus}: lower it; 0 uses the CPU"
        )


# --- peers ----------------------------------------------------------------------------------------


class PeerWatchdog:
    """A connection from every process to the first: if one is lost, the others end.

    The kernel closes a connection with its process, however that ends. torchrun's agent watches the
    processes of its own machine only, and a backend notices a lost peer at the next collective.
    """

    def __init__(self, fabric, host: str):
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self._released = False
        listener = socket.create_server(("", 0), backlog=self.world) if self.rank == 0 else None
        port = fabric.broadcast(listener.getsockname()[1] if listener else 0)
        if listener:
            self.peers = self._accept(listener)
        else:
            first = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT)
            first.sendall(self.rank.to_bytes(4, "big"))
            self.peers = {first: 0}
        for peer in self.peers:
            peer.settimeout(None)
        threading.Thread(target=self._watch, daemon=True).start()

    def _accept(self, listener: socket.socket) -> dict[socket.socket, int]:
        peers = {}
        with listener:
            listener.settimeout(CONNECT_TIMEOUT)
            while len(peers) < self.world - 1:
                peer, _ = listener.accept()
                peer.settimeout(CONNECT_TIMEOUT)
                peers[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        return peers

    def _watch(self) -> None:
        waiting = dict(self.peers)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], 1.0)
            if self._released:
                return
            for peer in ready:
                try:
                    received = peer.recv(1)
                except OSError:
                    received = b""
                rank = waiting.pop(peer)
                if not received and not self._released:
                    hard_exit(f"ends because process {rank} of {self.world} has exited", 1)

    def release(self) -> None:
        """Tells the peers that this process ends as it should."""
        self._released = True
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sendall(b".")
                peer.close()
