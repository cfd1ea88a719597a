"""However a run is stopped, it resumes to the same weights; nothing of it stays behind."""

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from stts_slowfast.standalone import checkpointing, engine, launch, signals
from stts_slowfast.standalone.signals import Interrupted


@pytest.fixture
def cfg(run):
    """Two workers, and augmentation."""
    run.cfg.DATA_LOADER.NUM_WORKERS, run.cfg.AUG.ENABLE = 2, True
    return run.cfg


class Signal:
    """Sends this process a signal after so many batches; ``to`` says to whom."""

    def __init__(self, batches, number, to=lambda: os.getpid()):
        self.left, self.number, self.to = batches, number, to

    def __call__(self, split, model, batch):
        self.left -= 1
        if not self.left:
            os.kill(self.to(), self.number)


@pytest.fixture
def whole(run, cfg, tmp_path):
    """The last checkpoint of an undisturbed run."""
    folder, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, str(tmp_path / "whole")
    engine.train(cfg)
    last = run.checkpoint(2)
    cfg.OUTPUT_DIR = folder
    return last


def resumes_to(run, cfg, whole):
    engine.train(cfg)
    for key in ("model_state", "optimizer_state"):
        torch.testing.assert_close(run.checkpoint(2)[key], whole[key], rtol=0, atol=0)
    assert run.checkpoints() == ["checkpoint_epoch_00001.pyth", "checkpoint_epoch_00002.pyth"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_loses_no_iteration(run, cfg, whole, number):
    with pytest.raises(Interrupted, match=r"resumes from .*within_epoch_00001_iteration_0000002"):
        engine.train(cfg, watch=Signal(4, number))  # processes tell each other in the next step
    assert len(run.json_stats("train_iter_")) == 5
    resumes_to(run, cfg, whole)
    iterations = [s["epoch"] + " " + s["iter"] for s in run.json_stats("train_iter_")]
    assert iterations[5:] == ["2/2 3/3"]
    assert multiprocessing.active_children() == []


GROUP = """
import os, signal, sys
import torch.distributed as dist
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.signals import Interrupted

left = int(sys.argv[3])

def watch(split, model, batch):
    global left
    left -= 1
    if left == 0 and not (dist.is_initialized() and dist.get_rank()):
        os.killpg(0, int(sys.argv[4]))

if __name__ == "__main__":
    try:
        engine.train(load_config(sys.argv[1]), processes=int(sys.argv[2]), watch=watch)
    except Interrupted as stopped:
        print("STOPPED", stopped)
        sys.exit(stopped.status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_the_whole_group_loses_no_iteration(run, cfg, processes, number):
    """As timeout(1) and Slurm send it: the workers get it too."""
    cfg.TRAIN.BATCH_SIZE = 2 * processes
    script = run.tmp_path / "group.py"
    script.write_text(GROUP)

    def train(batches):
        words = [sys.executable, script, run.write(), processes, batches, int(number)]
        done = subprocess.run(
            list(map(str, words)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            start_new_session=True,
        )
        return done.returncode, done.stdout

    folder, cfg.OUTPUT_DIR = cfg.OUTPUT_DIR, str(run.tmp_path / "whole")
    assert train(0)[0] == 0
    whole = run.checkpoint(2)
    cfg.OUTPUT_DIR = folder
    # obeyed after the next iteration; an epoch has 3 of them, or 2 in two processes
    status, said = train(4 if processes == 1 else 2)
    assert status == 128 + number, said
    (within,) = [name for name in run.checkpoints() if "within_epoch_00001" in name]
    assert f"{within}\n" in said.partition("STOPPED interrupted; the same command resumes from")[2]
    assert "lost" not in said and "Exception ignored" not in said
    assert train(0)[0] == 0
    for key in ("model_state", "optimizer_state"):
        torch.testing.assert_close(run.checkpoint(2)[key], whole[key], rtol=0, atol=0)


def test_a_warning_writes_a_checkpoint_and_the_run_continues(run, cfg, whole):
    seen = []

    def watch(split, model, batch):
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen.append([name for name in run.checkpoints() if "within" in name])

    engine.train(cfg, watch=watch)
    # asked for after iteration 2, all processes know with the next one
    name = "within_epoch_00000_iteration_0000002.pyth"
    assert seen[:3] == [[], [], [name]] or seen[:3] == [[], [], []]
    resumes_to(run, cfg, whole)


def test_checkpoints_by_time_are_resumed_from(run, cfg, whole):
    cfg.TRAIN.CHECKPOINT_EVERY_MINUTES = 1e-9
    kill = KeyboardInterrupt()

    def watch(split, model, batch, left=[5]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise kill

    with pytest.raises(Interrupted, match=r"within_epoch_00001_iteration_0000001"):
        engine.train(cfg, watch=watch)
    resumes_to(run, cfg, whole)
    epochs = run.json_stats("train_epoch")
    cfg.TRAIN.CHECKPOINT_EVERY_MINUTES, cfg.TRAIN.AUTO_RESUME = 0.0, False
    engine.train(cfg)  # the sums of an epoch's line are resumed too
    again = run.json_stats("train_epoch")[len(epochs) :]
    assert [s["loss"] for s in epochs] == [s["loss"] for s in again]


def test_another_batch_size_inside_an_epoch_is_refused(run, cfg):
    with pytest.raises(Interrupted):
        engine.train(cfg, watch=Signal(4, signal.SIGTERM))
    cfg.TRAIN.BATCH_SIZE, cfg.MIXUP.ENABLE = 1, False
    with pytest.raises(ValueError, match=r"is 2 of 3 iterations .* now has 7: .*BATCH_SIZE"):
        engine.train(cfg)


def test_a_killed_worker_is_one_line(run, cfg, whole):
    def worker():
        return multiprocessing.active_children()[0].pid

    with pytest.raises(ChildProcessError, match=r"reads videos was lost .*resumes from the last"):
        engine.train(cfg, watch=Signal(4, signal.SIGKILL, worker))
    assert multiprocessing.active_children() == []
    resumes_to(run, cfg, whole)


def test_a_lost_worker_is_distinguished_from_its_errors():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert "(killed by signal: Killed)" in str(signals.worker_death_error(error))
    amid = KeyError("a thread that was being started")
    amid.__context__ = error
    assert signals.worker_death_error(amid)
    for error in (
        RuntimeError("Caught ValueError in DataLoader worker process 0. exited unexpectedly"),
        ConnectionResetError("of a disk in the net"),
    ):
        assert signals.worker_death_error(error) is None


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped"])
def test_a_corrupt_last_checkpoint_is_logged_and_the_one_before_used(run, cfg, whole, damage):
    engine.train(cfg)
    path = run.folder / "checkpoints" / "checkpoint_epoch_00002.pyth"
    data = path.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    path.write_bytes({"empty": b"", "truncated": data[:middle], "flipped": flipped}[damage])
    with pytest.raises(ValueError, match=r"00002\.pyth cannot be read .*strict-resume"):
        engine.train(cfg, strict_resume=True)
    with pytest.raises(ValueError, match=r"00002\.pyth cannot be read .*strict-resume"):
        engine.test(cfg, strict_resume=True)
    resumes_to(run, cfg, whole)
    log = (run.folder / "stdout.log").read_text()
    assert "00002.pyth cannot be read" in log and "resuming from the checkpoint before" in log


def test_the_last_checkpoint_is_that_of_the_largest_number(run, cfg):
    folder = run.folder / "checkpoints"
    folder.mkdir(parents=True)
    names = [
        "checkpoint_epoch_100000.pyth",
        "within_epoch_99999_iteration_0000007.pyth",
        "checkpoint_epoch_99999.pyth",
        "within_epoch_00003_iteration_0000010.pyth",
    ]
    for name in reversed(names):
        (folder / name).touch()
    (folder / ".partial-12.tmp").touch()
    assert checkpointing.checkpoints(cfg) == [str(folder / name) for name in names]
    checkpointing.remove_unfinished(cfg)
    assert run.checkpoints() == sorted(names)


HOLD = """
import sys
from stts_slowfast.standalone.launch import run_lock
lock = run_lock(sys.argv[1])
lock.__enter__()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_in_a_folder_is_refused_at_once(run, cfg):
    run.folder.mkdir()
    command = [sys.executable, "-c", HOLD, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"another run .*process {other.pid} on .*OUTPUT_DIR"):
            engine.train(cfg)
        other.stdin.close()
    cfg.SOLVER.MAX_EPOCH = 1
    engine.train(cfg)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(fcntl, "flock", fail)
    with launch.run_lock(str(tmp_path)):
        assert (tmp_path / ".running").read_text().startswith(f"process {os.getpid()} on ")


DEAF = """
import contextlib, hashlib, sys
from stts_slowfast.standalone import signals
signals.GRACE_PERIOD = 1.0
with signals.handle_signals() as stop:
    stop.deferred = sys.argv[1] == "deferred"
    while True:  # on, where the signal comes before it is deaf
        with contextlib.suppress(KeyboardInterrupt):
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes without a look at signals
"""


@pytest.mark.parametrize(
    ("state", "waited"), [("deferred", b"1 s"), ("nothing to save", b"0.25 s")]
)
def test_a_process_that_reads_no_signal_ends_all_the_same(state, waited):
    command = [sys.executable, "-c", DEAF, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            process.terminate()
            assert process.wait(timeout=30) == 128 + signal.SIGTERM
            assert b"did not end within " + waited in process.stderr.read()
        finally:
            process.kill()


HUNG = """
import os, sys
from stts_slowfast.standalone import data, engine, signals
from stts_slowfast.standalone.config import load_config

def hung(path, **keys):
    os.write(1, b"waits\\n")
    return open(sys.argv[2])  # a pipe that nobody writes to

signals.GRACE_PERIOD, data.open_video = 1.0, hung
engine.train(load_config(sys.argv[1]))
"""


@pytest.mark.parametrize(("workers", "number"), [(0, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_read_that_hangs_does_not_keep_a_run_from_ending(run, cfg, workers, number):
    cfg.DATA_LOADER.NUM_WORKERS = workers
    pipe = run.tmp_path / "pipe"
    os.mkfifo(pipe)
    words = [sys.executable, "-c", HUNG, str(run.write()), str(pipe)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, start_new_session=True, **pipes)
    try:
        for _ in range(workers or 1):
            wait_for("waits", process)
        os.killpg(process.pid, number)
        assert process.wait(timeout=30) == 128 + number and all_gone(process.pid)
        said = process.stdout.read()
        assert "did not end within 1 s" in said and "Traceback" not in said
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


LATE = """
import os, signal, subprocess, sys
from stts_slowfast.standalone import signals
signal.signal(signal.SIGCHLD, lambda *_: None)  # as PyTorch's loaders do
with signals.handle_signals() as stop:
    stop.deferred = True
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(20):
        subprocess.run([sys.executable, "-S", "-c", ""])
"""


def test_children_that_end_after_a_signal_print_nothing():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def alive(session):
    """The processes of a session that are more than a table's entry."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, _, _, its_session = file.read().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(pid))
    return found


def all_gone(session):
    """Whether all processes of a session are gone within 10 s."""
    until = time.monotonic() + 10
    while alive(session) and time.monotonic() < until:
        time.sleep(0.1)
    return not alive(session)


def wait_for(text, process):
    """Reads a command's output up to a line with this text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError(f"no {text!r} in {lines}")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_takes_all_others_along(run, cfg, processes):
    cfg.SOLVER.MAX_EPOCH, cfg.MIXUP.ENABLE = 1000, False  # a clip has none to be mixed with
    process = run.start("--processes", str(processes))
    try:
        wait_for('"epoch": "2/1000"', process)
        everyone = alive(process.pid)
        # the one that was started last except for the workers: a rank, or the run itself
        victim = process.pid if processes == 1 else sorted(ranks(process.pid))[-1]
        os.kill(victim, signal.SIGKILL)
        assert len(everyone) >= 1 + 2 * processes and all_gone(process.pid)
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def ranks(parent):
    found = []
    for pid in alive(parent):
        with open(f"/proc/{pid}/stat") as file:
            its_parent = int(file.read().rpartition(") ")[2].split()[1])
        with open(f"/proc/{pid}/cmdline") as file:
            if its_parent == parent and "spawn_main" in file.read():
                found.append(pid)
    return found


def test_forked_children_leave_signals_to_their_parent():
    with signals.handle_signals():
        context = multiprocessing.get_context("fork")
        reader, writer = context.Pipe(duplex=False)
        child = context.Process(target=_handlers, args=(writer,))
        child.start()
        assert reader.recv() == [signal.SIG_IGN, signal.SIG_DFL, -1]
        child.join()


def _handlers(writer):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    writer.send([*handlers, signal.set_wakeup_fd(-1)])


def test_a_signal_while_processes_are_started_reaches_them(run, cfg, monkeypatch):
    def signalled(child):
        os.kill(os.getpid(), signal.SIGTERM)
        start(child)

    start = multiprocessing.context.SpawnProcess.start
    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", signalled)
    with pytest.raises(Interrupted, match="there is no checkpoint yet"):
        engine.train(cfg, processes=2)


IMPORTS = """
import multiprocessing, os, pickle
from stts_slowfast.standalone.signals import child_main

class Slow:
    def __reduce__(self):
        code = "import os, sys, time; print('torch' in sys.modules, os.getpid(), flush=True)"
        return exec, (code + "; time.sleep(100)",)

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    child = spawn.Process(target=child_main, args=(os.getpid(), pickle.dumps(Slow())))
    child.start()
    child.join()
    print("ended", -child.exitcode)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_still_imports_ends_at_once(tmp_path, number):
    """By a signal, and with what started it."""
    script = tmp_path / "imports.py"
    script.write_text(IMPORTS)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, script], start_new_session=True, **pipes)
    torch_is_there, child = process.stdout.readline().split()
    os.kill(process.pid if number == signal.SIGKILL else int(child), number)
    try:
        assert all_gone(process.pid) and torch_is_there == "False"
        said = "" if number == signal.SIGKILL else f"ended {int(number)}\n"
        assert process.stdout.read() == said
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_a_signal_at_the_very_end_leaves_no_worker(run, cfg, monkeypatch):
    kill_children = launch.kill_children

    def signalled(spared):
        os.kill(os.getpid(), signal.SIGINT)
        kill_children(spared)

    monkeypatch.setattr(launch, "kill_children", signalled)
    try:
        with pytest.raises(Interrupted, match=r"resumes from .*checkpoint_epoch_00002"):
            engine.train(cfg)
        assert multiprocessing.active_children() == []
    finally:
        signals.kill_children()


def test_the_parent_of_a_process_may_be_gone_already():
    code = "from stts_slowfast.standalone.signals import die_with_parent as die; die({}); print(1)"
    for parent, status in (("__import__('os').getppid()", 0), (0, 1)):
        words = [sys.executable, "-c", code.format(parent)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (status, "" if status else "1\n")
    assert "its parent process has exited" in done.stderr


def test_names_that_are_numbers_are_refused(run, cfg, tmp_path):
    path = str(tmp_path / "numbers.pyth")
    torch.save({"model_state": {0: torch.zeros(1), 1: torch.zeros(1)}}, path)
    cfg.TRAIN.CHECKPOINT_FILE_PATH, cfg.TRAIN.CHECKPOINT_CLEAR_NAME_PATTERN = path, ("module.",)
    with pytest.raises(ValueError, match=r"numbers\.pyth"):
        engine.train(cfg)
