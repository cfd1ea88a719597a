"""Stops a run again and again by signals at random moments, and checks what remains.

    python tests/soak/stops.py [--stops 100] [--minutes 60] [--processes 1] [--seed 0]

A small training with two workers and augmentation is stopped by SIGINT, SIGTERM or SIGKILL to the
command, to a rank, to a worker or to all of them, and started again until it is done. After each
stop every process must be gone within 10 s, and nothing left in /dev/shm; the last weights must be
those of an undisturbed run, bit for bit. Then the next run begins. Not part of the test suite.

The command is forked from a process that has imported everything, because imports would take most
of the time. With several processes, the ranks import for themselves.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import yaml

from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
SOON = 10.0  # seconds in which all processes must end
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["__main__", "stts_slowfast.tools.run", "stts_slowfast.standalone.engine"]
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit for new stops")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, until = random.Random(args.seed), time.monotonic() + 60.0 * args.minutes
    counts, faults, stops = Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_data.write_dataset(str(folder / "data"), "needle", 24, 4, args.seed)
        start(folder, "warm", args, epochs=1).join()  # compiles and reads files
        process, started = start(folder, "whole", args), time.monotonic()
        startup = begin(process, folder / "whole") - started
        process.join()
        if process.exitcode != 0:
            print((folder / "whole.log").read_text())
            return 1
        whole, work = last_weights(folder, "whole"), time.monotonic() - started - startup
        print(f"undisturbed: {startup:.1f} s to start, {work:.1f} s of work", flush=True)
        while more := stops < args.stops and time.monotonic() < until:
            name = f"run{counts['runs']}"
            while process := start(folder, name, args):
                if more and rng.random() < 0.2:
                    process.join(rng.uniform(0.1, 1.0) * startup)
                elif more:
                    begin(process, folder / name)
                    process.join(rng.uniform(0.0, 0.7) * work)
                else:
                    process.join()
                while process.exitcode is None and not alive(process.pid):
                    time.sleep(0.02)  # it has no session yet
                if process.exitcode is not None:
                    break
                what, fault = stop(process, rng, args.processes)
                faults += [f"{name}, {what}: {fault}"] if fault else []
                counts[what] += 1
                stops += 1
                print(f"{stops} stops: {what}: {fault or 'ok'}", flush=True)
                more = stops < args.stops and time.monotonic() < until
            log = folder / f"{name}.log"
            if process.exitcode != 0:
                faults.append(f"{name} ended with {process.exitcode}: {log.read_text()}")
            elif not same(last_weights(folder, name), whole):
                faults.append(f"{name} ended in other weights")
            counts["runs"] += 1
            shutil.rmtree(folder / name)
    print(f"{stops} stops", *(f"{n} {what}" for what, n in sorted(counts.items())), sep="\n")
    print("faults:", len(faults), *faults, sep="\n")
    return int(bool(faults))


def start(folder: Path, name: str, args, epochs: int = 0):
    """Starts ``stts run`` in its own process and session."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings(folder, name, epochs or args.epochs)))
    words = ["run", "--engine", "standalone", "--cfg", str(config)]
    words += ["--processes", str(args.processes)]
    process = FORKS.Process(target=command, args=(words, str(folder / f"{name}.log")))
    process.start()
    return process


def begin(process, folder: Path) -> float:
    """Waits until the run has the lock of its folder, or is over; returns the time."""
    started = time.time()
    while process.exitcode is None:
        with contextlib.suppress(FileNotFoundError):
            if (folder / ".running").stat().st_mtime > started:
                break
        time.sleep(0.02)
    return time.monotonic()


def command(words: list[str], log: str) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(cli.main(words))


def settings(folder: Path, name: str, epochs: int) -> dict:
    data = str(folder / "data")
    side = 32
    return {
        "TRAIN": {"BATCH_SIZE": 4, "EVAL_PERIOD": 1, "CHECKPOINT_EVERY_MINUTES": 0.03},
        "TEST": {"ENABLE": False},
        "AUG": {"ENABLE": True},
        "DATA": {
            "PATH_TO_DATA_DIR": data,
            "PATH_PREFIX": os.path.join(data, "videos"),
            "NUM_FRAMES": 8,
            "SAMPLING_RATE": 2,
            "TRAIN_JITTER_SCALES": [side, side],
            "TRAIN_CROP_SIZE": side,
            "TEST_CROP_SIZE": side,
            "INPUT_CHANNEL_NUM": [3],
        },
        "MODEL": {"ARCH": "mvit", "MODEL_NAME": "MViT", "NUM_CLASSES": 8},
        "MVIT": {"DEPTH": 2, "EMBED_DIM": 16, "SEP_POS_EMBED": True, "DROPPATH_RATE": 0.1},
        "STTS": {"ENABLE": True, "TIME": {"BLOCKS": [0]}, "SPACE": {"BLOCKS": [1]}},
        "SOLVER": {"MAX_EPOCH": epochs, "BASE_LR": 1e-3, "OPTIMIZING_METHOD": "adamw"},
        "DATA_LOADER": {"NUM_WORKERS": 2},
        "NUM_GPUS": 0,
        "LOG_MODEL_INFO": False,
        "OUTPUT_DIR": str(folder / name),
    }


def stop(process, rng: random.Random, processes: int) -> tuple[str, str | None]:
    """Stops the run in a random way: what was done, and what is wrong afterwards."""
    number, family = rng.choice(SIGNALS), alive(process.pid)
    members = sorted(family)

    def level(pid: int) -> int:
        return 1 + level(family[pid]) if pid in family and pid != process.pid else 0

    names = ["command", *(["rank"] if processes > 1 else []), *["worker"] * 2]
    kinds = {name: [pid for pid in members if names[level(pid)] == name] for name in names}
    kinds["all"] = members
    whom = rng.choice([kind for kind, pids in kinds.items() if pids])
    targets = members if whom == "all" else [rng.choice(kinds[whom])]
    what = f"{signal.Signals(number).name} to {whom}"
    before = set(os.listdir("/dev/shm"))
    send(number, targets)
    if whom == "worker" and number != signal.SIGKILL:  # it ignores that
        process.join(1.0)
        if process.exitcode:
            return what, f"the run ended of it with {process.exitcode}"
        send(signal.SIGTERM, [process.pid])
    until = time.monotonic() + SOON
    while (left := alive(process.pid)) and time.monotonic() < until:
        process.join(0.05)
    for pid in left if shutil.which("py-spy") else ():  # their stacks
        subprocess.run(["py-spy", "dump", "--pid", str(pid)])
    send(signal.SIGKILL, left)
    process.join()
    if left:
        return what, f"{len(left)} of {len(members)} processes were there after {SOON:g} s"
    # The name of a file in /dev/shm contains the id of its process.
    new = set(os.listdir("/dev/shm")) - before
    if of_these := [name for name in new if any(str(pid) in name for pid in members)]:
        return what, f"/dev/shm has {', '.join(sorted(of_these))}"
    return what, None


def send(number: int, pids) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(session: int) -> dict[int, int]:
    """The processes of a session that have not ended, and the parent of each."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        state, parent, _, its_session = stat.rpartition(") ")[2].split()[:4]
        if int(its_session) == session and state not in "ZX":
            found[int(pid)] = int(parent)
    return found


def last_weights(folder: Path, name: str) -> dict:
    path = sorted((folder / name / "checkpoints").glob("checkpoint_epoch_*"))[-1]
    return torch.load(path, weights_only=True)["model_state"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


if __name__ == "__main__":
    sys.exit(main())
