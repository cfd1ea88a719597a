"""What looks at runs reads the output folders and checkpoints of SlowFast."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stts_slowfast.tools import cli
from stts_slowfast.tools.report import run_log

TINY = Path(__file__).parent / "tiny.yaml"


@pytest.fixture(scope="module")
def opts(videos):
    return ["DATA.PATH_TO_DATA_DIR", str(videos), "DATA.PATH_PREFIX", str(videos), "NUM_GPUS", "0"]


@pytest.fixture(scope="module")
def folder(checkout, opts, tmp_path_factory):
    """The OUTPUT_DIR of a run with selection that SlowFast's launcher trained and tested."""
    folder = tmp_path_factory.mktemp("run")
    words = [sys.executable, "-m", "stts_slowfast", "run", "--engine", "slowfast"]
    words += ["--cfg", str(TINY), "--opts", *opts, "OUTPUT_DIR", str(folder)]
    words += ["STTS.ENABLE", "True", "SOLVER.MAX_EPOCH", "1", "LOG_MODEL_INFO", "True"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def test_report_reads_a_run_of_slowfast(folder, tmp_path):
    pytest.importorskip("matplotlib")
    run = run_log.read_output(str(folder))
    assert run.config["STTS.ENABLE"] is True and run.final("top1_acc") is not None
    assert run.gflops > 0 and run.params > 0 and run.curve("train_epoch", "loss")[0] == [1]
    page = tmp_path / "page.html"
    assert cli.main(["report", str(folder), "--strips", "1", "--out", str(page)]) == 0
    text = page.read_text()
    assert "what was kept of some test videos" in text and "not drawn" not in text
    assert f"<td>{run.final('top1_acc'):.4g}</td>" in text


def test_study_measures_a_checkpoint_of_slowfast(folder, opts, tmp_path):
    pytest.importorskip("matplotlib")
    checkpoint = run_log.last_checkpoint(str(folder))
    words = ["study", "--cfg", str(TINY), "--checkpoint", checkpoint, "--out", str(tmp_path)]
    words += ["--time", "0.5", "--space", "--both", "--scorers", "learned", "--opts", *opts]
    assert cli.main(words) == 0
    rows = json.loads((tmp_path / "study.json").read_text())
    assert [row["scorer"] for row in rows] == ["all", "learned"]
    assert rows[1]["gflops"] < rows[0]["gflops"]
    assert 0 <= rows[0]["agreement"] <= 1  # two views of each video
