"""The quickstart's configs read its videos in full, and its whole job runs."""

import json
import logging

import pytest
import torch

from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data, quickstart, synthetic_scenes
from stts_slowfast.tools.study.evaluate import shown_boxes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder and truth of 16 training and 8 test videos."""
    folder = tmp_path_factory.mktemp("data")
    return folder, make_data.write_dataset(str(folder), "needle", 16, 8, seed=0)


def test_configs_read_the_videos_in_full(data, tmp_path):
    quickstart.write_configs(str(tmp_path), quickstart.SMOKE, 0)
    cfg = load_config(str(tmp_path / "configs" / "all.yaml"))
    cfg.DATA.PATH_TO_DATA_DIR, cfg.DATA.PATH_PREFIX = str(data[0]), str(data[0] / "videos")
    dataset = ClipDataset(cfg, "test")
    for number in range(8):
        clip = dataset[number][0][0][0].float()  # (T, H, W)
        true = data[1][f"test_{number:04d}.mp4"]
        top, left, size, _ = true.boxes[0]
        shape = torch.from_numpy(synthetic_scenes.glyph(size, true.label)).float()
        there = clip[:, top : top + size, left : left + size]
        fits = (there * (shape - shape.mean())).sum((1, 2))
        (shown,) = shown_boxes(cfg, true)
        assert set(fits.topk(2).indices.tolist()) == {2 * shown, 2 * shown + 1}


def test_check_fails_where_learned_does_not_beat_random(capsys):
    learned = {"scorer": "learned", "top1": 90.0, "box_recall": 0.9}
    other = {"scorer": "random", "top1": 50.0, "box_recall": 0.3}
    assert quickstart.check([learned, other]) == 0
    assert quickstart.check([learned, {**other, "top1": 90.0}]) == 1
    assert "top1 90.0 does not beat" in capsys.readouterr().out


def test_whole_job_runs_and_tells_its_results(tmp_path, capsys, monkeypatch):
    size = quickstart.Size(num_train=32, num_test=8, epochs_all=2, epochs_learned=1)
    monkeypatch.setattr(quickstart, "FULL", size)
    out = tmp_path / "out"
    other_run = out / "runs" / "mine"
    other_run.mkdir(parents=True)
    assert cli.main(["quickstart", "--out", str(out), "--seed", "3"]) == 0
    assert other_run.is_dir()
    rows = json.loads((out / "study.json").read_text())
    assert [row["scorer"] for row in rows] == ["all", "learned", "uniform", "random"]
    for row in rows:
        assert 0 <= row["box_recall"] <= row["frame_recall"] <= 1 and row["clips_per_s"] > 0
        assert sum(map(sum, row["tokens_kept"])) == pytest.approx(
            64 if row["scorer"] == "all" else 16, abs=0.1
        )
    everything, learned, uniform, random = rows
    assert everything["frame_recall"] == everything["box_recall"] == 1.0
    assert uniform["gflops"] == random["gflops"] < learned["gflops"] < everything["gflops"] / 2
    told = capsys.readouterr().out
    for told_path in ("study.csv", "filmstrip.png", "report.html"):
        assert str(out / told_path) in told and (out / told_path).exists()
    page = (out / "report.html").read_text()
    for name in ("all", "learned", "uniform", "random"):
        assert f"<td>{name}</td>" in page
    assert "accuracy against GFLOPs" in page and "what was kept of some test videos" in page
    assert told.rstrip().splitlines()[-1].endswith(f"to open: {out / 'report.html'}")


@pytest.mark.parametrize("terminal", [True, False])
def test_log_lines_are_for_who_sees_no_bars(tmp_path, capsys, monkeypatch, terminal):
    size = quickstart.Size(num_train=32, num_test=8, epochs_all=2, epochs_learned=1)
    monkeypatch.setattr(quickstart, "FULL", size)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(quickstart, "write_results", lambda *_: 1 / 0)  # it is long enough
    monkeypatch.setattr(quickstart, "NAMES", ("all",))
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == 1
    assert ("json_stats: {" in capsys.readouterr().out) is not terminal
    assert "json_stats" in (tmp_path / "runs" / "all" / "stdout.log").read_text()
