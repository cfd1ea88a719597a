"""Scripts of projects/stts/benchmarks measure what the package is today."""

import argparse
import importlib
import io
import sys
from pathlib import Path

import pytest

from stts_slowfast.video import Video

BENCHMARKS = Path(__file__).parents[3] / "projects" / "stts" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A function from a script's name to its module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def folder(script, tmp_path):
    """A video of 90 frames and its lists."""
    videos = script("sample_videos")
    videos.write_video(tmp_path / "clip.mp4", videos.draw_images(90, 16, 32), g="30")
    return tmp_path


def test_a_sample_video_has_the_images_that_were_drawn(script, folder):
    images = script("sample_videos").draw_images(90, 16, 32)
    with Video(str(folder / "clip.mp4")) as video:
        assert (video.num_frames, video.fps) == (90, 30)
        frames = video.decode([0, 89])
    for frame, own in zip(frames.numpy().astype(int), (images[0], images[89])):
        nearest = min((images[0], images[45], images[89]), key=lambda x: abs(frame - x).mean())
        assert nearest is own


def test_frames_are_timed_with_a_cold_cache_and_a_warm_one(script, folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"clip.mp4 {n} 0\n" for n in range(4))))
    script("exact_frames").serve(str(folder))
    assert [float(line) >= 0 for line in capsys.readouterr().out.splitlines()] == [True] * 4


def test_a_file_is_opened_with_a_cold_cache_and_a_warm_one(script, folder):
    (folder / "clip.mp4").rename(folder / "long.mp4")
    ways = script("loader").opening_ways(folder)
    assert sorted(ways) == ["again", "open"]
    for way in ways.values():
        way(0)


def test_decoders_read_the_same_frames(script, folder, monkeypatch):
    decoders = script("decoders")
    monkeypatch.setattr(decoders, "wanted_frames", lambda: [[0, 4, 8], [20, 24, 28]])
    for way in decoders.decoder_ways(str(folder / "clip.mp4"), 1).values():
        assert min(decoders.milliseconds(way)) > 0


def test_both_operators_are_measured_and_shown(script):
    topk, layouts = script("topk"), script("layouts")
    row = topk.measure("2,6,3,20", argparse.Namespace(device="cpu", repeats=3))
    report = {"device": "1 CPU threads", "torch": "2.0+cpu", "rows": [row]}
    how, _, *table = layouts.operator([report]).splitlines()
    assert how == "One CPU thread, PyTorch 2.0; medians of 3 passes in core time:"
    assert table[-1].startswith("| 2, 6, 3, 20 |") and len(table[-1].split("|")) == 9
