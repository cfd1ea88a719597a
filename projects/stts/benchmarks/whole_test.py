"""Times whole tests of a small MViT, from the command to its accuracy, several ways in turn.

    SLOWFAST_ROOT=/path/to/SlowFast python projects/stts/benchmarks/whole_test.py [--json FILE]

Six H.264 videos of 10 s, 340x256, 30 frames per second, are tested with 10x3 views by a 4-block
MViT (widths 48 and 96, 16 frames of 112x112), which is trained on the same videos first. Each way
is a command: SlowFast's unmodified ``tools/run_net.py`` without selection, with the first version
of this package that patched SlowFast enough for a test (--before); the same with the current
package; and ``stts run``. "Selected" keeps half of the frames before block 0 and a window of 0.9
before block 2. Seconds are medians of the rounds; core-seconds include all child processes.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import yaml

from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench.command import machine

ROOT = Path(__file__).resolve().parents[3]
NUM_VIDEOS = 6

CONFIG = {
    "TRAIN": {"DATASET": "kinetics", "BATCH_SIZE": NUM_VIDEOS, "EVAL_PERIOD": 100},
    "DATA": {
        "NUM_FRAMES": 16,
        "SAMPLING_RATE": 4,
        "TRAIN_JITTER_SCALES": [112, 128],
        "TRAIN_CROP_SIZE": 112,
        "TEST_CROP_SIZE": 112,
        "INPUT_CHANNEL_NUM": [3],
        "DECODING_BACKEND": "torchvision",
    },
    "MODEL": {"MODEL_NAME": "MViT", "ARCH": "mvit", "NUM_CLASSES": NUM_VIDEOS, "DROPOUT_RATE": 0.0},
    "MVIT": {
        "DEPTH": 4,
        "EMBED_DIM": 48,
        "PATCH_KERNEL": [3, 7, 7],
        "PATCH_STRIDE": [2, 4, 4],
        "PATCH_PADDING": [1, 3, 3],
        "NUM_HEADS": 1,
        "MODE": "conv",
        "SEP_POS_EMBED": True,
        "DROPPATH_RATE": 0.0,
        "DIM_MUL": [[2, 2.0]],
        "HEAD_MUL": [[2, 2.0]],
        "POOL_KVQ_KERNEL": [3, 3, 3],
        "POOL_KV_STRIDE_ADAPTIVE": [1, 4, 4],
        "POOL_Q_STRIDE": [[2, 1, 2, 2]],
    },
    "SOLVER": {"OPTIMIZING_METHOD": "adamw", "BASE_LR": 0.001, "ZERO_WD_1D_PARAM": True},
    "TEST": {"DATASET": "kinetics", "NUM_ENSEMBLE_VIEWS": 10, "NUM_SPATIAL_CROPS": 3},
    "DATA_LOADER": {"NUM_WORKERS": 2, "PIN_MEMORY": False},
    "NUM_GPUS": 0,
    "LOG_MODEL_INFO": False,
}
SELECTED = "STTS.ENABLE True STTS.TIME.KEEP [0.5] STTS.SPACE.BLOCKS [2] STTS.SPACE.KEEP [0.9]"


def write_video(path: Path, number: int) -> None:
    """A drifting texture with grain; the tint depends on the video's number."""
    rng = np.random.default_rng(number)
    texture = np.kron(rng.integers(0, 160, (60, 80, 1)), np.ones((8, 8, 1), int))
    tint = np.array([60 * (number & 1), 60 * (number >> 1 & 1), 60 * (number >> 2)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 256, 340, "yuv420p"
        for time in range(300):
            image = texture[time // 3 : time // 3 + 256, time : time + 340] + tint
            image = (image + rng.integers(0, 16, image.shape)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def prepare(folder: Path) -> dict[str, Path]:
    """Writes videos, lists and a config; returns the checkpoints of both models."""
    lines = []
    for number in range(NUM_VIDEOS):
        write_video(folder / f"{number}.mp4", number)
        lines.append(f"{folder / f'{number}.mp4'} {number}\n")
    (folder / "test.csv").write_text("".join(lines))
    for split in ("train", "val"):  # repeated videos make an epoch of several iterations
        (folder / f"{split}.csv").write_text("".join(lines * (4 if split == "train" else 1)))
    CONFIG["DATA"]["PATH_TO_DATA_DIR"] = str(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    trained = {}
    for name, epochs, words in (("all", 4, "STTS.ENABLE False"), ("selected", 2, SELECTED)):
        words += f" SOLVER.MAX_EPOCH {epochs} TEST.ENABLE False OUTPUT_DIR {folder / name}"
        if trained:
            words += f" TRAIN.CHECKPOINT_FILE_PATH {trained['all']}"
            words += " TRAIN.CHECKPOINT_EPOCH_RESET True STTS.FREEZE_BACKBONE_EPOCHS 0.0"
        run([*standalone(folder), *words.split()], environment(ROOT))
        trained[name] = folder / name / "checkpoints" / f"checkpoint_epoch_{epochs:05d}.pyth"
    return trained


def standalone(folder: Path) -> list[str]:
    command = [sys.executable, "-m", "stts_slowfast", "run", "--engine", "standalone", "--cfg"]
    return [*command, str(folder / "config.yaml"), "--opts"]


def environment(package: Path) -> dict[str, str]:
    """Environment of a command that imports stts_slowfast from the checkout ``package``."""
    paths = [str(package), *filter(None, [os.environ.get("SLOWFAST_ROOT")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(words: list[str], env: dict[str, str], cwd: str | None = None) -> tuple[float, float, str]:
    """Wall-clock seconds, core-seconds and output of a command."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    busy = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
    return seconds, busy, done.stdout + done.stderr


def ways(folder: Path, trained: dict[str, Path], before: Path | None) -> dict:
    """Name -> arguments, environment and working directory of a command."""
    test = f"TRAIN.ENABLE False TEST.BATCH_SIZE 10 OUTPUT_DIR {folder / 'test'} "
    off = [*(test + "STTS.ENABLE False TEST.CHECKPOINT_FILE_PATH ").split(), str(trained["all"])]
    on = [*(test + SELECTED).split(), "TEST.CHECKPOINT_FILE_PATH", str(trained["selected"])]
    found = {}
    if root := os.environ.get("SLOWFAST_ROOT"):
        launcher = [sys.executable, "tools/run_net.py", "--cfg", str(folder / "config.yaml")]
        launcher.append("--opts")
        if before:
            found["run_net.py, before, all tokens"] = [*launcher, *off], environment(before), root
        found["run_net.py, all tokens"] = [*launcher, *off], environment(ROOT), root
        found["run_net.py, selected"] = [*launcher, *on], environment(ROOT), root
    found["stts run, all tokens"] = [*standalone(folder), *off], environment(ROOT), None
    found["stts run, selected"] = [*standalone(folder), *on], environment(ROOT), None
    return found


def top1(log: str) -> float:
    (line,) = re.findall(r"json_stats: (\{.*test_final.*\})", log)
    return float(json.loads(line)["top1_acc"])


@contextlib.contextmanager
def checkout(commit: str, folder: Path):
    """A worktree of this repository at a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", default="bb2c245", help="a commit of this repository")
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        before = stack.enter_context(checkout(arguments.before, folder / "before"))
        commands = ways(folder, prepare(folder), before)
        print("videos and checkpoints are ready", file=sys.stderr)
        rows = [{"way": way, "seconds": [], "core_seconds": [], "top1": []} for way in commands]
        for number in range(arguments.rounds):
            for row, command in zip(rows, commands.values()):
                seconds, busy, log = run(*command)
                row["seconds"].append(seconds)
                row["core_seconds"].append(busy)
                row["top1"].append(top1(log))
                last = {key: value if key == "way" else value[-1] for key, value in row.items()}
                print(number + 1, last, file=sys.stderr)
            if arguments.json:
                write_json(arguments.json, machine("cpu") | {"rows": rows})


if __name__ == "__main__":
    main()
