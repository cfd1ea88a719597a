"""``projects/stts/gpu.sh`` runs its parts at tiny sizes on a CPU, and reports what came of them."""

import importlib
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


# ---- parts that end otherwise ------------------------------------------------------------------


@pytest.fixture
def parts(monkeypatch):
    """The module of the parts, with a function that replaces their processes by short scripts."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("gpu_parts")

    def replace(**scripts):
        def command(args, name):
            return [sys.executable, "-S", "-c", scripts[name].replace("OUT", str(args.out))]

        monkeypatch.setattr(module, "_command", command)

    module.replace = replace
    return module


WRITES = "open('OUT/{}.json', 'w').write('{}'); "


def test_a_bench_part_that_fails_does_not_end_the_script(parts, tmp_path):
    """As does ``stts bench`` ended before it wrote anything."""
    failed = WRITES.format("bench", '{"status": "failed", "files": ["bench_a.json"]}')
    done = WRITES.format("parity", '{"status": "done", "passed": 3, "failures": []}')
    parts.replace(bench=failed + "exit(1)", parity=done)
    assert parts.main([str(tmp_path), "--parts", "bench", "parity"]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "## bench: failed" in report and "bench_a.json: not measured" in report
    assert "## parity: done" in report and "3 passed" in report


def test_only_what_this_run_wrote_is_reported(parts, tmp_path):
    """Files of an earlier run, of another part, and a file that a kill has cut off."""
    (tmp_path / "graphs.json").write_text('{"status": "done", "files": ["bench_gone.json"]}')
    (tmp_path / "bench_old.json").write_text("{}")
    parts.replace(bench=WRITES.format("bench", '{"status": "do'), others="exit(1)")
    assert parts.main([str(tmp_path), "--parts", "bench", "others"]) == 1
    report = (tmp_path / "report.md").read_text()
    assert "## bench: failed" in report and "bench.json cannot be read" in report
    assert "## others: failed" in report and "graphs" not in report
    assert "bench_old" not in report
    assert json.loads((tmp_path / "others.json").read_text()).keys() == {"status", "seconds"}


def test_a_bench_that_fails_leaves_no_old_numbers(parts, tmp_path):
    args = parts.parse([str(tmp_path), "--device", "cpu", "--tiny", "--part", "bench"])
    (tmp_path / "bench_a.json").write_text("{}")
    found = parts._bench(args, "a", ["none.yaml"])
    assert found == {"status": "failed", "files": ["bench_a.json"]}
    assert not (tmp_path / "bench_a.json").exists()
    assert json.loads((tmp_path / "bench.json").read_text()) == {"files": ["bench_a.json"]}


@pytest.mark.parametrize(
    "words",
    [
        *(["--tiny"], ["--help"], ["pack", "extra", "--bogus"]),
        *(["out", "--parts", "bnch"], ["out", "--device", "gpu"], ["out", "--bogus"]),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path, words):
    environment = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(
        ["bash", SCRIPT, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 2 and "usage: " in ran.stderr
    assert not list(tmp_path.iterdir())
