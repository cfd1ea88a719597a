"""The processes of a job: starting them, what each opens, how they end; the lock of OUTPUT_DIR."""

import contextlib
import gc
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection

from filelock import FileLock, Timeout
from torch.nn.parallel import DistributedDataParallel

from stts_slowfast.evaluation import matmul_precision
from stts_slowfast.standalone.cluster import (
    INIT_METHOD,
    PeerWatchdog,
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
    SignalState,
    child_main,
    handle_signals,
    hard_exit_after_grace,
    kill_children,
    worker_death_error,
)

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
PRECISIONS = {"": None, "float16": "16-mixed", "bfloat16": "bf16-mixed"}


def launch(
    job: Callable[..., dict],
    cfg,
    init_method: str = INIT_METHOD,
    processes: int | None = None,
    **options,
) -> dict:
    """Runs ``job(cfg, fabric, signals, **options)`` in this process, or in several that it starts.

    Args:
        job: a function of a module, as new processes import it.
        cfg, init_method, processes: see :func:`resolve_processes`; ``cfg`` is not changed.

    Returns:
        What the job returns in the first process.

    Raises:
        Whatever the job raises in any of them; :class:`Interrupted` if signals end it.
    """
    cfg = cfg.clone()
    cfg.defrost()
    check_values(cfg)
    infos = resolve_processes(cfg, init_method, processes)
    check_gpus(cfg, infos[0])
    if len(infos) == 1:
        return _run(infos[0], job, cfg, options)
    store = open_rendezvous(infos)  # as long as they run
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in infos]
    children = []
    for info, (_, writer) in zip(infos, pipes):
        work = pickle.dumps((_run_in_child, (info, job, cfg, options)))
        children.append(context.Process(target=child_main, args=(os.getpid(), work, writer)))
    with handle_signals(limited=False) as signals:
        signals.deferred = True
        for child in children:
            child.start()
        for _, writer in pipes:
            writer.close()
        results, lost = _wait(children, [reader for reader, _ in pipes], signals)
    del store
    return _result(results, lost, signals.number)


def _wait(children: list, readers: list, signals: SignalState) -> tuple[dict[int, object], str]:
    """Waits for all children and relays signals to them; if one fails, terminates the others.

    Returns:
        What each process sent, and how the first that failed ended.
    """
    results: dict[int, object] = {}
    lost, terminated = "", False
    while True:
        running = [child for child in children if child.is_alive()]
        for rank, reader in enumerate(readers):
            with contextlib.suppress(EOFError):
                if rank not in results and reader.poll():
                    results[rank] = pickle.loads(reader.recv_bytes())
        if not running:
            return results, lost
        failed = [child.exitcode for child in children if child.exitcode]
        if failed and not terminated:  # a process that was terminated here is not lost
            lost = f"ended by {signal.Signals(-failed[0]).name}" if failed[0] < 0 else "it failed"
        if (lost or signals.number) and not terminated:
            terminated = True
            for child in running:
                child.terminate()
        if signals.save:
            signals.save = False
            for child in running:
                os.kill(child.pid, signal.SIGUSR1)
        connection.wait([child.sentinel for child in running], timeout=POLL_SECONDS)


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
        raise ChildProcessError("the first process of this run ended without a result")
    return results[0]


# --- one process ----------------------------------------------------------------------------------


def _run_in_child(info: ProcessInfo, job, cfg, options: dict, writer) -> None:
    if info.local_rendezvous:  # as torchrun sets it: rank 0 does not listen there
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    try:
        result = _run(info, job, cfg, options)
    except BaseException as error:
        writer.send_bytes(_pickled(error))
        if not isinstance(error, KeyboardInterrupt):  # then the others end by themselves
            sys.exit(1)
    else:
        if info.local_index == 0:
            writer.send_bytes(pickle.dumps(result))


def _pickled(error: BaseException) -> bytes:
    """The pickled error; if it cannot be pickled, one with its name and text."""
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
        return pickled
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _run(info: ProcessInfo, job, cfg, options: dict) -> dict:
    main = info.rank == 0
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(handle_signals())
        stack.enter_context(matmul_precision(cfg.MODEL.FLOAT32_MATMUL_PRECISION))
        start = time.perf_counter()
        fabric = open_fabric(cfg, info)
        watchdog = PeerWatchdog(fabric, info.host) if info.world > 1 else None
        before = multiprocessing.active_children()
        try:
            if main:
                stack.enter_context(run_lock(cfg.OUTPUT_DIR))
            stack.enter_context(log_to(cfg.OUTPUT_DIR, main=main))
            result = job(cfg, fabric, signals, **options)
            signals.deferred = True  # no signal interrupts what follows
        except BaseException as error:
            signals.deferred = True
            if watchdog and isinstance(error, Interrupted) and error.agreed:
                watchdog.release()
            elif watchdog:  # this process may still wait for the others
                hard_exit_after_grace("did not end after an error")
            lost = worker_death_error(error)
            kill_children(before)
            # The loaders go now, while signals are handled, not with the last traceback.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            if lost and signals.number:  # the signal that killed the worker was to end the run
                raise Interrupted(number=signals.number) from error
            if lost:
                raise lost from error
            raise
        if watchdog:
            watchdog.release()
        kill_children(before)
        gc.collect()  # its loaders go now, not in a worker of the next run of this process
        signals.check()
        logger.info("done in %.1f s", time.perf_counter() - start)
        return result


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Locks a local folder for this process while it is open; ``.running`` names the process.

    Raises:
        ValueError: if another process has the lock.
    """
    if "://" in folder:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    holder = os.path.join(folder, ".running")
    lock = FileLock(f"{holder}.lock", timeout=0)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except Timeout:
            raise ValueError(
                f"another run writes to OUTPUT_DIR {folder} ({_read_text(holder) or 'unknown'}): "
                "wait for it, stop it, or choose another OUTPUT_DIR"
            ) from None
        except (OSError, NotImplementedError):
            logger.debug("the file system of %s has no locks", folder)
        with open(holder, "w") as file:
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield


def _read_text(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read().strip()
    return ""


def open_fabric(cfg, info: ProcessInfo) -> Fabric:
    """Fabric for one process: its device, its precision in training, DDP if there are others."""
    device = "cuda" if cfg.NUM_GPUS else "cpu"
    backend = cfg.DIST_BACKEND if cfg.NUM_GPUS else "gloo"
    # All processes set the same sigma: there is no buffer to send before each forward pass.
    names = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ddp = DDPStrategy(process_group_backend=backend, **{buffers: False})
    precision = Precision()
    if cfg.TRAIN.MIXED_PRECISION:
        default = "float16" if cfg.NUM_GPUS else "bfloat16"
        precision = MixedPrecision(PRECISIONS[cfg.TRAIN.MIXED_PRECISION_DTYPE or default], device)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)  # tips, and ranks
    fabric = Fabric(
        accelerator=device,
        devices=[info.device_index] if cfg.NUM_GPUS else 1,
        num_nodes=info.world,
        strategy=ddp if info.world > 1 else "auto",
        plugins=[info, precision],
    )
    fabric.launch()
    return fabric
