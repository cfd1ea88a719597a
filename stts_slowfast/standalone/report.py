"""What a run tells: SlowFast's ``json_stats`` lines, ``stdout.log`` and TensorBoard."""

import contextlib
import datetime
import decimal
import logging
import math
import os
import statistics
import sys
import time
from collections import deque

import simplejson
import torch
from iopath.common.file_io import g_pathmgr
from lightning.pytorch.callbacks import Callback

logger = logging.getLogger(__name__)

_FORMAT = "[%(asctime)s][%(levelname)s] %(filename)s: %(lineno)4d: %(message)s"


class _Stdout(logging.Handler):
    """Prints to what ``sys.stdout`` is at that moment: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


@contextlib.contextmanager
def log_to(output_dir: str, main: bool):
    """Logs this package's lines to stdout and ``OUTPUT_DIR/stdout.log`` while it is open.

    Args:
        output_dir: made where it is missing.
        main: whether this process may speak; the others log errors alone.
    """
    package = logging.getLogger("stts_slowfast")
    level, handlers = package.level, []
    package.setLevel(logging.INFO if main else logging.ERROR)
    if main:
        g_pathmgr.mkdirs(output_dir)
        file = g_pathmgr.open(os.path.join(output_dir, "stdout.log"), "a")
        handlers.append(logging.StreamHandler(file))
        if not logging.getLogger().handlers:  # whoever set up logging sees our lines anyway
            handlers.append(_Stdout())
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, "%m/%d %H:%M:%S"))
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(level)
        for handler in handlers:
            package.removeHandler(handler)
        if main:
            file.close()


def log_json_stats(stats: dict, output_dir: str | None = None) -> None:
    """Logs one ``json_stats`` line: keys sorted, floats with five places, as SlowFast does.

    Args:
        stats: numbers and texts.
        output_dir: where given, the line is added to ``json_stats.log`` there too.
    """
    rounded = {
        key: decimal.Decimal(f"{value:.5f}") if isinstance(value, float) else value
        for key, value in stats.items()
    }
    line = f"json_stats: {simplejson.dumps(rounded, sort_keys=True, use_decimal=True)}"
    logger.info(line)
    if output_dir:
        with g_pathmgr.open(os.path.join(output_dir, "json_stats.log"), "a") as file:
            file.write(f"{line}\n")


class Timer:
    """Seconds of one iteration, and of its two parts: waiting for data, and computing."""

    def __init__(self):
        self.tic()

    def tic(self) -> None:
        """An iteration begins: the next batch is asked for."""
        self.start = self.data = self.end = time.perf_counter()

    def got_data(self) -> None:
        """The batch is here."""
        self.data = time.perf_counter()

    def toc(self) -> None:
        """The batch is done."""
        self.end = time.perf_counter()

    def stats(self) -> dict:
        return {
            "dt": self.end - self.start,
            "dt_data": self.data - self.start,
            "dt_net": self.end - self.data,
        }

    def eta(self, iterations: int) -> str:
        return str(datetime.timedelta(seconds=int((self.end - self.start) * iterations)))


def _memory() -> dict:
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"gpu_mem": f"{used / 2**30:.2f}G"}


def _ram() -> dict:
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return {"RAM": f"{total - free:.2f}/{total:.2f}G"}


class Report(Callback):
    """Logs training, validation and testing in SlowFast's fields.

    Reads ``module.stats`` after each batch: in training ``(loss, grad_norm, top-1 error, top-5
    error)``, in validation ``(top-1 error, top-5 error)``, errors in percent.
    """

    def __init__(self, cfg, start_epoch: int = 0):
        self.cfg = cfg
        self.start_epoch = start_epoch
        self.timer = Timer()
        self.least = {"min_top1_err": 100.0, "min_top5_err": 100.0}

    # --- training

    def on_train_epoch_start(self, trainer, module) -> None:
        self.window = deque(maxlen=self.cfg.LOG_PERIOD)
        self.losses = deque(maxlen=6)
        self.totals = [0.0, 0.0, 0.0, 0]  # loss, top-1 and top-5 error times clips; clips
        self.timer.tic()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.timer.got_data()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        loss, grad_norm, top1, top5 = trainer.strategy.reduce(module.stats).tolist()
        clips = len(batch[0])
        self.timer.toc()
        self._check(loss, grad_norm, module.epoch_exact)
        self.window.append((loss, top1, top5))
        for place, value in enumerate((loss, top1, top5, 1)):
            self.totals[place] += value * clips
        if trainer.is_global_zero:
            self._tell_training(trainer, module, batch_idx, grad_norm)
        self.timer.tic()

    def _check(self, loss: float, grad_norm: float, epoch: float) -> None:
        found = {"loss": loss}
        if not self.cfg.TRAIN.MIXED_PRECISION:  # there a step is left out where it overflows
            found["norm of the gradient"] = grad_norm
        for name, value in found.items():
            if not math.isfinite(value):
                raise ValueError(
                    f"the {name} is {value} at epoch {epoch:.2f}: try a smaller SOLVER.BASE_LR, "
                    "longer SOLVER.WARMUP_EPOCHS or SOLVER.CLIP_GRAD_L2NORM"
                )
        limit = self.cfg.TRAIN.KILL_LOSS_EXPLOSION_FACTOR
        if limit > 0.0 and len(self.losses) == 6:
            before = statistics.mean(list(self.losses)[1:])
            if loss > limit * before:
                raise ValueError(
                    f"the loss is {loss:.4g} at epoch {epoch:.2f}, more than "
                    f"TRAIN.KILL_LOSS_EXPLOSION_FACTOR {limit:g} times the {before:.4g} before"
                )
        self.losses.append(loss)

    def _tell_training(self, trainer, module, batch_idx: int, grad_norm: float) -> None:
        epoch, length = trainer.current_epoch, trainer.num_training_batches
        left = self.cfg.SOLVER.MAX_EPOCH * length - epoch * length - batch_idx - 1
        loss, top1, top5 = (statistics.median(column) for column in zip(*self.window))
        stats = {
            "epoch": f"{epoch + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
            **self.timer.stats(),
            "eta": self.timer.eta(left),
            "grad_norm": grad_norm,
            **self._rates(module),
            **_memory(),
        }
        if (batch_idx + 1) % self.cfg.LOG_PERIOD == 0:
            errors = {"loss": loss, "top1_err": top1, "top5_err": top5}
            # SlowFast's type really ends in an underscore.
            place = {"_type": "train_iter_", "iter": f"{batch_idx + 1}/{length}"}
            log_json_stats({**stats, **errors, **place})
        if trainer.logger is not None:
            loss, top1, top5 = self.window[-1]
            scalars = {"loss": loss, "Top1_err": top1, "Top5_err": top5, **self._rates(module)}
            step = length * epoch + batch_idx
            trainer.logger.log_metrics({f"Train/{k}": v for k, v in scalars.items()}, step)
        if trainer.is_last_batch:
            clips = self.totals[3]
            names = ("loss", "top1_err", "top5_err")
            errors = {name: total / clips for name, total in zip(names, self.totals)}
            stats = {**stats, **errors, **_ram(), "_type": "train_epoch"}
            log_json_stats(stats, self.cfg.OUTPUT_DIR)

    def _rates(self, module) -> dict:
        return {"lr": float(module.lr), **module.rates}

    # --- validation

    def on_validation_epoch_start(self, trainer, module) -> None:
        self.val_window = deque(maxlen=self.cfg.LOG_PERIOD)
        self.val_totals = torch.zeros(3, dtype=torch.float64)  # wrong in top 1, in top 5; clips
        self.val_start = time.perf_counter()
        self.timer.tic()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        self.timer.got_data()

    def on_validation_batch_end(
        self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        errors = module.stats.tolist()
        self.timer.toc()
        self.val_window.append(errors)
        self.val_totals += torch.tensor([*errors, 1.0]) * len(batch[0])
        batches = trainer.num_val_batches[0]
        if trainer.is_global_zero and (batch_idx + 1) % self.cfg.LOG_PERIOD == 0:
            top1, top5 = (statistics.median(column) for column in zip(*self.val_window))
            stats = {
                "_type": "val_iter",
                "epoch": f"{self._epoch(trainer) + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
                "iter": f"{batch_idx + 1}/{batches}",
                "time_diff": self.timer.stats()["dt"],
                "eta": self.timer.eta(batches - batch_idx - 1),
                "top1_err": top1,
                "top5_err": top5,
                **_memory(),
            }
            log_json_stats(stats)
        self.timer.tic()

    def on_validation_epoch_end(self, trainer, module) -> None:
        totals = self.val_totals.float().to(module.device)
        top1, top5, clips = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        self.errors = {"top1_err": top1 / clips, "top5_err": top5 / clips}
        for key, value in self.errors.items():
            self.least[f"min_{key}"] = min(self.least[f"min_{key}"], value)
        if not trainer.is_global_zero:
            return
        epoch = self._epoch(trainer)
        stats = {
            "_type": "val_epoch",
            "epoch": f"{epoch + 1}/{self.cfg.SOLVER.MAX_EPOCH}",
            "time_diff": time.perf_counter() - self.val_start,
            **self.errors,
            **self.least,
            **_memory(),
            **_ram(),
        }
        log_json_stats(stats, self.cfg.OUTPUT_DIR)
        if trainer.logger is not None:
            scalars = {"Val/Top1_err": top1 / clips, "Val/Top5_err": top5 / clips}
            trainer.logger.log_metrics(scalars, epoch)

    def _epoch(self, trainer) -> int:
        """The epoch after which this validates; outside of training the one it starts from."""
        return trainer.current_epoch if trainer.state.fn == "fit" else self.start_epoch - 1

    # --- testing

    def on_test_epoch_start(self, trainer, module) -> None:
        self.busy = []  # clips and seconds of each batch
        self.timer.tic()

    def on_test_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.timer.got_data()

    def on_test_batch_end(
        self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self.timer.toc()
        self.busy.append((len(batch[0]), self.timer.stats()["dt_net"]))
        if trainer.is_global_zero and (batch_idx + 1) % self.cfg.LOG_PERIOD == 0:
            stats = {
                "split": "test_iter",
                "cur_iter": str(batch_idx + 1),
                "eta": self.timer.eta(trainer.num_test_batches[0] - batch_idx - 1),
                "time_diff": self.timer.stats()["dt"],
            }
            log_json_stats(stats)
        self.timer.tic()

    def clips_per_s(self) -> float:
        """Clips a second through the model alone; the first batch, a warm-up, left out."""
        batches = self.busy[1:] or self.busy
        return sum(clips for clips, _ in batches) / sum(seconds for _, seconds in batches)
