"""The quickstart's videos tell the truth about themselves, and its whole job runs."""

import json

import numpy as np
import pytest
import torch

from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.standalone.defaults import load_config
from stts_slowfast.tools import cli, quickstart, toyvideos
from stts_slowfast.video import decode_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder and truth of 16 training and 8 test videos."""
    folder = tmp_path_factory.mktemp("data")
    return folder, toyvideos.write_dataset(str(folder), 16, 8, seed=0)


def colorfulness(frames):
    """How far the channels of each pixel lie apart: (T, H, W)."""
    return (frames.amax(-1).int() - frames.amin(-1).int()).numpy()


def test_class_shows_in_the_true_frames_and_place_alone(data):
    folder, truth = data
    for name, true in truth.items():
        colored = colorfulness(decode_clip(folder / "videos" / name, range(32)))
        shown = slice(true.start, true.stop)
        rows, columns = slice(true.top + 2, true.top + 12), slice(true.left + 2, true.left + 12)
        assert np.median(colored[shown, rows, columns]) > 100
        # Chroma has half the resolution, so that colour runs over the border a little.
        rows, columns = slice(max(true.top - 3, 0), true.top + 17), slice(max(true.left - 3, 0), 32)
        colored[shown, rows, columns] = 0
        assert np.percentile(colored, 99.9) < 60


def test_hue_is_the_class(data):
    folder, truth = data
    colors = {}
    for name, true in truth.items():
        frames = decode_clip(folder / "videos" / name, [true.start + 1]).float()[0]
        square = frames[true.top + 3 : true.top + 11, true.left + 3 : true.left + 11]
        colors.setdefault(true.label, []).append(square.mean((0, 1)))
    assert sorted(colors) == list(range(8))
    means = torch.stack([torch.stack(colors[label]).mean(0) for label in range(8)])
    within = max((torch.stack(colors[k]) - means[k]).norm(dim=1).max() for k in colors)
    between = torch.cdist(means, means).fill_diagonal_(1e9).min()
    assert within < between / 2


def test_truth_is_remembered_and_depends_on_the_seed_alone(data, tmp_path):
    folder, truth = data
    assert toyvideos.read_truth(str(folder)) == truth
    assert toyvideos.write_dataset(str(tmp_path / "again"), 16, 8, seed=0) == truth
    assert toyvideos.write_dataset(str(tmp_path / "other"), 16, 8, seed=1) != truth


def test_configs_read_the_videos_in_full(data, tmp_path):
    quickstart.write_configs(str(tmp_path), quickstart.SMOKE, 0)
    cfg = load_config(str(tmp_path / "configs" / "all.yaml"))
    cfg.DATA.PATH_TO_DATA_DIR, cfg.DATA.PATH_PREFIX = str(data[0]), str(data[0] / "videos")
    dataset = ClipDataset(cfg, "test")
    for number in range(8):
        clip = dataset[number][0][0]
        true = data[1][f"test_{number:04d}.mp4"]
        spread = (clip.amax(0) - clip.amin(0)).amax((1, 2))  # (T,)
        colored = {frame // 2 for frame in (spread > 2).nonzero().flatten().tolist()}
        assert colored == quickstart.shown_frames(cfg, true)


def test_shown_frames_count_in_frames_of_tokens(tmp_path):
    quickstart.write_configs(str(tmp_path), quickstart.SMOKE, 0)
    cfg = load_config(str(tmp_path / "configs" / "learned.yaml"))
    assert quickstart.shown_frames(cfg, toyvideos.Truth(0, 8, 16, 0, 0)) == {2, 3}
    assert quickstart.shown_frames(cfg, toyvideos.Truth(0, 24, 32, 0, 0)) == {6, 7}


def test_check_fails_where_learned_does_not_beat_random(capsys):
    learned = {"name": "learned", "top1": 90.0, "frames_kept": 0.9}
    other = {"name": "random", "top1": 50.0, "frames_kept": 0.3}
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
    rows = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in rows] == ["all", "learned", "uniform", "random"]
    for row in rows:
        assert set(row) == {"name", "top1", "frames_kept", "gflops", "clips_per_s"}
        assert 0 <= row["frames_kept"] <= 1 and row["clips_per_s"] > 0
    everything, learned, uniform, random = rows
    assert everything["frames_kept"] == 1.0
    assert uniform["gflops"] == random["gflops"] < learned["gflops"] < everything["gflops"] / 2
    told = capsys.readouterr().out
    for told_path in ("results.json", "filmstrip.png"):
        assert str(out / told_path) in told and (out / told_path).exists()
