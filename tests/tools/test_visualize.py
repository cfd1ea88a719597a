"""Film strips show what selectors kept, in the right places."""

import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools import cli, makedata, visualize


@pytest.fixture
def cfg(tiny_cfg):
    """Grids 4x8x8 of 8 frames of 32x32; half of the frames and 6x6 of 8x8 tokens are kept."""
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.BLOCKS, tiny_cfg.STTS.TIME.KEEP = [0], [0.5]
    tiny_cfg.STTS.SPACE.BLOCKS, tiny_cfg.STTS.SPACE.KEEP = [1], [0.5625]
    tiny_cfg.DATA.TRAIN_JITTER_SCALES = [32, 32]
    return tiny_cfg


def test_regions_follow_time_then_space(cfg):
    kept = {"time_0": torch.tensor([[0, 2], [1, 3]])}
    kept["space_1"] = torch.tensor([[0, 0, 6, 6], [2, 2, 6, 6], [1, 0, 6, 6], [0, 2, 6, 6]])
    assert visualize.kept_regions(cfg, kept, 0) == {
        0: (0.0, 0.0, 0.75, 0.75),
        2: (0.25, 0.25, 0.75, 0.75),
    }
    assert visualize.kept_regions(cfg, kept, 1) == {
        1: (0.125, 0.0, 0.75, 0.75),
        3: (0.0, 0.25, 0.75, 0.75),
    }


def test_later_selections_work_inside_earlier_ones(cfg):
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0, 1], [0.75, 0.67]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [0, 1], [0.25, 0.25]
    kept = {
        "time_0": torch.tensor([[1, 2, 3]]),
        "space_0": torch.tensor([[0, 0, 4, 4], [2, 4, 4, 4], [4, 4, 4, 4]]),
        "time_1": torch.tensor([[1, 2]]),
        "space_1": torch.tensor([[2, 0, 2, 2], [0, 2, 2, 2]]),
    }
    assert visualize.kept_regions(cfg, kept) == {
        2: (0.5, 0.5, 0.25, 0.25),
        3: (0.5, 0.75, 0.25, 0.25),
    }


def test_strip_shows_the_frames_of_the_clip(cfg):
    model = build_model(cfg)
    clip = torch.arange(8.0).view(1, 8, 1, 1).expand(3, 8, 32, 32) * 10 / 255
    clip = (clip - cfg.DATA.MEAN[0]) / cfg.DATA.STD[0]
    assert visualize.predict(model, clip).sum().item() == pytest.approx(1)
    strip = visualize.make_strip(cfg, model, clip, "a clip")
    assert strip.frames.shape == (4, 32, 32, 3)
    assert strip.frames[:, 0, 0, 0].tolist() == [10, 30, 50, 70]
    assert sorted(strip.kept) == model.stts["time_0"].kept[0].tolist()


@pytest.mark.parametrize("dataset", ["kinetics", "ssv2"])
@pytest.mark.parametrize("reverse", [False, True])
def test_pictures_have_the_colours_of_the_video(cfg, tmp_path, dataset, reverse):
    cfg.TEST.DATASET, cfg.DATA.REVERSE_INPUT_CHANNEL = dataset, reverse
    red = np.zeros((16, 32, 32, 3), np.uint8)
    red[..., 0] = 250
    makedata.write_video(str(tmp_path / "red.mp4"), red)
    clip = visualize.read_clip(cfg, str(tmp_path / "red.mp4"))
    assert clip.shape == (3, 8, 32, 32)
    pictures = visualize.to_pictures(cfg, clip).float().mean((0, 1, 2))
    assert pictures[0] > 200 and pictures[1:].max() < 40


def test_without_selection_every_frame_is_kept_whole(cfg):
    cfg.STTS.ENABLE = False
    strip = visualize.make_strip(cfg, build_model(cfg), torch.zeros(3, 8, 32, 32), "a clip")
    assert strip.kept == dict.fromkeys(range(4), visualize.WHOLE)


def test_picture_marks_kept_frames_green_and_windows_red(tmp_path):
    frames = torch.full((4, 32, 32, 3), 128, dtype=torch.uint8)
    strip = visualize.Strip("a clip", frames, {1: (0.25, 0.25, 0.5, 0.5)}, [1])
    visualize.draw([strip], str(tmp_path / "new" / "strip.png"))
    image = np.array(Image.open(tmp_path / "new" / "strip.png").convert("RGB")).astype(int)
    red, green, blue = image.reshape(-1, 3).T
    green_pixels = ((green > 120) & (red < 80) & (blue < 80)).sum()
    red_pixels = ((red > 180) & (green < 80) & (blue < 80)).sum()
    assert green_pixels > 200 and red_pixels > 100
    assert (abs(red - 128) < 3).sum() > 1000  # the kept frame is not dimmed


def test_command_draws_ones_own_videos(cfg, tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name in ("a.mp4", "b.mp4"):
        makedata.write_video(str(tmp_path / name), makedata.draw_video("square", 1, generator)[0])
    (tmp_path / "model.yaml").write_text(cfg.dump())
    checkpoint = str(tmp_path / "model.pyth")
    save_checkpoint(checkpoint, build_model(cfg), cfg, 1)
    out = tmp_path / "strip.png"
    videos = [str(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    words = ["visualize", "--cfg", str(tmp_path / "model.yaml"), "--checkpoint", checkpoint]
    assert cli.main([*words, "--video", *videos, "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert Image.open(out).size[0] > 400
    missing = str(tmp_path / "c.mp4")
    assert cli.main([*words, "--video", missing, *videos, "--out", str(out)]) == 0
    assert "left out: " in capsys.readouterr().err
    assert cli.main([*words, "--video", str(tmp_path / "c.mp4"), "--out", str(out)]) == 2
    assert "c.mp4: No such file" in capsys.readouterr().err
