"""How a run ends before its time: signals, processes that are lost, and who holds OUTPUT_DIR.

A signal only sets a flag, which the loops look at after each batch; a thread sees to it that the
process is gone some seconds later even where no loop gets to look. Children that are forked from
here (those that read videos) die with this process, whatever ends it.
"""

import contextlib
import ctypes
import errno
import fcntl
import multiprocessing
import os
import pickle
import re
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Collection

GRACE_PERIOD = 8.0  # seconds between a signal and the end by force
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A run was stopped from outside; the text says where it goes on, ``status`` for exit."""

    status = 130
    agreed = False  # all processes of the run end at the same iteration

    def __init__(self, text: str = "interrupted", number: int = signal.SIGINT):
        super().__init__(text)
        self.status = 128 + number


class SignalState:
    """What was asked of this process from outside.

    Attributes:
        number: of the signal that asked it to end; 0 while none did.
        save: SIGUSR1 asked for a checkpoint (Slurm's warning before the time is up).
        deferred: the code that runs looks at ``number`` by itself; else a signal raises at once.
    """

    def __init__(self):
        self.number, self.save, self.deferred = 0, False, False
        self._over = threading.Event()

    def check(self) -> None:
        """Raises :class:`Interrupted` where a signal came."""
        if self.number:
            raise Interrupted(number=self.number)

    def _on_signal(self, number: int, frame) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        if self.number:
            return  # the first is being obeyed
        self.number = number
        if not self.deferred:
            self.check()

    def _watch(self, reader: int) -> None:
        """Reads the signals' numbers until the run is over."""
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in (signal.SIGINT, signal.SIGTERM):
                    threading.Thread(target=self._end, args=(number[0],), daemon=True).start()

    def _end(self, number: int) -> None:
        """Ends the process where a signal is not obeyed in time: sooner where it is not deferred,
        when processes still meet or test, and nothing is to be saved."""
        waited = GRACE_PERIOD / 4
        over = self._over.wait(waited)
        if not over and self.deferred:
            over, waited = self._over.wait(GRACE_PERIOD - waited), GRACE_PERIOD
        if not over:
            hard_exit(f"did not end within {waited:g} s", 128 + number)


_active: SignalState | None = None


@contextlib.contextmanager
def handle_signals():
    """Catches SIGINT, SIGTERM and SIGUSR1 while it is open; gives a :class:`SignalState`.

    In a thread other than the main one, which no signal reaches, it does nothing.
    """
    global _active
    stop = SignalState()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, stop._on_signal) for number in numbers}
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=stop._watch, args=(reader,), daemon=True).start()
    _active = stop
    try:
        yield stop
    finally:
        _active = None
        stop.deferred = True  # nothing is to be raised from here on
        stop._over.set()
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def _in_forked_child() -> None:
    """A child leaves stopping to its parent, and ends with it."""
    if _active is None:
        return
    die_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_forked_child)


def worker_init(worker: int) -> None:
    """For a loader's ``worker_init_fn``: a signal to the whole process group (timeout, Slurm) is
    obeyed by the run, which needs its readers up to the end of the step.

    PyTorch sets a handler of its own for SIGTERM after the fork, so it is not done there.
    """
    if _active is not None:  # else nobody would kill a reader that is stuck
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when the one that started it ends (on Linux).

    Where that is known by its number, and ended before now, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        hard_exit("ends: what started it is gone", 1)


def child_main(parent: int, work: bytes, *more) -> None:
    """The first thing in a process that was started by ``parent``: before the imports, of seconds,
    that unpickling ``work`` takes, a ``(function, arguments)``. They end with the parent, or by
    signals, at once; what catches errors on the way is not asked."""
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
    """As :func:`hard_exit`, some seconds from now, should this process still be there."""
    timer = threading.Timer(GRACE_PERIOD, hard_exit, (reason, 1))
    timer.daemon = True
    timer.start()


def kill_children(spared: Collection = ()) -> None:
    """Kills the processes that were started from here, other than the spared ones, and waits.

    A loader whose run failed would wait for each of its processes in turn, by seconds; and they
    pass SIGTERM over (:func:`worker_init`).
    """
    main = threading.current_thread() is threading.main_thread()
    children = [child for child in multiprocessing.active_children() if child not in spared]
    # PyTorch's handler would raise for a child that ends by a signal.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main and children else None
    for child in children:
        child.kill()
    for child in children:
        child.join(1.0)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def worker_death_error(error: BaseException) -> ChildProcessError | None:
    """What to say where a loader's process was killed; None for any other error.

    PyTorch tells of it by a signal's handler, amid whatever runs: that may fail of it, too.
    """
    text = " ".join(str(error).split())
    match = re.search(r"DataLoader worker.*?(killed by signal: \w+|exited unexpectedly)", text)
    how = match.group(1) if match and not text.startswith("Caught") else None
    if isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        # It ended while a tensor of its was on the way.
        files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        how = "in the middle of a batch" if any("reductions.py" in name for name in files) else None
    elif not isinstance(error, RuntimeError):
        how = None
    if how is None:
        return error.__context__ and worker_death_error(error.__context__)
    return ChildProcessError(
        f"a process that reads videos was lost ({how}): if nobody killed it, memory was short: "
        "lower DATA_LOADER.NUM_WORKERS. The same command goes on from what was written last"
    )


# --- processes of one run watch over each other --------------------------------------------------


class PeerWatchdog:
    """A connection from every process to the first: where one is lost, the others end.

    The kernel closes a connection with its process, however that ends; a backend may first wait
    for minutes. Whoever is done says so (:meth:`release`) before it leaves.
    """

    def __init__(self, fabric, host: str):
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self._stopped = False
        listener = socket.create_server(("", 0), backlog=self.world) if self.rank == 0 else None
        port = fabric.broadcast(listener.getsockname()[1] if listener else 0)
        if listener:
            self.peers = self._accept(listener)
        else:
            self.peers = {socket.create_connection((host, port), timeout=60.0): 0}
            next(iter(self.peers)).sendall(self.rank.to_bytes(4, "big"))
        for peer in self.peers:
            peer.settimeout(None)
        threading.Thread(target=self._watch, daemon=True).start()

    def _accept(self, listener: socket.socket) -> dict[socket.socket, int]:
        peers = {}
        with listener:
            listener.settimeout(60.0)
            while len(peers) < self.world - 1:
                peer, _ = listener.accept()
                peer.settimeout(60.0)
                peers[peer] = int.from_bytes(peer.recv(4, socket.MSG_WAITALL), "big")
        return peers

    def _watch(self) -> None:
        waiting = dict(self.peers)
        while waiting:
            ready, _, _ = select.select(list(waiting), [], [], 1.0)
            if self._stopped:
                return
            for peer in ready:
                try:
                    said = peer.recv(1)
                except OSError:
                    said = b""
                rank = waiting.pop(peer)
                if not said and not self._stopped:
                    hard_exit(f"ends: process {rank} of {self.world} is gone", 1)

    def release(self) -> None:
        """This process leaves as it should."""
        self._stopped = True
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.sendall(b".")
                peer.close()


# --- one run in a folder --------------------------------------------------------------------------


@contextlib.contextmanager
def run_lock(folder: str):
    """Keeps a local folder for this process while it is open.

    Raises:
        ValueError: where another process holds it.
    """
    if "://" in folder:
        yield
        return
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ".running")
    with open(path, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                yield  # a file system without locks
                return
            file.seek(0)
            raise ValueError(
                f"another run writes to OUTPUT_DIR {folder} ({file.read().strip() or 'unknown'}): "
                "wait for it, stop it, or choose another OUTPUT_DIR"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
