"""Joins processes to one run that SlowFast would run separately: those of ``--num_shards`` with one
process a machine, and those of torchrun.

SlowFast joins processes only if NUM_GPUS > 1, and its samplers, gradients, metrics and checkpoints
test ``cfg.NUM_GPUS > 1`` for "there are other processes". So in such a run that key holds a
:class:`ForcedMultiProcessCount`.
"""

import atexit
import functools
import logging

import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yacs import config as yacs

from stts_slowfast.pyslowfast import compat, precision, run_state, torchrun
from stts_slowfast.pyslowfast.loops import skip_cuda_synchronize
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import require_hooks

logger = logging.getLogger(__name__)


class ForcedMultiProcessCount(int):
    """``NUM_GPUS`` of 0 or 1 that is greater than 1, in a run of several processes.

    In arithmetic it is the number of processes of this machine: 1 unless torchrun started more.
    Truth, equality and text are those of ``given``, so that ``if cfg.NUM_GPUS:`` still tests for a
    GPU, and checkpoints hold the plain number.
    """

    given: int

    def __new__(cls, given: int, processes: int = 1):
        number = super().__new__(cls, processes)
        number.given = given
        return number

    def __gt__(self, other) -> bool:
        return other == 1 or self.given > other

    def __le__(self, other) -> bool:
        return not self > other

    def __eq__(self, other) -> bool:
        return self.given == other

    def __ne__(self, other) -> bool:
        return self.given != other

    def __hash__(self) -> int:
        return hash(self.given)

    def __bool__(self) -> bool:
        return bool(self.given)

    def __repr__(self) -> str:
        return repr(self.given)

    __str__ = __repr__

    def __reduce__(self):
        return ForcedMultiProcessCount, (self.given, int(self))


# For cfg.dump() in checkpoints.
yacs._VALID_TYPES.add(ForcedMultiProcessCount)
yaml.SafeDumper.add_representer(
    ForcedMultiProcessCount, lambda dumper, n: dumper.represent_int(n.given)
)


def wrap_launch_job(misc) -> None:
    """``slowfast.utils.misc.launch_job``, by which launchers start every job."""
    wrap(misc, "launch_job", _launch_job)


def rank() -> int:
    """The rank of this process in its run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def build_model(build_stock_model, cfg, *args, **kwargs) -> nn.Module:
    """SlowFast's ``build_model``, with DDP also on CPUs, which SlowFast lacks."""
    if not isinstance(cfg.NUM_GPUS, ForcedMultiProcessCount) or cfg.NUM_GPUS:
        return build_stock_model(cfg, *args, **kwargs)
    cpu_cfg = cfg.clone()
    cpu_cfg.NUM_GPUS = 0
    contrastive = cfg.MODEL.MODEL_NAME == "ContrastiveModel"
    unused = cfg.MODEL.DETACH_FINAL_FC or contrastive  # as SlowFast sets it on GPUs
    model = build_stock_model(cpu_cfg, *args, **kwargs)
    return DistributedDataParallel(model, find_unused_parameters=unused)


def _launch_job(launch_job, cfg, init_method, func, daemon=False):
    uses_stts, process = compat.uses_stts(cfg), torchrun.current_process()
    if uses_stts and process:
        torchrun.check_process_counts(cfg, process)
        cfg = cfg.clone()
        cfg.NUM_SHARDS, cfg.SHARD_ID = process.num_shards, process.shard_id
        join_process_group(cfg, "env://", process.local_rank, process.local_world_size)
        return run_job(func, cfg=cfg)
    if uses_stts and cfg.NUM_SHARDS > 1 and cfg.NUM_GPUS <= 1:
        cfg = cfg.clone()
        join_process_group(cfg, init_method)
        return run_job(func, cfg=cfg)
    # A spawned child unpickles run_job, and so loads this package.
    return launch_job(cfg, init_method, functools.partial(run_job, func), daemon)


def run_job(func, cfg):
    """Runs a job of a launcher in this process."""
    compat.report(compat.uses_stts(cfg))
    require_hooks(cfg)
    with run_state.enter_job(cfg, func), precision.job(cfg), skip_cuda_synchronize(cfg):
        return func(cfg=cfg)


def join_process_group(cfg, init_method: str, local_rank: int = 0, processes: int = 1) -> None:
    """Joins the process group, once, and makes NUM_GPUS of the config greater than 1.

    The group stays until the process ends: training and testing use the same processes.

    Args:
        cfg: with NUM_SHARDS and SHARD_ID; changed in place.
        init_method: address of the rendezvous.
        local_rank: of this process on its machine.
        processes: number of processes of this machine.

    Raises:
        ValueError: if SHARD_ID is out of range.
    """
    if not 0 <= cfg.SHARD_ID < cfg.NUM_SHARDS:
        raise ValueError(
            f"--shard_id is {cfg.SHARD_ID}: with --num_shards {cfg.NUM_SHARDS} it is one of 0 to "
            f"{cfg.NUM_SHARDS - 1}"
        )
    if not dist.is_initialized():
        if cfg.NUM_GPUS:
            # A launcher may make only its own GPU visible to each process.
            torch.cuda.set_device(local_rank if torch.cuda.device_count() > local_rank else 0)
        rank, world = cfg.SHARD_ID * processes + local_rank, cfg.NUM_SHARDS * processes
        logger.info("Process %d of %d joins the process group at %s", rank, world, init_method)
        dist.init_process_group(
            backend=cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo",
            init_method=init_method,
            world_size=world,
            rank=rank,
        )
        atexit.register(leave_process_group)
    if cfg.NUM_GPUS <= 1:
        cfg.NUM_GPUS = ForcedMultiProcessCount(cfg.NUM_GPUS, processes)


def leave_process_group() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()
