"""Videos without labels: a folder or a list of them is read as a dataset's list is."""

import numpy as np
import pytest
import torch

from stts_slowfast.standalone.annotations import VideoRecord
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.data import ClipDataset, build_loader, read_ssv2
from stts_slowfast.standalone.films import find_films, unlabelled
from stts_slowfast.tools.demo.make_data import write_video
from stts_slowfast.video import Video


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.DATA.NUM_FRAMES, cfg.DATA.SAMPLING_RATE = 4, 2
    cfg.DATA.TRAIN_JITTER_SCALES, cfg.DATA.TRAIN_CROP_SIZE = [32, 32], 32
    cfg.DATA.TEST_CROP_SIZE = 32
    cfg.TEST.NUM_ENSEMBLE_VIEWS, cfg.TEST.NUM_SPATIAL_CROPS = 2, 1
    cfg.TRAIN.DATASET = cfg.TEST.DATASET = "kinetics"
    cfg.TRAIN.BATCH_SIZE = cfg.TEST.BATCH_SIZE = 2
    cfg.DATA_LOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("b.mp4", "a/c.MP4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frames = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
        write_video(str(tmp_path / name.lower()), frames)
        (tmp_path / name.lower()).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no video")
    return tmp_path


def test_a_folder_or_a_list_names_films(cfg, folder):
    found = find_films(cfg, str(folder))
    assert found == [str(folder / "a" / "c.MP4"), str(folder / "b.mp4")]
    listed = folder / "list.csv"
    listed.write_text("b.mp4 3\na/c.MP4\n")
    cfg.DATA.PATH_PREFIX = str(folder)
    assert find_films(cfg, str(listed)) == found[::-1]


def test_films_that_are_not_there_are_named(cfg, folder):
    (folder / "list.csv").write_text("b.mp4\nlost.mp4\n")
    with pytest.raises(FileNotFoundError, match=r"2 of the 2 videos .* such as b\.mp4: is DATA"):
        find_films(cfg, str(folder / "list.csv"))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: give a folder"):
        find_films(cfg, "nowhere")
    (folder / "list.csv").write_text("\n")
    with pytest.raises(ValueError, match="names no videos"):
        find_films(cfg, str(folder / "list.csv"))
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no videos: their names end in \.3gp"):
        find_films(cfg, str(folder / "empty"))


def test_films_replace_a_list_in_training_too(cfg, folder):
    films = unlabelled(find_films(cfg, str(folder)))
    for split, count in (("train", 2), ("test", 4)):
        clips = [batch[0] for batch in build_loader(cfg, split, films=films)]
        assert sum(map(len, clips)) == count
        assert clips[0].shape[1:] == (3, 4, 32, 32) and clips[0].dtype == torch.uint8


def test_segments_of_a_file_are_those_of_its_images(cfg, folder, tmp_path, monkeypatch):
    from stts_slowfast.standalone import data

    path = str(folder / "b.mp4")
    with Video(path) as video:
        images = list(video.iter_frames(list(range(12))))
    stored = {f"{i:02d}.png": image[..., ::-1] for i, image in enumerate(images)}
    monkeypatch.setattr(data, "read_image", stored.__getitem__)
    found = read_ssv2(cfg, VideoRecord(path, -2), "test", 0, None)
    expected = read_ssv2(cfg, VideoRecord(path, -2, tuple(stored)), "test", 0, None)
    assert found[1:] == expected[1:] and len(found[1]) == 2
    assert all(np.array_equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    cfg.TEST.DATASET = "ssv2"
    assert ClipDataset(cfg, "test", unlabelled([path]))[0][0].shape == (2, 3, 4, 32, 32)
