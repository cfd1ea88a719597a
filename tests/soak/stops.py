"""Stops a run again and again, by signals at any moment, and looks at what is left.

    python tests/soak/stops.py [--stops 100] [--minutes 30] [--processes 1] [--seed 0]

A small training with two readers and augmentation is stopped by SIGINT, SIGTERM or SIGKILL to the
command, to one of its processes, or to all of them, and started again until it is done. After each
stop every process must be gone within 10 s, and nothing left in /dev/shm; the last weights must be
those of an undisturbed run, bit for bit. Then the next run begins. Not part of the test suite.
"""

import argparse
import contextlib
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

from stts_slowfast.tools import makedata

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=30.0, help="no new stop after so long")
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, until = random.Random(args.seed), time.monotonic() + 60.0 * args.minutes
    counts, faults = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        makedata.write_dataset(str(folder / "data"), "square", 24, 4, args.seed)
        started = time.monotonic()
        process = start(folder, "whole", args)
        if process.wait() != 0:
            print((folder / "whole.log").read_text())
            return 1
        whole, seconds = last_weights(folder, "whole"), time.monotonic() - started
        print(f"undisturbed: {seconds:.0f} s", flush=True)
        number = 0
        while counts["stops"] < args.stops and time.monotonic() < until:
            number += 1
            name = f"run{number}"
            while True:
                process = start(folder, name, args)
                moment = chance.uniform(0.2, 1.1) * seconds
                try:
                    status = process.wait(moment)
                except subprocess.TimeoutExpired:
                    fault = stop(process, chance, counts)
                    faults += [fault] if fault else []
                    print(f"{counts['stops']} stops: {fault or 'ok'}", flush=True)
                    if counts["stops"] >= args.stops or time.monotonic() > until:
                        process = start(folder, name, args)  # to its end
                        status = process.wait()
                        break
                    continue
                break
            if status != 0:
                faults.append(f"{name} ended with {status}: {(folder / f'{name}.log').read_text()}")
            elif not same(last_weights(folder, name), whole):
                faults.append(f"{name} ended in other weights")
            counts["runs"] += 1
            shutil.rmtree(folder / name)
    print(dict(counts), "faults:", len(faults), *faults, sep="\n")
    return int(bool(faults))


def start(folder: Path, name: str, args) -> subprocess.Popen:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(settings(folder, name, args)))
    words = ["run", "--engine", "standalone", "--cfg", str(config)]
    with open(folder / f"{name}.log", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "stts_slowfast", *words, "--processes", str(args.processes)],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def settings(folder: Path, name: str, args) -> dict:
    data = str(folder / "data")
    side = 32
    return {
        "TRAIN": {"BATCH_SIZE": 4, "EVAL_PERIOD": 1, "CHECKPOINT_PERIOD": 1},
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
        "SOLVER": {"MAX_EPOCH": args.epochs, "BASE_LR": 1e-3, "OPTIMIZING_METHOD": "adamw"},
        "DATA_LOADER": {"NUM_WORKERS": 2},
        "NUM_GPUS": 0,
        "LOG_MODEL_INFO": False,
        "OUTPUT_DIR": str(folder / name),
    }


def stop(process: subprocess.Popen, chance: random.Random, counts: Counter) -> str | None:
    """Stops the run one way or the other; what is wrong afterwards."""
    members = alive(process.pid)
    if not members:
        return None
    number = chance.choice(SIGNALS)
    whom = chance.choice(("command", "one", "all"))
    targets = {"command": [process.pid], "one": [chance.choice(members)], "all": members}[whom]
    before = shared_memory()
    for pid in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    what = f"{signal.Signals(number).name} to {whom}"
    counts["stops"] += 1
    counts[what] += 1
    # A reader passes both over, as the run is asked too where they are meant for it.
    reader = whom == "one" and number != signal.SIGKILL and targets != [process.pid]
    until = time.monotonic() + 10.0
    while (left := alive(process.pid)) and time.monotonic() < until:
        process.poll()
        time.sleep(0.05)
    if left and reader:
        os.kill(process.pid, signal.SIGTERM)
        until = time.monotonic() + 10.0
        while (left := alive(process.pid)) and time.monotonic() < until:
            process.poll()
            time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    if left:
        return f"{what}: {len(left)} of {len(members)} processes were there after 10 s"
    if new := {name for name in shared_memory() - before if of(name, members)}:
        return f"{what}: /dev/shm has {', '.join(sorted(new))}"
    return None


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def of(name: str, members: list[int]) -> bool:
    """Whether a file in /dev/shm is by one of these processes: its name has their number."""
    return any(str(pid) in name for pid in members)


def alive(session: int) -> list[int]:
    """The processes of a session that are more than a table's entry."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        state, _, _, its_session = stat.rpartition(") ")[2].split()[:4]
        if int(its_session) == session and state not in "ZX":
            found.append(int(pid))
    return sorted(found)


def last_weights(folder: Path, name: str) -> dict:
    path = sorted((folder / name / "checkpoints").glob("checkpoint_epoch_*"))[-1]
    return torch.load(path, weights_only=True)["model_state"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


if __name__ == "__main__":
    sys.exit(main())
