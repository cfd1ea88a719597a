"""Training and testing on Lightning Fabric, by SlowFast's rules: ``train(cfg)`` and ``test(cfg)``.

Fabric provides devices, autocast and DDP. Schedule, checkpoints and log lines are SlowFast's, so
that files of either engine can be used in the other.
"""

import contextlib
import logging

import torch
from torch import nn

from stts_slowfast.annealing import reset
from stts_slowfast.evaluation import evaluating, log_strict_float32
from stts_slowfast.standalone import checkpointing, optim, run_logger
from stts_slowfast.standalone.cluster import INIT_METHOD
from stts_slowfast.standalone.evaluator import run_test
from stts_slowfast.standalone.fabric import Fabric, seed_everything
from stts_slowfast.standalone.fabric import __version__ as fabric_version
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.launch import launch
from stts_slowfast.standalone.model import build_model
from stts_slowfast.standalone.run_logger import BatchCallback, RunLogger
from stts_slowfast.standalone.signals import Interrupted, SignalState
from stts_slowfast.standalone.training_loop import TrainingLoop
from stts_slowfast.standalone.value_ranges import check_solver

logger = logging.getLogger(__name__)

# --- the two jobs -------------------------------------------------------------------------------


def train(
    cfg,
    init_method: str = INIT_METHOD,
    processes: int | None = None,
    watch: BatchCallback | None = None,
    strict_resume: bool = False,
) -> dict:
    """Trains the model of a config, from the last checkpoint in OUTPUT_DIR if there is one.

    Args:
        cfg: from ``load_config``; it is not changed.
        init_method: ``tcp://host:port`` of shard 0, if there are several machines.
        processes: on this machine; NUM_GPUS by default. torchrun and Slurm come first.
        watch: called after each batch, see ``BatchCallback``.
        strict_resume: raise if the last checkpoint is corrupt; else the one before is used.

    Returns:
        ``checkpoint``, the path of the last one; ``top1_err`` and ``top5_err`` of the last
        validation in percent; ``gflops`` of one clip (None unless LOG_MODEL_INFO), ``params``.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM.
    """
    try:
        options = {"watch": watch, "strict": strict_resume}
        return launch(_train, cfg, init_method, processes, **options)
    except KeyboardInterrupt as stop:
        last = checkpointing.last_checkpoint(cfg) if cfg.TRAIN.AUTO_RESUME else None
        resumes = f"resumes from {last}" if last else "starts again: there is no checkpoint yet"
        interrupted = Interrupted(f"interrupted; the same command {resumes}")
        interrupted.status = getattr(stop, "status", Interrupted.status)
        raise interrupted from None


def test(
    cfg,
    init_method: str = INIT_METHOD,
    processes: int | None = None,
    watch: BatchCallback | None = None,
    strict_resume: bool = False,
) -> dict:
    """Tests with TEST.NUM_ENSEMBLE_VIEWS x TEST.NUM_SPATIAL_CROPS views of every video.

    Args:
        cfg, init_method, processes, watch, strict_resume: see :func:`train`. The weights are
            TEST.CHECKPOINT_FILE_PATH, else the last checkpoint in OUTPUT_DIR, else
            TRAIN.CHECKPOINT_FILE_PATH.

    Returns:
        ``top1_acc`` and ``top5_acc`` in percent, ``num_videos``, ``num_views``, ``clips_per_s``
        through the model only, ``gflops`` of one clip (None unless LOG_MODEL_INFO), ``params``.
        If several numbers of clips are tested, of the last one.

    Raises:
        ValueError, FileNotFoundError: for a config, data or checkpoint that cannot be used.
    """
    return launch(_test, cfg, init_method, processes, watch=watch, strict=strict_resume)


def _train(
    cfg, fabric: Fabric, signals: SignalState, watch: BatchCallback | None, strict: bool
) -> dict:
    check_solver(cfg)
    optim.scale_lr_by_shards(cfg)
    seed_everything(cfg.RNG_SEED, verbose=False)
    _log_environment(cfg, fabric, "Training")
    if fabric.is_global_zero:
        checkpointing.remove_unfinished(cfg)
    model = build_model(cfg)
    reset(model)
    start = checkpointing.load_initial_state(cfg, model, strict)
    facts = _model_facts(cfg, fabric, model, cfg.DATA.TRAIN_CROP_SIZE)
    with RunLogger(cfg, fabric.is_global_zero, tensorboard=True) as run_log:
        training = TrainingLoop(cfg, fabric, model, start, run_log, signals, watch)
        with contextlib.closing(training):
            signals.deferred = True
            if start.epoch == cfg.SOLVER.MAX_EPOCH:
                logger.info("All %d epochs are done: only validating", start.epoch)
                training.validate(start.epoch - 1)
            for epoch in range(start.epoch, cfg.SOLVER.MAX_EPOCH):
                training.train_epoch(epoch, start.iteration if epoch == start.epoch else 0)
            signals.deferred = False
    if fabric.is_global_zero:
        run_logger.record_run(cfg, facts, {"train": training.errors})
    return {"checkpoint": training.last_checkpoint, **training.errors, **facts}


def _test(
    cfg, fabric: Fabric, signals: SignalState, watch: BatchCallback | None, strict: bool
) -> dict:
    seed_everything(cfg.RNG_SEED, verbose=False)
    _log_environment(cfg, fabric, "Testing")
    model = build_model(cfg)
    checkpointing.load_for_test(cfg, model, strict)
    facts = _model_facts(cfg, fabric, model, cfg.DATA.TEST_CROP_SIZE)
    fabric.to_device(model).eval()
    run_log = RunLogger(cfg, fabric.is_global_zero, tensorboard=False)
    with run_log, evaluating(model, cfg.TEST.PRECISION, cfg.TEST.COMPILE):
        result = run_test(cfg, fabric, model, run_log, signals, watch)
    if fabric.is_global_zero:
        run_logger.record_run(cfg, facts, {"test": result})
    return {**result, **facts}


# --- the log's first lines ----------------------------------------------------------------------


def _model_facts(cfg, fabric: Fabric, model: nn.Module, crop_size: int) -> dict:
    """``params``, and ``gflops`` of one clip (of the first process, if LOG_MODEL_INFO)."""
    facts = {"params": sum(p.numel() for p in model.parameters()), "gflops": None}
    logger.info("params: %.2f M", facts["params"] / 1e6)
    if cfg.LOG_MODEL_INFO and fabric.is_global_zero:
        clip = torch.zeros(1, 3, cfg.DATA.NUM_FRAMES, crop_size, crop_size)
        facts["gflops"] = count_gflops(model, clip)
        logger.info("GFLOPs: %.4g per clip", facts["gflops"])
    if fabric.is_global_zero:
        run_logger.record_run(cfg, facts)
    return facts


def _log_environment(cfg, fabric: Fabric, job: str) -> None:
    if cfg.NUM_GPUS:
        device = torch.cuda.get_device_name(fabric.device)
    else:
        device = f"CPU ({torch.get_num_threads()} threads)"
    others = f", {fabric.world_size} processes" if fabric.world_size > 1 else ""
    logger.info("%s with Lightning Fabric %s on %s%s", job, fabric_version, device, others)
    if cfg.NUM_GPUS:
        trains = job == "Training"
        half = cfg.TRAIN.MIXED_PRECISION if trains else cfg.TEST.PRECISION != "float32"
        log_strict_float32(trains, half)
