"""Film strips and videos show what selectors kept, at the right positions."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast import visualization
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.standalone.data import ClipDataset, normalize_clips
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools import cli, visualize
from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.inspection import View, read_clip
from stts_slowfast.tools.overlay_video import ViewOverlay
from stts_slowfast.video import Video


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
    assert visualization.kept_regions(cfg, kept, 0).windows == {
        0: (0.0, 0.0, 0.75, 0.75),
        2: (0.25, 0.25, 0.75, 0.75),
    }
    assert visualization.kept_regions(cfg, kept, 1).windows == {
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
    assert visualization.kept_regions(cfg, kept).windows == {
        2: (0.5, 0.5, 0.25, 0.25),
        3: (0.5, 0.75, 0.25, 0.25),
    }


def test_single_tokens_are_at_their_positions(cfg):
    kept = {
        "time_0": torch.tensor([[0, 1], [1, 3]]),
        "tokens_0": torch.tensor([[0, 1, 2, 3], [9, 63, 64, 127]]),
        "tokens_1": torch.tensor([[0, 1], [0, 3]]),
    }
    cfg.STTS.SPACE.BLOCKS = []
    cfg.STTS.TOKENS.BLOCKS, cfg.STTS.TOKENS.KEEP = [0, 1], [4 / 128, 0.5]
    regions = visualization.kept_regions(cfg, kept, 1)
    tokens = regions.tokens
    assert tokens.shape == (4, 8, 8) and tokens.nonzero().tolist() == [[1, 1, 1], [3, 7, 7]]
    assert list(regions.windows) == [1, 3] and regions.boxes(0) == []
    assert list(visualization.kept_regions(cfg, kept, 0).windows) == [0]
    assert regions.boxes(1) == [(0.125, 0.125, 0.125, 0.125)]
    dimmed = visualization.dim_tokens(np.zeros((32, 32, 3), np.uint8), tokens[1])
    assert (dimmed[4:8, 4:8] == 0).all() and (dimmed == 0).sum() == 3 * 16
    view = View(torch.zeros(3, 8, 32, 32), list(range(8)), (0.0, 0.5, 1.0, 0.5))
    overlay = ViewOverlay(view, 4, regions)
    assert overlay.boxes_at(3) == [(0.125, 0.5625, 0.125, 0.0625)] and overlay.boxes_at(0) == []
    strip = visualization.FilmStripRow("", torch.zeros(4, 32, 32, 3).byte(), regions)
    assert "full colour: tokens kept" in visualization.draw([strip])._supxlabel.get_text()


def test_strip_shows_the_frames_of_the_clip_and_their_scores(cfg):
    model = build_model(cfg)
    clip = torch.arange(8.0).view(1, 8, 1, 1).expand(3, 8, 32, 32) * 10 / 255
    clip = (clip - cfg.DATA.MEAN[0]) / cfg.DATA.STD[0]
    seen = visualization.inspect_clip(cfg, model, clip)
    assert seen.probs.sum().item() == pytest.approx(1)
    strip = visualization.make_film_strip_row(cfg, clip, seen, "a clip")
    assert strip.frames.shape == (4, 32, 32, 3)
    assert strip.frames[:, 0, 0, 0].tolist() == [10, 30, 50, 70]
    assert sorted(strip.kept.windows) == model.stts["time_0"].kept[0].tolist()
    # The frames kept are those that score best; looking leaves no hook behind.
    best = torch.tensor(strip.scores).topk(2).indices.sort().values
    assert best.tolist() == sorted(strip.kept.windows)
    assert 0 == min(strip.scores) < max(strip.scores) <= 1
    assert not model.stts["time_0"].scorer._forward_hooks


@pytest.mark.parametrize("dataset", ["kinetics", "ssv2"])
@pytest.mark.parametrize("reverse", [False, True])
def test_pictures_have_the_colours_of_the_video(cfg, tmp_path, dataset, reverse):
    cfg.TEST.DATASET, cfg.DATA.REVERSE_INPUT_CHANNEL = dataset, reverse
    red = np.zeros((16, 32, 32, 3), np.uint8)
    red[..., 0] = 250
    make_data.write_video(str(tmp_path / "red.mp4"), red)
    clip = read_clip(cfg, str(tmp_path / "red.mp4"))
    assert clip.shape == (3, 8, 32, 32)
    colour = visualization.to_pictures(cfg, clip).float().mean((0, 1, 2))
    assert colour[0] > 200 and colour[1:].max() < 40


@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
@pytest.mark.parametrize("rotate", [True, False])
def test_what_is_looked_at_is_what_testing_sees(cfg, tmp_path, rotate, backend):
    """Scaled before or after decoding, and rotated as DATA.ROTATE asks."""
    cfg.DATA.DECODING_BACKEND, cfg.DATA.ROTATE = backend, rotate
    cfg.TEST.NUM_ENSEMBLE_VIEWS = cfg.TEST.NUM_SPATIAL_CROPS = 1
    cfg.DATA.SAMPLING_RATE, cfg.DATA.TARGET_FPS, cfg.DATA.USE_OFFSET_SAMPLING = 2, 30, True
    cfg.DATA.PATH_TO_DATA_DIR = str(tmp_path)
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        stream.set_display_rotation(90)
        for pixels in np.random.default_rng(0).integers(0, 255, (24, 48, 80, 3), np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "test.csv").write_text(f"{path} 0\n")
    clips, *_ = ClipDataset(cfg, "test")[0]
    assert torch.equal(read_clip(cfg, str(path)), normalize_clips(clips[0], cfg))


def test_without_selection_every_frame_is_kept_whole(cfg):
    cfg.STTS.ENABLE = False
    clip = torch.zeros(3, 8, 32, 32)
    seen = visualization.inspect_clip(cfg, build_model(cfg), clip)
    strip = visualization.make_film_strip_row(cfg, clip, seen, "a clip")
    assert strip.scores is None
    assert strip.kept.windows == dict.fromkeys(range(4), visualization.FULL_FRAME)


@pytest.fixture
def words(cfg, tmp_path):
    """The command up to its videos; there are two with odd names."""
    generator = np.random.default_rng(0)
    for name in ("a $\\frac$ \udcff\n.mp4", "b.mp4"):
        frames = make_data.draw_video("needle", 1, generator)[0]
        make_data.write_video(str(tmp_path / name), frames)
    (tmp_path / "model.yaml").write_text(cfg.dump())
    save_checkpoint(str(tmp_path / "model.pyth"), build_model(cfg), cfg, 1)
    words = ["visualize", "--cfg", str(tmp_path / "model.yaml")]
    return [*words, "--checkpoint", str(tmp_path / "model.pyth"), "--video"]


def test_command_draws_ones_own_videos(words, tmp_path, capsys):
    out = tmp_path / "new" / "strip.png"
    videos = [str(tmp_path / name) for name in ("a $\\frac$ \udcff\n.mp4", "b.mp4")]
    assert cli.main([*words, *videos, "--out", str(out)]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    size = Image.open(out).size
    assert size[0] > 400
    missing = str(tmp_path / "c.mp4")
    out = tmp_path / "views.png"
    more = ["--views", "3", "--out", str(out)]
    assert cli.main([*words, missing, *videos, *more]) == 0
    assert "left out: " in capsys.readouterr().err
    assert Image.open(out).size[1] > 2.5 * size[1]  # a row for each view
    assert cli.main([*words, str(tmp_path / "c.mp4"), "--out", str(tmp_path / "c.png")]) == 2
    assert "c.mp4: No such file" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(words, tmp_path, capsys):
    out = tmp_path / "strip.png"
    out.write_text("mine")
    command = [*words, str(tmp_path / "b.mp4"), "--out", str(out)]
    assert cli.main(command) == 2
    assert f"{out} already exists: choose another path, or add --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    video = tmp_path / "b.mp4"
    assert cli.main([*command[:-1], str(video), "--force"]) == 2
    assert "would overwrite an input file" in capsys.readouterr().err
    assert cli.main([*command, "--force"]) == 0
    assert Image.open(out).format == "PNG"


def test_a_range_of_budgets_is_not_shown_as_one(words, tmp_path, capsys):
    command = [*words, str(tmp_path / "b.mp4"), "--out", str(tmp_path / "strip.png"), "--opts"]
    assert cli.main([*command, "STTS.TIME.KEEP", "[[0.25, 0.9]]"]) == 2
    assert 'give one share to test (--opts STTS.TIME.KEEP "[0.9]")' in capsys.readouterr().err


def test_film_is_the_video_with_what_was_dropped_dimmed(cfg, words, tmp_path, monkeypatch, capsys):
    white = np.full((20, 48, 64, 3), 250, np.uint8)
    make_data.write_video(str(tmp_path / "white.mp4"), white)
    kept = visualization.KeptRegions({1: (0.0, 0.0, 1.0, 1.0), 2: (0.5, 0.5, 0.5, 0.5)})
    monkeypatch.setattr(visualization, "kept_regions", lambda *_: kept)
    out = tmp_path / "film.mp4"
    opts = ["--opts", "DATA.SAMPLING_RATE", "2", "DATA.TARGET_FPS", "16"]
    assert cli.main([*words, str(tmp_path / "white.mp4"), "--out", str(out), *opts]) == 0
    with Video(str(out)) as film:
        assert (film.num_frames, film.fps) == (20, 16)
        frames = film.decode(range(20))[..., 0].float()
    # The clip is of frames 2 to 16; the crop is the middle square of 48 pixels.
    assert frames.shape == (20, 48, 64)
    bright = (frames > 150).float()
    shares = bright.mean((1, 2)).tolist()
    first = next(number for number, share in enumerate(shares) if share)
    whole, quarter = 48 * 48 / (48 * 64), 24 * 24 / (48 * 64)
    assert 4 <= first <= 7
    assert shares[first : first + 4] == pytest.approx([whole] * 4, abs=0.03)
    assert shares[first + 4 : first + 8] == pytest.approx([quarter] * 4, abs=0.03)
    assert sum(shares[:first] + shares[first + 8 :]) == 0
    assert bright[first + 1, :, 9:55].all() and not bright[first + 1, :, :7].any()
    assert not bright[first + 5, :23].any() and bright[first + 5, 26:, 34:54].all()
    assert cli.main([*words, "a.mp4", "b.mp4", "--out", str(tmp_path / "two.mp4")]) == 2
    assert "shows one video: 2 are given" in capsys.readouterr().err


def test_classes_are_named(tmp_path):
    probs = torch.tensor([0.1, 0.7, 0.2])
    assert visualization.predicted(probs, None) == "class 1 70%, class 2 20%, class 0 10%"
    names = ["cat", "dog", "a cow"]
    for file, text in (
        ("lines.txt", "cat\ndog\na cow\n"),
        ("list.json", json.dumps(names)),
        ("numbers.json", json.dumps({"dog": 1, "cat": 0, "a cow": 2})),
        ("keys.json", json.dumps({"0": "cat", "1": "dog", "2": "a cow"})),
    ):
        (tmp_path / file).write_text(text)
        assert visualize.read_classes(str(tmp_path / file), 3) == names
        with pytest.raises(ValueError, match=r"names 3 classes but MODEL\.NUM_CLASSES is 4"):
            visualize.read_classes(str(tmp_path / file), 4)
    assert visualization.predicted(probs, names).startswith("dog 70%")
    (tmp_path / "wrong.json").write_text(json.dumps({"cat": 0, "dog": 3, "cow": 2}))
    with pytest.raises(ValueError, match="one name for each number"):
        visualize.read_classes(str(tmp_path / "wrong.json"), 3)
