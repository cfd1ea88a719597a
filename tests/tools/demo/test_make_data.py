"""The videos of each kind show their class at the frames and boxes of their truth alone."""

import numpy as np
import pytest
import torch

from stts_slowfast import build_model, selections
from stts_slowfast.backbones import block_grids
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import ClipDataset
from stts_slowfast.tools import cli
from stts_slowfast.tools.demo import make_data, synthetic_scenes
from stts_slowfast.video import decode_clip


@pytest.fixture(scope="module", params=synthetic_scenes.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def data(kind, tmp_path_factory):
    """Folder and truth of 8 training and 16 test videos."""
    folder = tmp_path_factory.mktemp("data")
    return folder, make_data.write_dataset(str(folder), kind, 8, 16, seed=0)


def only(kind, *wanted):
    if kind not in wanted:
        pytest.skip(f"not about {kind}")


def read(folder, name, number=32):
    return decode_clip(folder / "videos" / name, range(number)).numpy().astype(int)


def test_truth_is_remembered_and_depends_on_seed_split_and_number_alone(kind, data, tmp_path):
    folder, truth = data
    assert make_data.read_truth(str(folder)) == truth
    fewer = make_data.write_dataset(str(tmp_path / "fewer"), kind, 4, 8, seed=0)
    assert fewer == {name: truth[name] for name in fewer} and len(fewer) == 12
    for name in fewer:
        written = (folder / "videos" / name).read_bytes()
        assert (tmp_path / "fewer" / "videos" / name).read_bytes() == written
    assert make_data.write_dataset(str(tmp_path / "other"), kind, 4, 8, seed=1) != fewer
    files = [(folder / "videos" / name).read_bytes() for name in truth]
    assert len(set(files)) == len(files)  # no test video is a training video


def test_boxes_lie_in_the_frame_and_classes_come_equally_often(kind, data):
    for true in data[1].values():
        assert len(true.frames) == len(true.boxes) > 0
        assert true.frames == sorted(set(true.frames)) and true.frames[-1] < 32
        for top, left, height, width in true.boxes:
            assert 0 <= top <= top + height <= 32 and 0 <= left <= left + width <= 32
    labels = [true.label for true in data[1].values()]
    assert [labels.count(label) for label in range(4)] == [6] * 4


def test_needle_is_the_glyph_for_an_eighth_and_its_pixels_shuffled_else(kind, data):
    only(kind, "needle")
    folder, truth = data
    for name, true in truth.items():
        frames = read(folder, name)[..., 0]
        assert len(true.frames) == 4 and true.boxes == [true.boxes[0]] * 4
        top, left, size, _ = true.boxes[0]
        glyphs = [synthetic_scenes.glyph(size, label) for label in range(4)]
        shown = frames[true.frames[0], top : top + size, left : left + size]
        fits = [(shown * (glyph - glyph.mean())).sum() for glyph in glyphs]
        assert np.argmax(fits) == true.label and max(fits) > 2 * sorted(fits)[-2]
        # At no other time is there a glyph, of this class or another.
        best = [max(best_match(frame, glyph) for glyph in glyphs) for frame in frames[::4]]
        moment = true.frames[0] // 4
        assert best[moment] > 1.3 * max(best[:moment] + best[moment + 1 :])
        # As bright at any time: only the shape tells.
        light = frames.mean((1, 2))
        assert abs(light[true.frames].mean() - light.mean()) < 0.03 * light.mean()


def test_every_token_of_a_glyph_shows_its_class_and_is_half_filled(kind):
    only(kind, "needle")
    tokens = [synthetic_scenes.glyph(12, label)[:4, :4] for label in range(4)]
    for label, token in enumerate(tokens):
        assert (
            token.sum() == 8 and (synthetic_scenes.glyph(12, label) == np.tile(token, (3, 3))).all()
        )
    assert len({token.tobytes() for token in tokens}) == 4


def best_match(frame, glyph):
    """The highest correlation of a glyph with any position of a frame."""
    pattern = glyph - glyph.mean()
    views = np.lib.stride_tricks.sliding_window_view(frame, pattern.shape)
    return (views * pattern).sum((2, 3)).max()


def test_motion_goes_the_way_of_the_class_in_the_true_frames(kind, data):
    only(kind, "motion")
    folder, truth = data
    for name, true in truth.items():
        bright = (read(folder, name)[..., 0] > 120).astype(float)
        assert len(true.frames) == 16
        assert np.diff(true.frames).tolist() == [1] * 15
        shift = displacement(bright[true.frames[0]], bright[true.frames[8]])
        angle = np.arctan2(*shift) / (np.pi / 2)
        assert np.hypot(*shift) == pytest.approx(8, abs=1.5)
        assert abs((angle - true.label + 2) % 4 - 2) < 0.3
        top, left, height, width = true.boxes[0]
        inside = bright[true.frames[0], top : top + height, left : left + width]
        assert inside.sum() > 0.2 * bright[true.frames[0]].sum()


def displacement(first, second):
    """Rows and columns by which a picture whose borders meet has moved."""
    product = np.fft.fft2(second) * np.fft.fft2(first).conj()
    peak = np.unravel_index(np.fft.ifft2(product).real.argmax(), first.shape)
    return [(shift + size // 2) % size - size // 2 for shift, size in zip(peak, first.shape)]


def test_clutter_has_one_ring_that_is_open_at_the_side_of_the_class_alone(kind, data):
    only(kind, "clutter")
    folder, truth = data
    for name, true in truth.items():
        frame = read(folder, name)[..., 0].mean(0)
        assert true.frames == list(range(32)) and true.boxes == [true.boxes[0]] * 32
        for top in range(0, 32, 8):
            for left in range(0, 32, 8):
                gaps = [side for side in range(4) if ring_light(frame, top, left, side) < 120]
                if [top, left, 8, 8] == true.boxes[0]:
                    assert gaps == [true.label]
                else:
                    assert gaps in ([0, 2], [1, 3])


def ring_light(frame, top, left, side):
    angle = side * np.pi / 2
    return frame[round(top + 3 + 3 * np.sin(angle)), round(left + 3 + 3 * np.cos(angle))]


def test_command_writes_videos_and_configs_of_three_families(kind, tmp_path, capsys):
    out = tmp_path / "a folder"
    words = ["make-data", "--kind", kind, "--out", str(out), "--train", "8", "--test", "8"]
    assert cli.main([*words, "--side", "48", "--frames", "16"]) == 0
    assert f"stts run --cfg {out / 'mvit.yaml'}" in capsys.readouterr().out
    for model in make_data.MODELS:
        cfg = load_config(str(out / f"{model}.yaml"))
        for split in ("train", "test"):
            clips, labels = ClipDataset(cfg, split)[3][:2]
            assert clips.shape[2] * cfg.DATA.SAMPLING_RATE == 16 and clips.shape[-1] == 48
            assert labels.tolist() == [3]
        # Selected before its first block, each sees the frames and positions that the truth counts.
        assert block_grids(cfg)[0] == (8, 8, 8)
        cfg.STTS.ENABLE = True
        network = build_model(cfg).eval()
        assert network(torch.randn(4, *clips.shape[1:])).shape == (4, 4)
        if model == "video_swin":  # its patch merging pairs tokens as in a whole frame
            assert not (selections(network)["space_0"][:, :2] % 2).any()
        assert not cfg.DATA.RANDOM_FLIP  # a flipped left would be a right


def test_videos_of_another_call_are_replaced_only_if_asked(tmp_path, capsys):
    words = ["make-data", "--out", str(tmp_path), "--test", "4"]
    assert cli.main([*words, "--kind", "needle", "--train", "8"]) == 0
    assert cli.main([*words, "--kind", "motion", "--train", "4"]) == 2
    assert "already: choose another folder, or add --force" in capsys.readouterr().err
    assert len(list((tmp_path / "videos").iterdir())) == 12
    assert cli.main([*words, "--kind", "motion", "--train", "4", "--force"]) == 0
    assert len(list((tmp_path / "videos").iterdir())) == 8


def test_sizes_without_whole_tokens_are_refused(tmp_path, capsys):
    words = ["make-data", "--kind", "needle", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--side", "50"]) == 2
    assert "--side is 50: give a multiple of 16" in capsys.readouterr().err
    assert cli.main([*words, "--side", "16"]) == 2
    assert "--side is 16: give a multiple of 16, at least 32" in capsys.readouterr().err
    assert cli.main([*words, "--frames", "8"]) == 2
    assert cli.main([*words, "--test", "3"]) == 2
    assert "--test is 3: give each of the 4 classes a video" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("model", "block"), [("mvit", 0), ("video_swin", 0), ("timesformer", 1)])
def test_frames_and_windows_are_selected_once_tokens_know_what_moves(tmp_path, model, block):
    """A token of TimeSformer covers one frame, so its scores need the first block."""
    node = make_data.config(str(tmp_path), 0, model=model)["STTS"]
    assert node["TIME"]["BLOCKS"] == node["SPACE"]["BLOCKS"] == [block]
