"""The notebook about SlowFast runs beside a checkout, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_notebook_runs(checkout):
    words = [sys.executable, ROOT / "examples" / "execute.py", ROOT / "examples" / "slowfast.ipynb"]
    path = os.pathsep.join([str(ROOT), str(checkout), os.environ.get("PYTHONPATH", "")])
    environment = {"SLOWFAST_ROOT": str(checkout), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--dry", "--set", "num_train=32", "num_test=8"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
