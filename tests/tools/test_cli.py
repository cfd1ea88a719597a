"""The command ``stts``: help, engines, and how mistakes and Ctrl-C end it."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest
from torch.utils.data import get_worker_info

from stts_slowfast import build_model
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.configfiles.files import find_config
from stts_slowfast.pyslowfast import launch
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.tools import cli, run


@pytest.fixture(autouse=True)
def no_slowfast(monkeypatch):
    monkeypatch.delenv("STTS_TRACEBACK", raising=False)
    monkeypatch.setattr(launch, "find_launcher", lambda: None)


@pytest.fixture
def config(tiny_cfg, tmp_path):
    """A config file of a run of many short epochs on four small videos."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(4):
        with av.open(str(tmp_path / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv420p"
            image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            for _ in range(8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        lines.append(f"{number}.mp4 {number}\n")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text("".join(lines))
    cfg = tiny_cfg
    cfg.NUM_GPUS, cfg.LOG_MODEL_INFO = 0, False
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATA.PATH_TO_DATA_DIR = cfg.DATA.PATH_PREFIX = str(tmp_path)
    cfg.DATA.SAMPLING_RATE, cfg.DATA.TRAIN_JITTER_SCALES = 1, [32, 32]
    cfg.DATA_LOADER.NUM_WORKERS = 0
    cfg.TRAIN.BATCH_SIZE, cfg.TRAIN.CHECKPOINT_PERIOD = 4, 1
    cfg.TEST.BATCH_SIZE, cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = 4, 1, 1
    cfg.SOLVER.MAX_EPOCH = 10_000
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    return str(path)


def error_line(capsys):
    """The only line on stderr."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_help_is_quick_and_names_the_commands():
    code = (
        "import sys\nfrom stts_slowfast.tools.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'lightning_fabric'} & set(sys.modules), 'slow imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert name in done.stdout


def test_every_command_has_its_module():
    for name, (module, text) in cli.COMMANDS.items():
        assert importlib.util.find_spec(module) and text, name


def test_run_trains_tests_and_takes_options(config, capsys):
    words = ["run", "--cfg", config, "--opts", "SOLVER.MAX_EPOCH", "1", "LOG_PERIOD", "1"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("engine: standalone (found no checkout of SlowFast")
    folder = Path(config).parent / "out"
    assert (folder / "checkpoints" / "checkpoint_epoch_00001.pyth").is_file()
    assert '"split": "test_final"' in (folder / "stdout.log").read_text()


def test_a_range_is_not_trained_if_a_test_follows(config, capsys):
    keys = ["STTS.ENABLE", "True", "STTS.SPACE.KEEP", "[[0.25, 0.9]]"]
    assert cli.main(["run", "--cfg", config, "--opts", *keys]) == 2
    assert "STTS.SPACE.KEEP is [[0.25, 0.9]], a range, and TEST.ENABLE is Tr" in error_line(capsys)
    assert not (Path(config).parent / "out").exists()


def test_a_missing_test_list_shows_before_the_training(config, capsys):
    (Path(config).parent / "test.csv").unlink()
    assert cli.main(["run", "--cfg", config]) == 2
    assert "which has no test.csv" in error_line(capsys)
    assert not (Path(config).parent / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("stop", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_ctrl_c_names_the_checkpoint_to_resume_from(config, capsys, stop, status):
    # A shell starts what goes to the background with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(config).parent / "out" / "checkpoints"

    def interrupt():
        while not list(folder.glob("checkpoint_epoch_0000[2-9].pyth")):
            time.sleep(0.01)
        os.kill(os.getpid(), stop)

    threading.Thread(target=interrupt, daemon=True).start()
    assert cli.main(["run", "--cfg", config]) == status
    line = error_line(capsys)
    last = max(path.name for path in folder.iterdir())
    assert line == f"stts: interrupted; the same command resumes from {folder / last}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], "unknown config key SOLVER.BASE_LRR; did you mean"),
        (["NUM_GPUS", "99"], "NUM_GPUS is 99 but this machine has"),
        (["DATA.PATH_TO_DATA_DIR", "/nowhere"], "DATA.PATH_TO_DATA_DIR is '/nowhere'"),
        (["TRAIN.CHECKPOINT_FILE_PATH", "/nowhere.pyth"], "/nowhere.pyth does not exist"),
        (["MODEL.NUM_CLASSES", "2"], "label is 2 but MODEL.NUM_CLASSES is 2"),
        (["STTS.ENABLE", "True", "STTS.TIME.BLOCKS", "[7]"], "STTS.TIME.BLOCKS names block 7"),
        (["DATA.PATH_PREFIX", "/nowhere"], "DATA.PATH_PREFIX ('/nowhere') right?"),
        (["DATA.PATH_PREFIX", "/nowhere", "DATA_LOADER.NUM_WORKERS", "1"], "DATA.PATH_PREFIX"),
    ],
)
def test_mistakes_are_one_line_and_status_2(config, capsys, opts, message):
    assert cli.main(["run", "--cfg", config, "--opts", *opts]) == 2
    line = error_line(capsys)
    assert line.startswith("stts: error: ") and message in line


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train", "run --cfg CONFIG --opts DATA_LOADER.NUM_WORKERS 1"),
        ("test", "study --out OUT --cfg CONFIG --opts DATA_LOADER.NUM_WORKERS 1"),
        ("train", "study --out OUT --cfg CONFIG --train --opts DATA_LOADER.NUM_WORKERS 1"),
        ("train", "bench CONFIG --data --workers 1"),
        ("test", "bench CONFIG --end-to-end --workers 1"),
    ],
)
def test_a_killed_reader_is_one_line(config, tiny_cfg, capfd, monkeypatch, tmp_path, split, words):
    real = ClipDataset._read

    def killed(dataset, *args):
        if dataset.split == split:
            assert get_worker_info() is not None
            os.kill(os.getpid(), signal.SIGKILL)
        return real(dataset, *args)

    monkeypatch.setattr(ClipDataset, "_read", killed)
    words = words.replace("CONFIG", config).replace("OUT", str(tmp_path / "study")).split()
    if words[0] == "study":
        path = str(tmp_path / "start.pyth")
        save_checkpoint(path, build_model(tiny_cfg), tiny_cfg, 1)
        words[1:1] = ["--checkpoint", path, "--time", "--space", "--both", "--seeds", "1"]
    assert cli.main(words) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stts: error: a process that reads videos was lost (")


def test_a_missing_config_is_one_line(capsys, tmp_path):
    path = str(tmp_path / "gone.yaml")
    assert cli.main(["run", "--cfg", path]) == 2
    assert error_line(capsys) == f"stts: error: config file {path} does not exist"


def test_traceback_can_be_had(capsys, tmp_path, monkeypatch):
    words = ["--cfg", str(tmp_path / "gone.yaml")]
    assert cli.main(["run", "--traceback", *words]) == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("STTS_TRACEBACK", "1")
    assert cli.main(["run", *words]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_faults_of_ours_are_shown_in_full(monkeypatch, capsys):
    def fail(args):
        raise KeyError("x")

    monkeypatch.setattr(run, "main", fail)
    assert cli.main(["run", "--cfg", "x.yaml"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_slowfast_gets_its_own_arguments(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(launch, "run", given.extend)
    monkeypatch.setattr(launch, "find_launcher", lambda: "/checkout/tools/run_net.py")
    words = ["--cfg", "a.yaml", "b.yaml", "--num_shards", "2", "--opts", "NUM_GPUS", "8"]
    assert cli.main(["run", *words]) == 0
    assert given == [
        *["--shard_id", "0", "--num_shards", "2", "--init_method", "tcp://localhost:9999"],
        *["--cfg", "a.yaml", "b.yaml", "--opts", "NUM_GPUS", "8"],
    ]
    assert capsys.readouterr().out.startswith("engine: slowfast (found /checkout/tools")
    assert run.choose_engine("standalone") == ("standalone", "--engine asks for it")
    given.clear()
    cli.main(["run", "--cfg", "STTS_SWIN_T_32x2_T0_0.9"])
    assert given[-1] == find_config("STTS_SWIN_T_32x2_T0_0.9")
