"""SlowFast's own launcher, unmodified, on generated videos: train, kill, resume, test."""

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def command(checkout, videos, tmp_path_factory):
    """``command(*opts)``: words and working folder of a run with selection."""
    points = importlib.metadata.entry_points(group="torch.backends")
    if "stts_slowfast" not in {point.name for point in points}:
        pytest.skip("stts-slowfast is not installed, so import torch does not load it")

    def make(output: Path, *opts: str) -> list[str]:
        words = [sys.executable, "tools/run_net.py", "--cfg", str(TINY), "--opts"]
        words += ["DATA.PATH_TO_DATA_DIR", str(videos), "OUTPUT_DIR", str(output)]
        return [*words, "STTS.ENABLE", "True", *opts]

    return make


def run(words: list[str], checkout: Path) -> str:
    done = subprocess.run(
        words, cwd=checkout, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    from stts_slowfast.pyslowfast import launch

    return {**launch.environment(launch.find_launcher()), "OMP_NUM_THREADS": "1"}


def json_stats(log: str) -> list[dict]:
    return [json.loads(line) for line in re.findall(r"json_stats: (\{.*\})", log)]


def test_a_killed_run_resumes_and_is_tested(command, checkout, tmp_path):
    words = command(tmp_path, "DATA.DECODING_BACKEND", "pyav")
    first = tmp_path / "checkpoints" / "checkpoint_epoch_00001.pyth"
    with open(tmp_path / "killed.log", "w") as log:
        process = subprocess.Popen(
            # Many epochs of the same length, so that it cannot be over before it is killed.
            [*words, "SOLVER.MAX_EPOCH", "50"], cwd=checkout, env=environment(),
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        deadline = time.time() + 240
        while not first.exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)  # until the file is whole
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert first.exists(), (tmp_path / "killed.log").read_text()[-4000:]
    for later in first.parent.glob("*"):
        if later != first:
            later.unlink()

    log = run(words, checkout)
    assert "Load from last checkpoint" in log and "Start epoch: 2" in log
    assert "missing keys: []" in log and "unexpected keys: []" in log
    stats = json_stats(log)
    train = [line for line in stats if line.get("_type") == "train_iter_"]
    assert [line["epoch"] for line in train] == ["2/2"] * 3
    # sigma continues where training was: from the middle of two epochs down to 0.
    assert [line["sigma"] for line in train] == pytest.approx(
        [0.05, 0.05 * 2 / 3, 0.05 / 3], abs=1e-6
    )
    # It began from random weights, and resuming from a checkpoint does not change that.
    assert all(line["backbone_lr"] == pytest.approx(line["lr"], abs=1e-5) for line in train)
    assert "resumed: everything learns" in log
    assert any(line.get("_type") == "val_epoch" for line in stats)
    (final,) = [line for line in stats if line.get("split") == "test_final"]
    assert 0 <= float(final["top1_acc"]) <= 100
    assert log.count("STTS time_0: learned frames before block 0") == 2  # training, testing


def test_two_epochs_with_the_torchvision_backend(command, checkout, tmp_path):
    log = run(command(tmp_path, "DATA.DECODING_BACKEND", "torchvision"), checkout)
    (line,) = [line for line in log.splitlines() if line.startswith("stts_slowfast: ")]
    assert "patched SlowFast in memory: " in line and "decoder" in line
    imports_meta = "vision.fair" in (checkout / "tools" / "run_net.py").read_text()
    assert ("vision_imports" in line) == imports_meta  # patched only if needed
    stats = json_stats(log)
    train = [line for line in stats if line.get("_type") == "train_iter_"]
    assert [line["epoch"] for line in train] == ["1/2"] * 3 + ["2/2"] * 3
    assert "from random weights: everything learns" in log
    assert all(line["backbone_lr"] > 0 for line in train)
    sigmas = [0.1 * (1 - i / 6) for i in range(6)]
    assert [line["sigma"] for line in train] == pytest.approx(sigmas, abs=1e-6)
    assert [line["unreadable"] for line in stats if line.get("_type") == "train_epoch"] == [1, 1]
    assert sum(line.get("_type") == "val_epoch" for line in stats) == 2
    assert sum(line.get("split") == "test_final" for line in stats) == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "checkpoint_epoch_00001.pyth",
        "checkpoint_epoch_00002.pyth",
    }


def test_fine_tuning_freezes_and_caps_the_backbone(command, checkout, tmp_path):
    run(command(tmp_path / "first", "STTS.ENABLE", "False", "TEST.ENABLE", "False"), checkout)
    trained = tmp_path / "first" / "checkpoints" / "checkpoint_epoch_00002.pyth"
    opts = ("TRAIN.CHECKPOINT_FILE_PATH", str(trained), "TRAIN.CHECKPOINT_EPOCH_RESET", "True")
    opts += ("STTS.TEACHER", "saliency", "TEST.ENABLE", "False")
    log = run(command(tmp_path / "second", *opts), checkout)
    assert "from trained weights: the backbone is frozen for 0.5 epochs" in log
    train = [line for line in json_stats(log) if line.get("_type") == "train_iter_"]
    # STTS.FREEZE_BACKBONE_EPOCHS is 0.5: two iterations of three.
    assert [line["backbone_lr"] > 0 for line in train] == [False, False, True, True, True, True]


def test_one_checkpoint_of_a_range_is_tested_at_one_budget(command, checkout, tmp_path):
    """Training validates at the high end; a test that names no budget is refused."""
    words = command(tmp_path, "SOLVER.MAX_EPOCH", "1", "STTS.TIME.KEEP", "[[0.25, 1.0]]")
    log = run([*words, "TEST.ENABLE", "False"], checkout)
    assert "keep 0.25 to 1, 4x8x8 -> 4x8x8" in log and '"_type": "val_epoch"' in log
    words += ["TRAIN.ENABLE", "False"]
    done = subprocess.run(words, cwd=checkout, env=environment(), capture_output=True, text=True)
    assert done.returncode and 'give one share to test (--opts STTS.TIME.KEEP "[1]")' in done.stderr
    log = run([*words, "STTS.TIME.KEEP", "[0.5]"], checkout)
    assert "4x8x8 -> 2x8x8" in log and '"split": "test_final"' in log


def test_tensorboard_shows_what_each_validation_keeps(command, checkout, tmp_path):
    run(command(tmp_path, "TENSORBOARD.ENABLE", "True", "TEST.ENABLE", "False"), checkout)
    events = EventAccumulator(str(next(tmp_path.glob("runs-*"))))
    events.Reload()
    shown = events.Images("Val/kept")
    assert [each.step for each in shown] == [0, 1]
    assert shown[0].height > 600  # a row for each of four clips


def test_videos_that_cannot_be_read_are_not_scored_in_silence(command, checkout, bad_lists):
    out = bad_lists / "out"
    words = command(out, "DATA.PATH_TO_DATA_DIR", str(bad_lists), "TRAIN.ENABLE", "False")

    def test(*opts):
        return subprocess.run(
            [*words, "DATA_LOADER.NUM_WORKERS", "2", *opts], cwd=checkout, env=environment(),
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    refused = test()
    assert refused.returncode != 0
    assert "2 of the test videos cannot be read" in refused.stderr
    assert "broken.mp4: " in refused.stderr and "half.mp4: " in refused.stderr
    assert "test_final" not in refused.stdout + refused.stderr
    allowed = test("TEST.ALLOW_MISSING", "True")
    assert allowed.returncode == 0, allowed.stderr[-4000:]
    (final,) = [line for line in json_stats(allowed.stdout + allowed.stderr) if "top1_acc" in line]
    assert final["unreadable"] == 2
    readable = float(final["top1_acc_readable"])
    assert float(final["top1_acc"]) == pytest.approx(0.6 * readable, abs=0.01)
    assert len((out / "bad_videos.jsonl").read_text().splitlines()) == 2  # also over restarts


def stts(*words: str, **env: str) -> subprocess.CompletedProcess:
    """The command ``stts``."""
    code = "import sys; from stts_slowfast.tools.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *words]
    env = {**environment(), **env}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_stts_run_starts_slowfasts_launcher(command, checkout, tmp_path):
    words = command(tmp_path, "TRAIN.ENABLE", "False")[2:]
    # As with a PyTorch that is too old to load the plugin by itself.
    done = stts("run", "--engine", "slowfast", *words, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("engine: slowfast (--engine asks for it)")
    assert "STTS time_0: learned frames before block 0" in done.stdout
    assert '"split": "test_final"' in done.stdout


def test_doctor_finds_that_a_run_can_start(checkout):
    done = stts("doctor", COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "A SlowFast run can start" in done.stdout
    assert re.search(r"patch decoder *│ *(OK|patched)", done.stdout)


def test_doctor_fails_without_a_checkout(checkout, tmp_path):
    done = stts("doctor", COLUMNS="200", SLOWFAST_ROOT=str(tmp_path))
    assert done.returncode == 1
    assert "SlowFast cannot start: missing SlowFast" in done.stdout
