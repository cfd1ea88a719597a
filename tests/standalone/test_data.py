"""Lists, clips and mini-batches of Kinetics and SSv2, on real files."""

import json
import logging
import pickle
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast.standalone import transforms
from stts_slowfast.standalone.data import UNREADABLE, ClipDataset, batch_mixer, build_loader
from stts_slowfast.standalone.defaults import get_cfg
from stts_slowfast.video import VideoError


def write_video(path, num_frames=32, size=(48, 64), color=None):
    """A video whose i-th frame is grey of 6 * i, or of one colour, left half darker."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=30, options={"qp": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "rgb24"
        for number in range(num_frames):
            image = np.empty((*size, 3), np.uint8)
            image[:] = color or 6 * number
            image[:, : size[1] // 2] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def cfg(tmp_path):
    """Six videos of 32 frames in three classes, on plain settings."""
    (tmp_path / "videos").mkdir()
    lines = []
    for number in range(6):
        write_video(tmp_path / "videos" / f"{number}.mp4", color=(40 * number, 200, 100))
        lines.append(f"{number}.mp4 {number % 3}")
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(lines) + "\n")
    cfg = get_cfg()
    cfg.DATA.PATH_TO_DATA_DIR = str(tmp_path)
    cfg.DATA.PATH_PREFIX = str(tmp_path / "videos")
    cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE = 4, 4
    cfg.DATA.TRAIN_JITTER_SCALES = [40, 48]
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 32
    cfg.MODEL.NUM_CLASSES = 3
    cfg.TRAIN.BATCH_SIZE = cfg.TEST.BATCH_SIZE = 4
    cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = 2, 3
    cfg.DATA_LOADER.NUM_WORKERS = 0
    return cfg


def pixels(cfg, clips):
    """Undoes the normalisation: 0..255."""
    return (clips * cfg.DATA.STD[0] + cfg.DATA.MEAN[0]) * 255


def test_training_batches_have_the_declared_shapes(cfg):
    cfg.NUM_GPUS = 2
    batches = list(build_loader(cfg, "train"))
    assert len(batches) == 3
    clips, labels, videos, views = batches[0]
    assert clips.shape == (2, 3, 4, 32, 32) and clips.dtype == torch.float32
    assert labels.dtype == videos.dtype == torch.long
    assert sorted(torch.cat([batch[2] for batch in batches]).tolist()) == [0, 1, 2, 3, 4, 5]
    assert torch.equal(labels, videos % 3) and not views.any()


def test_clips_show_their_own_video(cfg):
    cfg.DATA.RANDOM_FLIP = False
    for clips, _, videos, _ in build_loader(cfg, "val"):
        red = pixels(cfg, clips)[:, 0].amax((1, 2, 3))
        torch.testing.assert_close(red, 40.0 * videos, atol=2, rtol=0)


def test_repeated_augmentation_gives_several_clips_of_a_video(cfg):
    cfg.AUG.ENABLE, cfg.AUG.NUM_SAMPLE = True, 3
    clips, labels, videos, _ = next(iter(build_loader(cfg, "train")))
    assert clips.shape[0] == 12
    assert torch.equal(videos.view(4, 3), videos[::3, None].expand(4, 3))
    assert torch.equal(labels, videos % 3)
    assert not torch.equal(clips[0], clips[1])


def test_every_view_of_every_test_video_comes_once_in_order(cfg):
    batches = list(build_loader(cfg, "test"))
    videos, views = (torch.cat([batch[i] for batch in batches]) for i in (2, 3))
    assert videos.tolist() == [n for n in range(6) for _ in range(6)]
    assert views.tolist() == list(range(6)) * 6


def test_views_cover_the_video_in_time_and_space(cfg, tmp_path):
    write_video(tmp_path / "videos" / "0.mp4")
    cfg.DATA.USE_OFFSET_SAMPLING = True
    dataset = ClipDataset(cfg, "test")
    clips = [pixels(cfg, dataset[view][0][0]) for view in range(6)]
    for view, start in ((2, 0), (5, 16)):  # the right crop lies in the bright half
        expected = 6.0 * (start + torch.tensor([0, 5, 10, 15]))
        torch.testing.assert_close(clips[view][0].amax((1, 2)), expected, atol=2, rtol=0)
    bright = [(clip[0, -1] > 0.75 * clip[0, -1].max()).float().mean() for clip in clips[3:]]
    assert bright[0] < bright[1] < bright[2]


def test_single_crop_is_the_centre(cfg):
    cfg.TEST.NUM_SPATIAL_CROPS = 1
    clip = pixels(cfg, ClipDataset(cfg, "test")[0][0][0])[1, 0]
    assert clip.shape == (32, 32)
    assert (clip[:, :15] < 110).all() and (clip[:, 17:] > 190).all()


def test_seed_decides_order_and_augmentation_with_workers(cfg):
    cfg.AUG.ENABLE = True
    cfg.DATA_LOADER.NUM_WORKERS = 2

    def epoch(seed):
        cfg.RNG_SEED = seed
        return [batch[0] for batch in build_loader(cfg, "train")]

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])


def test_reversed_channels(cfg):
    plain = ClipDataset(cfg, "test")[7][0]
    cfg.DATA.REVERSE_INPUT_CHANNEL = True
    assert torch.equal(ClipDataset(cfg, "test")[7][0], plain.flip(1))


def test_relative_scales_crop_and_resize(cfg):
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = [0.08, 1.0]
    cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE = [0.75, 1.3333]
    assert ClipDataset(cfg, "train")[0][0].shape == (1, 3, 4, 32, 32)


def test_dataset_can_be_sent_to_another_process(cfg):
    cfg.AUG.ENABLE = True
    for split in ("train", "val", "test"):
        dataset = pickle.loads(pickle.dumps(ClipDataset(cfg, split)))
        assert dataset[0][0].shape == (1, 3, 4, 32, 32)


def test_broken_video_is_replaced_in_training_and_named_once(cfg, tmp_path, caplog):
    (tmp_path / "videos" / "2.mp4").write_bytes(b"broken" * 100)
    dataset = ClipDataset(cfg, "train")
    with caplog.at_level(logging.WARNING):
        items = [dataset[2] for _ in range(3)]
    assert all(item[2].item() != 2 and item[1].item() == item[2].item() % 3 for item in items)
    assert [record.message.count("2.mp4") for record in caplog.records] == [1]
    assert "another one takes its place" in caplog.text


def test_broken_video_is_named_once_by_all_workers_and_epochs(cfg, tmp_path, capfd):
    (tmp_path / "videos" / "2.mp4").write_bytes(b"broken" * 100)
    cfg.DATA_LOADER.NUM_WORKERS = 2
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("stts_slowfast").addHandler(handler)
    dataset = ClipDataset(cfg, "val")
    for _ in range(2):
        loader = torch.utils.data.DataLoader(dataset, 1, num_workers=2, collate_fn=lambda x: x)
        assert sum(len(batch) for batch in loader) == 6
    logging.getLogger("stts_slowfast").removeHandler(handler)
    assert capfd.readouterr().err.count("2.mp4") == 1


def test_broken_video_counts_as_wrong_in_testing(cfg, tmp_path, caplog):
    (tmp_path / "videos" / "2.mp4").unlink()
    labels = torch.cat([batch[1] for batch in build_loader(cfg, "test")]).view(6, 6)
    assert (labels[2] == UNREADABLE).all() and (labels[[0, 1, 3, 4, 5]] >= 0).all()
    assert caplog.text.count("2.mp4") == 1 and "counts as wrong" in caplog.text


def test_only_broken_videos_end_with_one_error(cfg):
    cfg.DATA.PATH_PREFIX = "/nowhere"
    with pytest.raises(VideoError, match=r"No such file.*DATA\.PATH_PREFIX \('/nowhere'\)"):
        ClipDataset(cfg, "train")[0]


def rewrite(cfg, text, name="train.csv"):
    with open(f"{cfg.DATA.PATH_TO_DATA_DIR}/{name}", "w") as file:
        file.write(text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("0.mp4 0\n1.mp4 3\n", r"train\.csv line 2: the label is 3 but MODEL\.NUM_CLASSES is 3"),
        ("0.mp4 0\n\n1.mp4 x\n", r"line 3: the label 'x' is not a whole number"),
        ("my own video.mp4 0\n", r"line 1.*4 fields.*DATA\.PATH_LABEL_SEPARATOR"),
        ("", r"names no videos"),
        ("0.mp4 0\n", r"TRAIN\.BATCH_SIZE is 4.*1 videos"),
    ],
)
def test_unusable_lists_are_explained(cfg, text, message):
    rewrite(cfg, text)
    with pytest.raises(ValueError, match=message):
        build_loader(cfg, "train")


def test_lists_of_another_encoding_are_named(cfg):
    with open(f"{cfg.DATA.PATH_TO_DATA_DIR}/train.csv", "wb") as file:
        file.write("caf\u00e9.mp4 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"train\.csv is not UTF-8"):
        build_loader(cfg, "train")


def test_missing_folder_and_list_are_explained(cfg, tmp_path):
    cfg.DATA.PATH_TO_DATA_DIR = ""
    with pytest.raises(ValueError, match=r"PATH_TO_DATA_DIR is empty"):
        build_loader(cfg, "train")
    cfg.DATA.PATH_TO_DATA_DIR = "/nowhere"
    with pytest.raises(FileNotFoundError, match=r"'/nowhere', which does not exist.*train\.csv"):
        build_loader(cfg, "train")
    cfg.DATA.PATH_TO_DATA_DIR = str(tmp_path / "videos")
    with pytest.raises(FileNotFoundError, match=r"which has no train\.csv: write a line"):
        build_loader(cfg, "train")


def test_unusable_settings_are_explained(cfg):
    cfg.TRAIN.DATASET = "ucf"
    with pytest.raises(ValueError, match=r"TRAIN\.DATASET is 'ucf': use one of"):
        build_loader(cfg, "train")
    cfg.TRAIN.DATASET = "kinetics"
    cfg.DATA.TRAIN_CROP_SIZE = 64
    with pytest.raises(ValueError, match=r"TRAIN_JITTER_SCALES begins at 40 but.*64"):
        build_loader(cfg, "train")
    cfg.TEST.NUM_SPATIAL_CROPS = 4
    with pytest.raises(ValueError, match=r"NUM_SPATIAL_CROPS is 4"):
        build_loader(cfg, "test")


def test_separator_allows_spaces_in_paths(cfg, tmp_path):
    (tmp_path / "videos" / "0.mp4").rename(tmp_path / "videos" / "my own.mp4")
    rewrite(cfg, "my own.mp4,2\n")
    cfg.DATA.PATH_LABEL_SEPARATOR, cfg.TRAIN.BATCH_SIZE = ",", 1
    assert next(iter(build_loader(cfg, "train")))[1].tolist() == [2]


# ---- SSv2


@pytest.fixture
def ssv2(cfg, tmp_path):
    """Two videos of 12 and 20 PNG frames; frame i is red of 10 * i."""
    cfg.TRAIN.DATASET = cfg.TEST.DATASET = "ssv2"
    cfg.DATA.RANDOM_FLIP = False
    cfg.DATA.REVERSE_INPUT_CHANNEL = True
    cfg.TRAIN.BATCH_SIZE = 2
    rows = ["original_vido_id video_id frame_id path labels"]
    for number, (name, count) in enumerate((("74225", 12), ("116154", 20))):
        for frame in range(count):
            image = Image.new("RGB", (48, 40), (10 * frame, 0, 0))
            image.save(tmp_path / "videos" / f"{name}_{frame}.png")
            rows.append(f'{name} {number} {frame} {name}_{frame}.png ""')
    labels = {"Holding something": "0", "Dropping something on something": "1"}
    videos = [
        {"id": "116154", "template": "Dropping [something] on [something]"},
        {"id": "74225", "template": "Holding [something]"},
    ]
    rewrite(cfg, json.dumps(labels), "something-something-v2-labels.json")
    for split, name in (("train", "train"), ("val", "validation")):
        rewrite(cfg, "\n".join(rows), f"{split}.csv")
        rewrite(cfg, json.dumps(videos), f"something-something-v2-{name}.json")
    return cfg


def test_ssv2_takes_a_frame_of_every_segment_in_rgb(ssv2):
    dataset = ClipDataset(ssv2, "test")
    assert len(dataset) == 2 * 6
    for item, (label, frames) in ((0, (1, [2, 7, 12, 16])), (6, (0, [1, 4, 7, 9]))):
        clips, labels, _, _ = dataset[item]
        assert labels.tolist() == [label]
        red, green, _ = pixels(ssv2, clips[0])
        expected = 10.0 * torch.tensor(frames)
        torch.testing.assert_close(red.mean((1, 2)), expected, atol=0.1, rtol=0)
        assert green.abs().max() < 0.1


def test_ssv2_trains_and_validates(ssv2):
    for split in ("train", "val"):
        clips, labels, _, _ = next(iter(build_loader(ssv2, split)))
        assert clips.shape == (2, 3, 4, 32, 32) and sorted(labels.tolist()) == [0, 1]


def test_ssv2_names_the_missing_image(ssv2, tmp_path, caplog):
    (tmp_path / "videos" / "74225_4.png").write_bytes(b"no image")
    assert ClipDataset(ssv2, "test")[6][1].tolist() == [UNREADABLE]
    assert "74225_4.png" in caplog.text


def test_ssv2_lists_are_checked(ssv2):
    rewrite(ssv2, '{"Holding something": "0"}', "something-something-v2-labels.json")
    with pytest.raises(ValueError, match="'Dropping something on something' has no label"):
        build_loader(ssv2, "train")
    rewrite(ssv2, "{", "something-something-v2-labels.json")
    with pytest.raises(ValueError, match=r"labels\.json is not JSON"):
        build_loader(ssv2, "train")
    rewrite(ssv2, "{}", "something-something-v2-labels.json")
    rewrite(ssv2, '[{"id": "1"}]', "something-something-v2-train.json")
    with pytest.raises(ValueError, match=r"train\.json: entry 0 .* an id and a template"):
        build_loader(ssv2, "train")


# ---- transforms


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", transforms.OPERATIONS)
def test_every_operation_keeps_shape_and_changes_the_clip(name, increasing):
    clip = torch.randint(0, 200, (2, 3, 24, 32), dtype=torch.uint8)
    bilinear = transforms.F.InterpolationMode.BILINEAR
    for level in (0.0, 0.7, 1.0):
        for sign in (-1, 1):
            out = transforms.apply_operation(clip, name, level, increasing, sign, bilinear)
            assert out.shape == clip.shape and out.dtype == torch.uint8
            if level == 0.7:
                assert not torch.equal(out, clip)


def test_operations_treat_frames_alike():
    clip = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8).expand(3, 3, 24, 32)
    augment = transforms.RandAugment("rand-m7-n4-mstd0.5-inc1")
    for _ in range(10):
        out = augment(clip)
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_policy_is_parsed_as_timm_writes_it():
    augment = transforms.RandAugment("rand-m7-n4-mstd0.5-inc1")
    assert (augment.magnitude, augment.num_ops, augment.deviation) == (7, 4, 0.5)
    assert augment.increasing and not transforms.RandAugment("rand-m9-inc0").increasing
    for policy in ("auto-m7", "rand-q3", "rand-m"):
        with pytest.raises(ValueError, match=r"AUG\.AA_TYPE"):
            transforms.RandAugment(policy)


def test_erased_boxes_lie_in_the_same_place_in_all_frames():
    clip = torch.ones(4, 3, 32, 32)
    for mode, count in (("pixel", 1), ("rand", 1), ("const", 1)):
        out = transforms.RandomErasing(1.0, mode, count)(clip)
        gone = (out != 1).all(1)
        assert torch.equal(gone, gone[:1].expand_as(gone))
        assert 0.01 < gone[0].float().mean() < 0.36
        assert mode == "const" or not torch.equal(out[0], out[1])
    assert torch.equal(transforms.RandomErasing(0.0)(clip), clip) and (clip == 1).all()


def test_short_side_is_scaled_and_the_long_side_rounded_down():
    assert transforms.scale_short_side(torch.zeros(2, 3, 50, 77), 32).shape == (2, 3, 32, 49)
    assert transforms.scale_short_side(torch.zeros(2, 3, 77, 50), 32).shape == (2, 3, 49, 32)


# ---- mixing


def mixing(**keys):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES = 3
    cfg.MIXUP.ENABLE = True
    for key, value in keys.items():
        cfg.MIXUP[key] = value
    return batch_mixer(cfg)


def test_nothing_is_mixed_unless_asked():
    assert batch_mixer(get_cfg()) is None


@pytest.mark.parametrize("keys", [{"CUTMIX_ALPHA": 0.0}, {"ALPHA": 0.0}, {}])
def test_soft_labels_follow_the_mixed_pixels(keys):
    mix = mixing(LABEL_SMOOTH_VALUE=0.0, **keys)
    labels = torch.tensor([0, 1, 2])
    clips = labels.view(3, 1, 1, 1, 1).float().expand(3, 3, 2, 16, 16).clone()
    for _ in range(10):
        mixed, soft = mix(clips, labels)
        assert type(mixed) is torch.Tensor and mixed.shape == clips.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(3))
        mean = (soft * torch.arange(3.0)).sum(1)
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), mean, atol=1e-5, rtol=0)


def test_labels_are_smoothed_even_without_mixing():
    _, soft = mixing(PROB=0.0)(torch.zeros(2, 3, 2, 8, 8), torch.tensor([2, 0]))
    low, high = 0.1 / 3, 0.9 + 0.1 / 3
    torch.testing.assert_close(soft, torch.tensor([[low, low, high], [high, low, low]]))
