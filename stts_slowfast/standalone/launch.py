"""A job in its processes: how one command starts several, what each opens, how they end."""

import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection

from torch.nn.parallel import DistributedDataParallel

from stts_slowfast.standalone.cluster import (
    INIT_METHOD,
    ProcessInfo,
    check_gpus,
    open_rendezvous,
    resolve_processes,
)
from stts_slowfast.standalone.config import check_values
from stts_slowfast.standalone.fabric import DDPStrategy, Fabric, MixedPrecision, Precision
from stts_slowfast.standalone.run_logger import log_to
from stts_slowfast.standalone.signals import (
    Interrupted,
    PeerWatchdog,
    child_main,
    handle_signals,
    hard_exit_after_grace,
    kill_children,
    run_lock,
    worker_death_error,
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
        cfg, init_method, processes: see :func:`resolve_processes`; ``cfg`` is not changed.

    Returns:
        What the job returns in the first process.

    Raises:
        Whatever the job raises in any of them; :class:`Interrupted` where signals end it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    check_values(cfg)
    places = resolve_processes(cfg, init_method, processes)
    check_gpus(cfg, places[0])
    if len(places) == 1:
        return _work(places[0], job, cfg, options)
    store = open_rendezvous(places)  # as long as they run
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in places]
    children = []
    for place, (_, writer) in zip(places, pipes):
        work = pickle.dumps((_spawned, (place, job, cfg, options)))
        children.append(context.Process(target=child_main, args=(os.getpid(), work, writer)))
    with _pass_on_signals() as asked:
        for child in children:
            child.start()
        asked.pids = [child.pid for child in children]
        if asked.number:  # it came before there was anybody to hand it to
            asked(asked.number, None)
        for _, writer in pipes:
            writer.close()
        results, lost = _wait(children, [reader for reader, _ in pipes])
    del store
    return _result(results, lost, asked.number)


def _wait(children: list, readers: list) -> tuple[dict[int, object], str]:
    """Waits for all children; where one fails, ends the others. ``(what each sent, what is known of
    the first that failed)``."""
    results, lost = {}, ""
    while True:
        running = [child for child in children if child.is_alive()]
        for rank, reader in enumerate(readers):
            with contextlib.suppress(EOFError):
                if rank not in results and reader.poll():
                    results[rank] = pickle.loads(reader.recv_bytes())
        if not running:
            return results, lost
        failed = [child.exitcode for child in children if child.exitcode]
        if failed and not lost:
            lost = f"ended by {signal.Signals(-failed[0]).name}" if failed[0] < 0 else "it failed"
            for child in running:
                child.terminate()
        connection.wait([child.sentinel for child in running], timeout=0.2)


def _result(results: dict[int, object], lost: str, number: int) -> dict:
    errors = [results[rank] for rank in sorted(results) if isinstance(results[rank], BaseException)]
    errors.sort(key=lambda error: isinstance(error, KeyboardInterrupt))  # the cause comes first
    if number:
        raise Interrupted(number=number)
    if errors:
        raise errors[0]
    if lost:
        raise ChildProcessError(f"a process of this run was lost: {lost}")
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


def _spawned(place: ProcessInfo, job, cfg, options: dict, writer) -> None:
    if place.local_rendezvous:  # as torchrun does it: rank 0 does not listen there
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        result = _work(place, job, cfg, options)
    except KeyboardInterrupt as error:
        writer.send_bytes(_packed(error))  # the others end by themselves
    except BaseException as error:
        writer.send_bytes(_packed(error))
        sys.exit(1)
    else:
        if place.local_index == 0:
            writer.send_bytes(pickle.dumps(result))


def _packed(error: BaseException) -> bytes:
    """The pickled error; where it cannot be pickled, one with its name and text."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _work(place: ProcessInfo, job, cfg, options: dict) -> dict:
    main = place.rank == 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(handle_signals())
        start = time.perf_counter()
        fabric = open_fabric(cfg, place)
        lifeline = PeerWatchdog(fabric, place.host) if place.world > 1 else None
        before = multiprocessing.active_children()
        try:
            if main:
                stack.enter_context(run_lock(cfg.OUTPUT_DIR))
            stack.enter_context(log_to(cfg.OUTPUT_DIR, main=main))
            result = job(cfg, fabric, stop, **options)
            stop.deferred = True  # no signal interrupts what follows
        except BaseException as error:
            stop.deferred = True
            if lifeline and isinstance(error, Interrupted) and error.agreed:
                lifeline.release()
            elif lifeline:  # whatever still waits for the others
                hard_exit_after_grace("did not end after an error")
            lost = worker_death_error(error)
            kill_children(before)
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
        kill_children(before)
        gc.collect()  # its loaders go now, not in a reader of the next run of this process
        stop.check()
        logger.info("done in %.1f s", time.perf_counter() - start)
        return result


def open_fabric(cfg, place: ProcessInfo) -> Fabric:
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
