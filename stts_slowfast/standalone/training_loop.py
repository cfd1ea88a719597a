"""The training loop of one process of a run: epochs, steps, validations and checkpoints."""

import logging
import os
import signal
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.evaluation import evaluating
from stts_slowfast.frozen_gradients import turn_on
from stts_slowfast.hooks import nan_flag, raise_on_nan
from stts_slowfast.schedule import Schedule
from stts_slowfast.standalone import checkpointing, optim, run_logger
from stts_slowfast.standalone.data import build_loader, normalize_clips
from stts_slowfast.standalone.fabric import Fabric, seed_everything
from stts_slowfast.standalone.mixup import batch_mixer
from stts_slowfast.standalone.predictions import Predictions
from stts_slowfast.standalone.run_logger import (
    BatchCallback,
    LossMonitor,
    Meter,
    RunLogger,
    Timer,
)
from stts_slowfast.standalone.signals import Interrupted, SignalState
from stts_slowfast.video.accuracy import mixed_topk_errors, topk_errors

logger = logging.getLogger(__name__)


class PendingStep(NamedTuple):
    """A step that was launched.

    Attributes:
        epoch, iteration: from 0.
        exact: the epoch with the fraction that was done before the step.
        clips: of its batch in this process.
        rates: what to log besides.
    """

    epoch: int
    iteration: int
    exact: float
    clips: int
    rates: dict[str, float]


class TrainingLoop:
    """The training of a run in one of its processes.

    Attributes:
        model, network: the model, and the same wrapped by Fabric: under autocast and DDP.
        errors: ``top1_err`` and ``top5_err`` of the last validation.
        last_checkpoint: its path; None if there is none yet.
    """

    def __init__(
        self,
        cfg,
        fabric: Fabric,
        model: nn.Module,
        start: checkpointing.ResumeState,
        run_log: RunLogger,
        signals: SignalState,
        watch: BatchCallback | None,
    ):
        self.cfg, self.fabric, self.model, self.start = cfg, fabric, model, start
        self.run_log, self.signals, self.watch = run_log, signals, watch
        self.train_loader = self._loader("train")
        self.val_loader = self._loader("val")
        self.mixer = batch_mixer(cfg)
        if self.mixer and cfg.MIXUP.PROB and self.train_loader.batch_size * cfg.AUG.NUM_SAMPLE < 2:
            raise ValueError(
                f"MIXUP.ENABLE is True but TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} gives each "
                "process 1 clip, and mixup needs 2: raise it"
            )
        fabric.to_device(model)
        self.optimizer = optim.build_optimizer(model, cfg, start.optimizer_state)
        if start.optimizer_state:
            optim.load_optimizer_state(self.optimizer, start.optimizer_state, start.path)
        self.schedule = Schedule(
            model,
            self.optimizer,
            max_epochs=cfg.SOLVER.MAX_EPOCH,
            pretrained=start.trained,
            base_lr=cfg.SOLVER.BASE_LR,
            seed=cfg.RNG_SEED,
        )
        self.network, self.stepper = fabric.setup(model, self.optimizer)
        if cfg.MODEL.FP16_ALLREDUCE and fabric.world_size > 1:
            self.network._forward_module.register_comm_hook(None, fp16_compress_hook)
        if start.scaler_state:
            fabric.strategy.precision.load_state_dict(start.scaler_state)
        start.optimizer_state = start.scaler_state = None  # memory
        self.losses = LossMonitor(cfg)
        self.pending: deque[tuple[PendingStep, run_logger.HostCopy]] = deque()
        self.validations = checkpointing.past_validations(cfg, start)
        self.last_checkpoint = start.path
        self.mid_epoch_checkpoints = [start.path] if start.iteration else []
        self.saved_at = time.monotonic()
        self.length = len(self.train_loader)
        if start.iteration and start.length != self.length:
            raise ValueError(
                f"{start.path} is {start.iteration} of {start.length} iterations into an epoch, "
                f"which now has {self.length}: set the TRAIN.BATCH_SIZE and the number of "
                "processes that it had, or remove it to resume from the last whole epoch"
            )

    def _loader(self, split: str):
        loader = build_loader(self.cfg, split, self.fabric.global_rank, self.fabric.world_size)
        videos = len(loader.dataset.videos)
        logger.info("%s: %d videos, batches of %d", split, videos, loader.batch_size)
        return loader

    def close(self) -> None:
        """Ends the loaders' workers; a frozen backbone has gradients again."""
        turn_on(self.model)
        self.train_loader.close()
        self.val_loader.close()

    def train_epoch(self, epoch: int, first: int = 0) -> None:
        """Trains from iteration ``first`` on; then writes a checkpoint and validates, if due."""
        totals = self.start.totals if first else ()
        meter = Meter(("loss", "top1_err", "top5_err"), self.cfg.LOG_PERIOD, totals)
        self.timer = timer = Timer()
        self.model.train()
        self.train_loader.set_epoch(epoch)
        if first:
            self.train_loader.skip(first)
        logger.info("Start epoch: %d", epoch + 1)
        batches = self.run_log.progress(self.train_loader, f"epoch {epoch + 1}", self.length, first)
        for iteration, batch in enumerate(timer.timed(batches), first):
            requests = self.step(epoch, iteration, batch, meter)
            if iteration + 1 < self.length:
                self.handle_requests(requests, epoch, iteration + 1, meter)
        stats = {**self.stats, **meter.means(), **self.train_loader.bad.count(), **run_logger.ram()}
        self._log({**stats, "_type": "train_epoch"}, to_file=True)
        epoch += 1
        last = epoch == self.cfg.SOLVER.MAX_EPOCH
        # Before the validation, as in SlowFast.
        if epoch % self.cfg.TRAIN.CHECKPOINT_PERIOD == 0 or last:
            self.save(epoch)
        self.handle_requests(requests, epoch, 0, meter)
        if epoch % self.cfg.TRAIN.EVAL_PERIOD == 0 or last:
            self.validate(epoch - 1)

    def step(self, epoch: int, iteration: int, batch, meter: Meter) -> list[bool]:
        """One iteration; returns whether any process has a request for a checkpoint, and to end."""
        # Each has its own seed: a resumed run draws the numbers of an uninterrupted one.
        seed = iteration_seed(self.cfg.RNG_SEED, epoch, iteration, self.fabric.global_rank)
        seed_everything(seed, verbose=False)
        exact = epoch + iteration / self.length
        lr = optim.lr_at(exact, self.cfg)
        optim.set_lr(self.optimizer, lr)
        rates = self.schedule.step(exact)
        batch = self.fabric.to_device(batch)
        clips, labels = normalize_clips(batch[0], self.cfg), batch[1]
        if self.mixer is not None:
            clips, labels = self.mixer(clips, labels)
        self.stepper.zero_grad()
        logits = self.network(clips)
        # Labels: (B,) classes, or (B, classes) probabilities.
        loss = F.cross_entropy(logits, labels)
        self.fabric.backward(loss)
        grad_norm = self.clip_gradients()
        self.stepper.step()

        stats = [loss.detach(), grad_norm, *mixed_topk_errors(logits.detach(), labels)]
        stats += [torch.full_like(stats[0], flag) for flag in self._pending_requests()]
        nan = nan_flag(self.model)
        stats.append(torch.zeros_like(stats[0]) if nan is None else nan)
        stats = self.fabric.all_reduce(torch.stack([x.float() for x in stats]))
        step = PendingStep(epoch, iteration, exact, len(clips), {"lr": lr, **rates})
        self.pending.append((step, run_logger.HostCopy(stats)))
        # A device is a step ahead of what is read of it, so that it never waits for the host.
        logs = (iteration + 1) % self.cfg.LOG_PERIOD == 0 or iteration + 1 == self.length
        requests = self._read_steps(meter, 0 if logs or not stats.is_cuda else 1)
        if self.watch:
            self.watch("train", self.model, batch)
        return requests

    def _read_steps(self, meter: Meter, ahead: int = 0) -> list[bool]:
        """Reads and logs the numbers of all but the last ``ahead`` steps; returns whether any
        process had a request in them for a checkpoint, and to end."""
        requests = [False, False]
        while len(self.pending) > ahead:
            step, stats = self.pending.popleft()
            loss, grad_norm, top1, top5, *flags, nan = stats.read()[0].tolist()
            self.timer.toc()
            if nan:
                raise_on_nan(self.model)  # which names the selector; the loss would not
            self.losses.check(loss, grad_norm, step.exact)
            meter.add((loss, top1, top5), step.clips)
            self._log_step(step, grad_norm, meter)
            requests = [before or flag > 0 for before, flag in zip(requests, flags)]
        return requests

    def clip_gradients(self) -> Tensor:
        """Clips by SOLVER.CLIP_GRAD_*; returns the norm of all gradients before."""
        limit = self.cfg.SOLVER.CLIP_GRAD_L2NORM
        if self.cfg.SOLVER.CLIP_GRAD_VAL or not limit:
            limit = float("inf")
        arguments = {"max_norm": limit, "error_if_nonfinite": False}
        norm = self.fabric.clip_gradients(self.network, self.stepper, **arguments)
        if self.cfg.SOLVER.CLIP_GRAD_VAL:
            nn.utils.clip_grad_value_(self.model.parameters(), self.cfg.SOLVER.CLIP_GRAD_VAL)
        return norm

    def _pending_requests(self) -> tuple[bool, bool]:
        """Whether this process has a request for a checkpoint, by time or signal, and to end."""
        minutes = self.cfg.TRAIN.CHECKPOINT_EVERY_MINUTES
        due = minutes > 0 and time.monotonic() - self.saved_at >= 60.0 * minutes
        return due or self.signals.save, bool(self.signals.number)

    def handle_requests(
        self, requests: list[bool], epoch: int, iteration: int, meter: Meter
    ) -> None:
        """Writes a checkpoint inside an epoch and ends, if requested: all processes of a run after
        the same step.

        Raises:
            Interrupted: if the run is to end.
        """
        save, end = requests
        if save or end:
            self._read_steps(meter)  # their requests are handled now
            self.signals.save, self.saved_at = False, time.monotonic()
            if iteration:
                self.save(epoch, iteration, meter)
        if end:
            interrupted = Interrupted(number=self.signals.number or signal.SIGTERM)
            interrupted.agreed = True
            raise interrupted

    def save(self, epoch: int, iteration: int = 0, meter: Meter | None = None) -> None:
        """Writes the checkpoint after ``epoch`` epochs, and iterations of the next one."""
        path = checkpointing.checkpoint_path(self.cfg, epoch, iteration)
        self.last_checkpoint, self.saved_at = path, time.monotonic()
        if not self.fabric.is_global_zero:
            return
        g_pathmgr.mkdirs(os.path.dirname(path))
        state = optim.optimizer_state(self.optimizer, self.model)
        scaler = self.fabric.strategy.precision.state_dict() or None
        extra = {}
        if iteration:
            position = {"iteration": iteration, "length": self.length, "totals": meter.totals}
            extra = {"within_epoch": position}
        save_checkpoint(path, self.model, self.cfg, epoch - 1, state, scaler, extra)
        logger.info("Wrote %s", path)
        self.mid_epoch_checkpoints += [path] if iteration else []
        # The one before is kept, should the last be damaged.
        for old in self.mid_epoch_checkpoints[: -2 if iteration else None]:
            if old != path and g_pathmgr.exists(old):
                g_pathmgr.rm(old)
        del self.mid_epoch_checkpoints[: -2 if iteration else None]

    def validate(self, epoch: int) -> None:
        """Validates after ``epoch``, each process its share of the videos."""
        test = self.cfg.TEST
        with torch.no_grad(), evaluating(self.model, test.PRECISION, test.COMPILE):
            self._validate(epoch)

    def _validate(self, epoch: int) -> None:
        meter, timer = Meter(("top1_err", "top5_err"), self.cfg.LOG_PERIOD), Timer()
        self.model.eval()
        self.val_loader.set_epoch(epoch)
        start, length = time.perf_counter(), len(self.val_loader)
        read = lambda logits, labels: torch.stack(topk_errors(logits, labels))  # noqa: E731
        predictions = Predictions(self.model, self.cfg, self.val_loader.dataset.videos, read)
        batches = self.run_log.progress(self.val_loader, "validation", length)
        for iteration, batch in enumerate(timer.timed(batches)):
            self.signals.check()
            numbers, batch = batch[2], self.fabric.to_device(batch)
            predictions.add(*batch[:2], numbers)
            if not iteration:
                self.run_log.add_figure(self.cfg, self.model, batch[0], epoch)
            logs = (iteration + 1) % self.cfg.LOG_PERIOD == 0
            for errors, numbers in predictions.read(is_last=logs or iteration + 1 == length):
                meter.add(errors.tolist(), len(numbers))
            timer.toc()
            if logs:
                stats = {
                    "_type": "val_iter",
                    "epoch": f"{epoch + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
                    "iter": f"{iteration + 1}/{length}",
                    "time_diff": timer.stats()["dt"],
                    "eta": timer.eta(length - iteration - 1),
                    **meter.medians(),
                    **run_logger.memory(),
                }
                self._log(stats)
            if self.watch:
                self.watch("val", self.model, batch)
        totals = torch.tensor(meter.totals, device=self.fabric.device)
        meter.totals = self.fabric.all_reduce(totals, reduce_op="sum").tolist()
        self.errors = meter.means()
        self.validations[epoch] = self.errors
        if self.fabric.is_global_zero:
            checkpointing.write_validations(self.cfg, self.validations)
        lowest = {
            f"min_{key}": min(past[key] for past in self.validations.values())
            for key in self.errors
        }
        stats = {
            "_type": "val_epoch",
            "epoch": f"{epoch + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
            "time_diff": time.perf_counter() - start,
            **self.errors,
            **lowest,
            **self.val_loader.bad.count(),
            **run_logger.memory(),
            **run_logger.ram(),
        }
        self._log(stats, to_file=True)
        scalars = {f"Val/{key.capitalize()}": value for key, value in self.errors.items()}
        self.run_log.add_scalars(scalars, epoch)

    def _log_step(self, step: PendingStep, grad_norm: float, meter: Meter) -> None:
        epoch, iteration, rates = step.epoch, step.iteration, step.rates
        left = (self.cfg.SOLVER.MAX_EPOCH - epoch) * self.length - iteration - 1
        self.stats = {
            "epoch": f"{epoch + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
            **self.timer.stats(),
            "eta": self.timer.eta(left),
            "grad_norm": grad_norm,
            **rates,
            **run_logger.memory(),
        }
        if (iteration + 1) % self.cfg.LOG_PERIOD == 0:
            # SlowFast's type really ends in an underscore.
            position = {"_type": "train_iter_", "iter": f"{iteration + 1}/{self.length}"}
            self._log({**self.stats, **meter.medians(), **position})
        loss, top1, top5 = meter.window[-1]
        scalars = {"loss": loss, "Top1_err": top1, "Top5_err": top5, **rates}
        scalars = {f"Train/{key}": value for key, value in scalars.items()}
        self.run_log.add_scalars(scalars, self.length * epoch + iteration)

    def _log(self, stats: dict, to_file: bool = False) -> None:
        if self.fabric.is_global_zero:
            run_logger.log_json_stats(stats, self.cfg.OUTPUT_DIR if to_file else None)


def iteration_seed(*numbers: int) -> int:
    """A seed that depends on all numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
