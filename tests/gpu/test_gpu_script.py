"""``projects/stts/gpu.sh`` runs its parts at tiny sizes on a CPU, and reports what came of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "projects" / "stts" / "gpu.sh"


def gpu_sh(*words):
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)], env=environment, capture_output=True, text=True
    )


# All parts take a core a minute: the nightly workflow runs them.
@pytest.mark.parametrize("part", ["others", "runs"])
def test_a_part_is_rehearsed_on_a_cpu(tmp_path, part):
    ran = gpu_sh(tmp_path, "--device", "cpu", "--tiny", "--parts", part)
    log = (tmp_path / f"{part}.log").read_text()
    assert ran.returncode == 0, ran.stdout + ran.stderr + log
    found = json.loads((tmp_path / f"{part}.json").read_text())
    report = (tmp_path / "report.md").read_text()
    assert found["status"] == "done" and f"## {part}: done" in report
    if part == "others":
        for row in ("MViTv2-S stock", "MViTv2-S 0.9", "TimeSformer stock", "TimeSformer 0.5"):
            assert f"| {row} |" in report
    else:
        (run,) = found["rows"]
        assert run["exit when stopped"] == 143 and run["exit when resumed"] == 0
        assert 0 <= float(run["top-1"]) <= 100


def test_a_part_that_fails_is_reported_and_others_run(tmp_path):
    """Without a GPU, say."""
    ran = gpu_sh(tmp_path, "--parts", "profile", "--device", "cuda", "--tiny")
    assert ran.returncode == 1 and "profile: failed" in ran.stdout
    assert "## profile: failed" in (tmp_path / "report.md").read_text()
