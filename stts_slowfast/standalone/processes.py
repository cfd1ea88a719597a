"""A job in its processes: how one command starts several, what each opens, how they end."""

import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel

from stts_slowfast.keys import check_choice
from stts_slowfast.standalone.defaults import check_supported
from stts_slowfast.standalone.fabric import DDPStrategy, Fabric, MixedPrecision, Precision
from stts_slowfast.standalone.places import INIT_METHOD, Place, check_gpus, find_places
from stts_slowfast.standalone.report import log_to
from stts_slowfast.standalone.stops import (
    Interrupted,
    Lifeline,
    die_with_parent,
    end_children,
    end_soon,
    hold,
    listen,
    lost_reader,
)

logger = logging.getLogger(__name__)

PRECISIONS = {"": None, "float16": "16-mixed", "bfloat16": "bf16-mixed"}


def launch(
    job: Callable[..., dict],
    cfg,
    init_method: str = INIT_METHOD,
    processes: int | None = None,
    **options,
) -> dict:
    """Runs ``job(cfg, fabric, stop, **options)`` in this process, or in several that it starts.

    Args:
        job: a function of a module, as new processes import it.
        cfg, init_method, processes: see :func:`find_places`; ``cfg`` is not changed.

    Returns:
        What the job returns in the first process.

    Raises:
        Whatever the job raises in any of them; :class:`Interrupted` where signals end it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    check_machine(cfg)
    places = find_places(cfg, init_method, processes)
    check_gpus(cfg, places[0])
    if len(places) == 1:
        return _work(places[0], job, cfg, options)
    pipes = [torch.multiprocessing.get_context("spawn").Pipe(duplex=False) for _ in places]
    writers = [writer for _, writer in pipes]
    # When one process fails PyTorch ends the others, and would tell of each.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with _pass_on_signals() as asked:
        children = torch.multiprocessing.spawn(
            _spawned,
            (os.getpid(), places, job, cfg, options, writers),
            nprocs=len(places),
            join=False,
        )
        asked.pids = children.pids()
        if asked.number:  # it came before there was anybody to hand it to
            asked(asked.number, None)
        for writer in writers:
            writer.close()
        results, lost = _wait(children, [reader for reader, _ in pipes])
    return _result(results, lost, asked.number)


def _wait(children, readers: list) -> tuple[dict[int, object], Exception | None]:
    """Waits for all children; ``(what each sent, what PyTorch says of those that failed)``."""
    results, lost, over = {}, None, False
    while not over:
        try:
            over = children.join(timeout=0.2)
        except Exception as error:
            lost, over = error, True
        for rank, reader in enumerate(readers):
            with contextlib.suppress(EOFError):
                if rank not in results and reader.poll():
                    results[rank] = pickle.loads(reader.recv_bytes())
    return results, lost


def _result(results: dict[int, object], lost: Exception | None, number: int) -> dict:
    errors = [results[rank] for rank in sorted(results) if isinstance(results[rank], BaseException)]
    errors.sort(key=lambda error: isinstance(error, KeyboardInterrupt))  # the cause comes first
    if number:
        raise Interrupted(number=number)
    if errors:
        raise errors[0]
    if lost is not None:
        raise ChildProcessError(f"a process of this run was lost: {str(lost).splitlines()[0]}")
    if 0 not in results:
        raise ChildProcessError("the first process of this run ended without a word")
    return results[0]


class _PassOn:
    """Hands the signals that this process gets to those that it started."""

    pids: list[int] = []
    number = 0

    def __call__(self, number: int, frame) -> None:
        if number != signal.SIGUSR1:
            self.number = number
            number = signal.SIGTERM  # Ctrl-C reaches all of them anyway
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def _pass_on_signals():
    asked = _PassOn()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, asked) for number in numbers}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawned(
    index: int, parent: int, places: list[Place], job, cfg, options: dict, writers: list
) -> None:
    die_with_parent(parent)
    try:
        result = _work(places[index], job, cfg, options)
    except BaseException as error:
        writers[index].send_bytes(_packed(error))
        raise
    if places[index].rank == places[0].rank:
        writers[index].send_bytes(pickle.dumps(result))


def _packed(error: BaseException) -> bytes:
    """The pickled error; where it cannot be pickled, one with its name and text."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _work(place: Place, job, cfg, options: dict) -> dict:
    main = place.rank == 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(listen())
        start = time.perf_counter()
        fabric = open_fabric(cfg, place)
        lifeline = Lifeline(fabric, place.host) if place.world > 1 else None
        before = multiprocessing.active_children()
        try:
            if main:
                stack.enter_context(hold(cfg.OUTPUT_DIR))
            stack.enter_context(log_to(cfg.OUTPUT_DIR, main=main))
            result = job(cfg, fabric, stop, **options)
            stop.deferred = True  # no signal interrupts what follows
        except BaseException as error:
            stop.deferred = True
            if lifeline and isinstance(error, Interrupted) and error.agreed:
                lifeline.release()
            elif lifeline:  # whatever still waits for the others
                end_soon("did not end after an error")
            lost = lost_reader(error)
            end_children(before)
            # The loaders go now, while signals are listened to, not with the last traceback.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            if lost and stop.number:  # whatever ended the reader was to end the run
                raise Interrupted(number=stop.number) from error
            if lost:
                raise lost from error
            raise
        if lifeline:
            lifeline.release()
        end_children(before)
        stop.check()
        logger.info("done in %.1f s", time.perf_counter() - start)
        return result


def open_fabric(cfg, place: Place) -> Fabric:
    """Fabric for one process: its device, its precision in training, DDP where there are others."""
    device = "cuda" if cfg.NUM_GPUS else "cpu"
    backend = cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo"
    # All processes set sigma alike: there is nothing to send before each forward pass.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ddp = DDPStrategy(process_group_backend=backend, **{buffers: False})
    precision = Precision()
    if cfg.TRAIN.MIXED_PRECISION:
        default = "float16" if cfg.NUM_GPUS else "bfloat16"
        precision = MixedPrecision(PRECISIONS[cfg.TRAIN.MIXED_PRECISION_DTYPE or default], device)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # tips, and who is here
    fabric = Fabric(
        accelerator=device,
        devices=[place.device_index] if cfg.NUM_GPUS else 1,
        num_nodes=place.world,
        strategy=ddp if place.world > 1 else "auto",
        plugins=[place, precision],
    )
    fabric.launch()
    return fabric


_LEAST = [
    ("", "LOG_PERIOD", 1),
    ("", "NUM_SHARDS", 1),
    ("TRAIN", "EVAL_PERIOD", 1),
    ("TRAIN", "CHECKPOINT_PERIOD", 1),
    ("AUG", "NUM_SAMPLE", 1),
    ("DATA", "SAMPLING_RATE", 0),
    ("DATA", "TARGET_FPS", 0),
]


def check_machine(cfg) -> None:
    """Raises ``ValueError`` for what no run on this machine can do."""
    check_supported(cfg)
    for node, name, least in _LEAST:
        key, value = f"{node}.{name}" if node else name, (cfg[node] if node else cfg)[name]
        if value < least or value == 0:
            limit = f"at least {least}" if least else "above 0"
            raise ValueError(f"{key} is {value}: it must be {limit}")
    if len(cfg.DATA.TRAIN_JITTER_SCALES) != 2:
        raise ValueError(
            f"DATA.TRAIN_JITTER_SCALES is {cfg.DATA.TRAIN_JITTER_SCALES}: give the range's two ends"
        )
    if not 0 <= cfg.SHARD_ID < cfg.NUM_SHARDS:
        raise ValueError(
            f"SHARD_ID is {cfg.SHARD_ID} but NUM_SHARDS is {cfg.NUM_SHARDS}: shards count from 0"
        )
    check_choice("TRAIN.MIXED_PRECISION_DTYPE", cfg.TRAIN.MIXED_PRECISION_DTYPE, PRECISIONS)
