"""Finding and starting SlowFast's launcher, on a throw-away checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stts_slowfast.pyslowfast import launch

REPO = Path(__file__).parents[2]
LAUNCHER = """
import os
import signal
import sys
import torch
from slowfast.config.defaults import get_cfg
from slowfast.run import run
from vision.fair.slowfast.tools.train_net import train

def main():
    print(sys.argv[1:], "STTS" in get_cfg(), flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)  # Slurm's warning
    torch.multiprocessing.spawn(run, args=(train,), nprocs=2)

if __name__ == "__main__":
    main()
"""
CHECKOUT = {
    "slowfast/__init__.py": "",
    "slowfast/config/__init__.py": "",
    "slowfast/config/defaults.py": (
        "from fvcore.common.config import CfgNode\n_C = CfgNode()\ndef get_cfg(): return _C\n"
        "def assert_and_infer_cfg(cfg): return cfg\n"
    ),
    "slowfast/run.py": "def run(rank, function): function(rank)",
    "tools/run_net.py": LAUNCHER,
    "tools/train_net.py": (
        "from slowfast.config.defaults import get_cfg\n"
        "def train(rank): print(f'child {rank}', 'STTS' in get_cfg(), flush=True)\n"
    ),
}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    for name, text in CHECKOUT.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("SLOWFAST_ROOT", str(tmp_path))
    return tmp_path


def test_the_launcher_is_found_in_slowfast_root(checkout):
    assert launch.find_launcher() == str(checkout / "tools" / "run_net.py")


def test_the_launcher_is_found_beside_the_package(checkout, monkeypatch):
    monkeypatch.delenv("SLOWFAST_ROOT")
    for name in [name for name in sys.modules if name.split(".")[0] == "slowfast"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(checkout)])
    assert launch.find_launcher() == str(checkout / "tools" / "run_net.py")
    (checkout / "tools" / "run_net.py").unlink()
    assert launch.find_launcher() is None


def test_a_root_without_launcher_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SLOWFAST_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"SLOWFAST_ROOT is .*root of a checkout"):
        launch.run(["--cfg", "x.yaml"])


def test_the_environment_finds_the_checkout_and_asks_for_the_plugin(checkout, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("STTS_AUTOLOAD", "0")
    env = launch.environment(launch.find_launcher())
    assert env["PYTHONPATH"].split(os.pathsep) == [str(checkout), "/elsewhere"]
    assert "STTS_AUTOLOAD" not in env


def test_spawned_children_load_the_plugin_if_torch_does_not(checkout):
    code = "import sys; from stts_slowfast.pyslowfast import launch; launch.run(sys.argv[1:])"
    env = {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "STTS_AUTOLOAD": "0",
    }
    command = [sys.executable, "-c", code, "--cfg", "a.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == ["['--cfg', 'a.yaml'] True", "child 0 True", "child 1 True"]
    assert "stts_slowfast:" not in done.stderr
