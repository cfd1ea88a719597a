"""Outputs of a run: SlowFast's ``json_stats`` lines, ``stdout.log``, ``run.json``, TensorBoard."""

import contextlib
import datetime
import decimal
import json
import logging
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import simplejson
import torch
import yaml
from iopath.common.file_io import g_pathmgr
from torch import Tensor, nn

from stts_slowfast.checkpoints import atomic_write

logger = logging.getLogger(__name__)

NUM_SHOWN_CLIPS = 4  # clips of a validation in TensorBoard
RUN_RECORD, RUN_SCHEMA = "run.json", 1

# Called after each batch with "train", "val" or "test", the model, and the batch on its device:
# (clips, labels, video_index, view_index). With several processes it is pickled.
BatchCallback = Callable[[str, nn.Module, tuple[Tensor, ...]], None]

_FORMAT = "[%(asctime)s][%(levelname)s] %(filename)s: %(lineno)4d: %(message)s"


class _Stdout(logging.Handler):
    """Prints to the current ``sys.stdout``, which a progress bar replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout, flush=True)


@contextlib.contextmanager
def log_to(output_dir: str, main: bool):
    """Logs this package's lines to stdout and ``OUTPUT_DIR/stdout.log`` while it is open.

    Args:
        output_dir: created if missing.
        main: whether this process logs; the others log errors only.
    """
    package = logging.getLogger("stts_slowfast")
    level, handlers = package.level, []
    package.setLevel(logging.INFO if main else logging.ERROR)
    if main:
        g_pathmgr.mkdirs(output_dir)
        file = g_pathmgr.open(os.path.join(output_dir, "stdout.log"), "a")
        handlers.append(logging.StreamHandler(file))
        if not logging.getLogger().handlers:  # else the application shows our lines
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
        output_dir: if given, the line is also appended to its ``json_stats.log``.
    """
    rounded = {key: _rounded(value) for key, value in stats.items()}
    line = f"json_stats: {simplejson.dumps(rounded, sort_keys=True, use_decimal=True)}"
    logger.info(line)
    if output_dir:
        with g_pathmgr.open(os.path.join(output_dir, "json_stats.log"), "a") as file:
            file.write(f"{line}\n")


def record_run(cfg, facts: dict, results: dict | None = None) -> None:
    """Writes the facts and results of a run to ``OUTPUT_DIR/run.json``, for programs to read.

    Its keys: ``schema`` (1), ``engine``, ``config`` (the nested config), ``params``, ``gflops`` of
    one clip (None if not counted), and ``results``: ``train`` (``top1_err``, ``top5_err``) and
    ``test`` (as ``engine.test`` returns it), each if it has ended.

    Args:
        facts: ``params`` and ``gflops``.
        results: entries to add to those in the file.
    """
    path = os.path.join(cfg.OUTPUT_DIR, RUN_RECORD)
    record = {"schema": RUN_SCHEMA, "engine": "standalone", **facts}
    record |= {"config": yaml.safe_load(cfg.dump()), "results": {**_past_results(path)}}
    record["results"] |= results or {}
    write_json(path, record)


def write_json(path: str, value: object) -> None:
    """Writes a JSON file, which is whole or absent."""

    def write(partial: str) -> None:
        with open(partial, "w") as file:
            json.dump(value, file, indent=1)

    atomic_write(path, write)


def _past_results(path: str) -> dict:
    if not g_pathmgr.isfile(path):
        return {}
    with g_pathmgr.open(path) as file:
        record = json.load(file)
    return record["results"] if record.get("schema") == RUN_SCHEMA else {}


def _rounded(value):
    if not isinstance(value, float):
        return value
    return decimal.Decimal(f"{value:.5f}") if math.isfinite(value) else str(value)  # no JSON number


class Timer:
    """Seconds of one iteration: in total, waiting for data, and computing."""

    def __init__(self):
        self.tic()

    def tic(self) -> None:
        """An iteration begins: the next batch is requested."""
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

    def timed(self, batches: Iterable) -> Iterator:
        """The batches; the work on one ends when the next is requested."""
        self.tic()
        for batch in batches:
            self.got_data()
            yield batch
            self.tic()


class Meter:
    """Named values of each batch: medians over the last batches, means over all clips."""

    def __init__(self, names: Sequence[str], period: int, totals: Sequence[float] = ()):
        self.names, self.window = names, deque(maxlen=period)
        self.totals = list(totals) or [0.0] * (len(names) + 1)  # sums over clips; clips

    def add(self, values: Sequence[float], clips: int) -> None:
        self.window.append(values)
        for index, value in enumerate((*values, 1.0)):
            self.totals[index] += value * clips

    def medians(self) -> dict[str, float]:
        return dict(zip(self.names, (statistics.median(column) for column in zip(*self.window))))

    def means(self) -> dict[str, float]:
        return {name: total / self.totals[-1] for name, total in zip(self.names, self.totals)}


class HostCopy:
    """Tensors of a step, copied to the host asynchronously: a read waits for that step only."""

    def __init__(self, *tensors: Tensor):
        # Pinned memory is what a copy without waiting goes to.
        on_device = tensors[0].is_cuda
        self.tensors = [tensor.to("cpu", non_blocking=on_device) for tensor in tensors]
        self.event = torch.cuda.Event() if on_device else None
        if self.event:
            self.event.record()

    def read(self) -> list[Tensor]:
        if self.event:
            self.event.synchronize()
        return self.tensors


class LossMonitor:
    """Stops a run whose loss is not finite, or explodes (TRAIN.KILL_LOSS_EXPLOSION_FACTOR)."""

    def __init__(self, cfg):
        self.cfg, self.losses = cfg, deque(maxlen=6)

    def check(self, loss: float, grad_norm: float, epoch: float) -> None:
        """Raises ``ValueError`` if the loss at this exact epoch is not finite, or explodes."""
        values = {"loss": loss}
        if not self.cfg.TRAIN.MIXED_PRECISION:  # which skips a step that overflows
            values["norm of the gradient"] = grad_norm
        for name, value in values.items():
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


class RunLogger:
    """TensorBoard's scalars and figures if TENSORBOARD.ENABLE, and a progress bar on a terminal."""

    def __init__(self, cfg, main: bool, tensorboard: bool):
        self.writer = self.bar = None
        if main and tensorboard and cfg.TENSORBOARD.ENABLE:
            from torch.utils.tensorboard import SummaryWriter

            name = cfg.TENSORBOARD.LOG_DIR or f"runs-{cfg.TRAIN.DATASET}"
            self.writer = SummaryWriter(os.path.join(cfg.OUTPUT_DIR, name))
        if main and sys.stdout.isatty():
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            columns = *Progress.get_default_columns()[:2], MofNCompleteColumn()
            self.bar = Progress(*columns, TimeRemainingColumn(), transient=True)

    def __enter__(self):
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()
        if self.writer:
            self.writer.close()

    def progress(self, batches: Iterable, what: str, length: int, done: int = 0) -> Iterator:
        """The batches, with a bar that shows how many of ``length`` are done."""
        if not self.bar:
            yield from batches
            return
        task = self.bar.add_task(what, total=length, completed=done)
        try:
            for batch in batches:
                yield batch
                self.bar.advance(task)
        finally:
            self.bar.remove_task(task)

    def add_scalars(self, scalars: dict[str, float], step: int) -> None:
        """Writes values by their tags to TensorBoard."""
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def add_figure(self, cfg, model: nn.Module, clips: Tensor, step: int) -> None:
        """Shows the tokens kept of the first of some clips (B, 3, T, H, W) of a loader."""
        if self.writer and cfg.STTS.ENABLE:
            from stts_slowfast.standalone.transforms import normalize_clips
            from stts_slowfast.visualization import film_strip_figure

            clips = normalize_clips(clips[:NUM_SHOWN_CLIPS], cfg)
            self.writer.add_figure("Val/kept", film_strip_figure(cfg, model, clips), step)


def memory() -> dict[str, str]:
    """Peak GPU memory, in GiB."""
    used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"gpu_mem": f"{used / 2**30:.2f}G"}


def ram() -> dict[str, str]:
    """Used and total memory of the machine, in GiB."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**30
    total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    return {"RAM": f"{total - free:.2f}/{total:.2f}G"}
