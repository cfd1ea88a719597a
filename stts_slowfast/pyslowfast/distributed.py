"""``--num_shards`` with one process a machine is one run, for SlowFast joins only if NUM_GPUS > 1;
so are the processes that torchrun started, which SlowFast does not look at.

SlowFast asks ``cfg.NUM_GPUS > 1`` wherever it means "are there other processes?": samplers,
gradients, errors, predictions, checkpoints. So in such a run that key holds :class:`ForcedMultiProcessCount`.
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
from stts_slowfast.pyslowfast.compat.devices import quiet_synchronize
from stts_slowfast.pyslowfast.patching import wrap
from stts_slowfast.pyslowfast.preflight import require_hooks

logger = logging.getLogger(__name__)


class ForcedMultiProcessCount(int):
    """``NUM_GPUS`` of 0 or 1 in a run of several processes: greater than 1 all the same.

    In arithmetic it is the number of processes of this machine, 1 unless torchrun started more. Its
    truth and its equality are those of the number that was given, so that ``if cfg.NUM_GPUS:`` asks
    for a GPU as before.
    """

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


# Checkpoints hold cfg.dump().
yacs._VALID_TYPES.add(ForcedMultiProcessCount)
yaml.SafeDumper.add_representer(
    ForcedMultiProcessCount, lambda dumper, n: dumper.represent_int(n.given)
)


def wrap_launch_job(misc) -> None:
    """``slowfast.utils.misc.launch_job``, through which launchers start every job."""
    wrap(misc, "launch_job", _launch)


def rank() -> int:
    """This process's number among all of a run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def build(build_model, cfg, *args, **kwargs) -> nn.Module:
    """SlowFast's ``build_model``, and DDP on a CPU, which that does not know."""
    if not isinstance(cfg.NUM_GPUS, ForcedMultiProcessCount) or cfg.NUM_GPUS:
        return build_model(cfg, *args, **kwargs)
    alone = cfg.clone()
    alone.NUM_GPUS = 0
    contrastive = cfg.MODEL.MODEL_NAME == "ContrastiveModel"
    unused = cfg.MODEL.DETACH_FINAL_FC or contrastive  # as SlowFast has it on GPUs
    return DistributedDataParallel(
        build_model(alone, *args, **kwargs), find_unused_parameters=unused
    )


def _launch(launch_job, cfg, init_method, func, daemon=False):
    ours, started = compat.asks_for_us(cfg), torchrun.process()
    if ours and started:
        torchrun.check(cfg, started)
        cfg = cfg.clone()
        cfg.NUM_SHARDS, cfg.SHARD_ID = started.shards, started.shard
        join_process_group(cfg, "env://", started.local_rank, started.local_world)
        return run(func, cfg=cfg)
    if ours and cfg.NUM_SHARDS > 1 and cfg.NUM_GPUS <= 1:
        cfg = cfg.clone()
        join_process_group(cfg, init_method)
        return run(func, cfg=cfg)
    # Unpickling it in a child of its own loads this package there.
    return launch_job(cfg, init_method, functools.partial(run, func), daemon)


def run(func, cfg):
    """Runs one of a launcher's jobs, in whichever process."""
    compat.report(compat.asks_for_us(cfg))
    require_hooks(cfg)
    with run_state.started(cfg, func), precision.autocast(cfg), quiet_synchronize(cfg):
        return func(cfg=cfg)


def join_process_group(cfg, init_method: str, local_rank: int = 0, processes: int = 1) -> None:
    """Meets the other processes, once, and makes the config that of a run of several.

    Training, testing and whatever follows happen in the same processes, so the group stays.

    Args:
        cfg: with NUM_SHARDS and SHARD_ID; changed in place.
        init_method: where they meet.
        local_rank: which of its machine's processes this is.
        processes: how many its machine has.

    Raises:
        ValueError: for a shard that the run does not have.
    """
    if not 0 <= cfg.SHARD_ID < cfg.NUM_SHARDS:
        raise ValueError(
            f"--shard_id is {cfg.SHARD_ID}: with --num_shards {cfg.NUM_SHARDS} it is one of 0 to "
            f"{cfg.NUM_SHARDS - 1}"
        )
    if not dist.is_initialized():
        if cfg.NUM_GPUS:
            # A launcher may show each process its own GPU alone.
            torch.cuda.set_device(local_rank if torch.cuda.device_count() > local_rank else 0)
        rank, world = cfg.SHARD_ID * processes + local_rank, cfg.NUM_SHARDS * processes
        logger.info("Process %d of %d meets the others at %s", rank, world, init_method)
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
    if dist.is_initialized():
        dist.destroy_process_group()
