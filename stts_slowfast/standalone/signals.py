"""How a run ends early: signals, lost worker processes, and the end by force.

SIGTERM and SIGINT: a checkpoint at the next iteration, then exit status 128 + n. SIGUSR1: a
checkpoint, and the run continues. A handler only sets a flag, which the loops read after each
batch; a thread ends the process ``GRACE_PERIOD`` seconds later even if no loop reads it. Forked
children (the loaders' workers) die with this process, however it ends.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator

GRACE_PERIOD = 8.0  # seconds between a signal and the end by force
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the text names the checkpoint, ``status`` is for exit."""

    status = 130
    agreed = False  # all processes of the run end at the same iteration

    def __init__(self, text: str = "interrupted", number: int = signal.SIGINT):
        super().__init__(text)
        self.status = 128 + number


# --- the flag -------------------------------------------------------------------------------------


class SignalState:
    """What signals have asked of this process.

    Attributes:
        number: of the signal that asked it to end; 0 if there was none.
        save: SIGUSR1 asked for a checkpoint (Slurm's warning before the time is up).
        deferred: the running code reads ``number`` by itself; else a signal raises at once.
    """

    def __init__(self, limited: bool = True):
        self.number, self.save, self.deferred = 0, False, False
        self._limited = limited  # the end by force after GRACE_PERIOD
        self._over = threading.Event()

    def check(self) -> None:
        """Raises :class:`Interrupted` if a signal asked this process to end."""
        if self.number:
            raise Interrupted(number=self.number)

    def _on_signal(self, number: int, frame) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.number:  # later ones are ignored
            self.number = number
            if not self.deferred:
                self.check()

    def _read_signals(self, reader: int) -> None:
        """Reads the numbers of signals until the run is over, even if no handler gets to run."""
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if self._limited and number[0] in (signal.SIGINT, signal.SIGTERM):
                    threading.Thread(target=self._end, args=(number[0],), daemon=True).start()

    def _end(self, number: int) -> None:
        """Ends the process if it does not end by itself in time: sooner if signals are not
        deferred, as there is nothing to save then."""
        waited = GRACE_PERIOD / 4
        over = self._over.wait(waited)
        if not over and self.deferred:
            over, waited = self._over.wait(GRACE_PERIOD - waited), GRACE_PERIOD
        if not over:
            hard_exit(f"did not end within {waited:g} s", 128 + number)


_active: SignalState | None = None


@contextlib.contextmanager
def handle_signals(limited: bool = True) -> Iterator[SignalState]:
    """Handles SIGINT, SIGTERM and SIGUSR1 while it is open; gives a :class:`SignalState`.

    In a thread other than the main one, which receives no signal, it does nothing.

    Args:
        limited: whether the process is ended by force ``GRACE_PERIOD`` seconds after a signal.
    """
    global _active
    state = SignalState(limited)
    if threading.current_thread() is not threading.main_thread():
        yield state
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, state._on_signal) for number in numbers}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=state._read_signals, args=(reader,), daemon=True).start()
    _active = state
    try:
        yield state
    finally:
        _active = None
        state.deferred = True  # nothing may be raised from here on
        state._over.set()
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


# --- children -------------------------------------------------------------------------------------


def _in_forked_child() -> None:
    """A child leaves signals to its parent, and ends with it."""
    if _active is None:
        return
    die_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_forked_child)


def worker_init(worker: int) -> None:
    """A loader's ``worker_init_fn``: the worker ignores a SIGTERM to the whole process group
    (timeout, Slurm), as the run needs it until the end of the step.

    PyTorch sets a SIGTERM handler of its own after the fork, so it is not done there.
    """
    if _active is not None:  # else nobody would kill a worker that hangs
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends (on Linux).

    Args:
        parent: its process id, if known: if it has ended before, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        hard_exit("ends because its parent process has exited", 1)


def child_main(parent: int, work: bytes, *more) -> None:
    """Entry point of a spawned process: ties it to its parent and sets signal handling before the
    slow imports, which unpickling ``work``, a ``(function, arguments)``, takes."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    function, arguments = pickle.loads(work)
    function(*arguments, *more)


def hard_exit(reason: str, status: int) -> None:
    """Ends this process and its children at once, with one line on stderr."""
    with contextlib.suppress(Exception):
        os.write(2, f"stts: process {os.getpid()} {reason}\n".encode())
    for child in multiprocessing.active_children():
        with contextlib.suppress(Exception):
            child.kill()
    os._exit(status)


def hard_exit_after_grace(reason: str) -> None:
    """Calls :func:`hard_exit` after ``GRACE_PERIOD``, if this process still runs then."""
    timer = threading.Timer(GRACE_PERIOD, hard_exit, (reason, 1))
    timer.daemon = True
    timer.start()


def kill_children(spared: Collection = ()) -> None:
    """Kills the child processes other than the spared ones, and waits for them.

    A loader whose run failed would wait seconds for each of its workers in turn, which ignore
    SIGTERM (:func:`worker_init`).
    """
    main = threading.current_thread() is threading.main_thread()
    children = [child for child in multiprocessing.active_children() if child not in spared]
    # PyTorch's handler would raise for a child that is ended by a signal.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main and children else None
    for child in children:
        child.kill()
    for child in children:
        child.join(1.0)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def worker_death_error(error: BaseException) -> ChildProcessError | None:
    """The error to raise if a loader's worker was killed; None for any other error.

    PyTorch raises it from a signal handler, in whatever code runs: that may fail because of it.
    """
    text = " ".join(str(error).split())
    match = re.search(r"DataLoader worker.*?(killed by signal: \w+|exited unexpectedly)", text)
    how = match.group(1) if match and not text.startswith("Caught") else None
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        # It ended while it was sending a tensor.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        how = "in the middle of a batch" if any("reductions.py" in name for name in files) else None
    elif not isinstance(error, RuntimeError):
        how = None
    if how is None:
        return error.__context__ and worker_death_error(error.__context__)
    return ChildProcessError(
        f"a process that reads videos was lost ({how}). If nobody killed it, memory ran out: "
        "lower DATA_LOADER.NUM_WORKERS. The same command resumes from the last checkpoint"
    )
