"""Lists, clips and mini-batches of Kinetics and SSv2, on real files."""

import gc
import json
import multiprocessing
import os
import pickle
import random
import time
import tracemalloc
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast.standalone import transforms
from stts_slowfast.standalone.annotations import list_kinetics, list_ssv2
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.data import UNREADABLE, ClipDataset, build_loader, normalize_clips
from stts_slowfast.video import Video, VideoError, clip_span, frame_indices, reader
from stts_slowfast.video.error_log import VideoErrorLog, VideoIssue, exceeds_limit
from stts_slowfast.video.lru_cache import LRUCache


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
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


def pixels(cfg, clips):
    """The pixels 0..255 of clips, whose normalisation is undone."""
    if clips.dtype == torch.uint8:
        return clips.float()
    return (clips * cfg.DATA.STD[0] + cfg.DATA.MEAN[0]) * 255


def test_training_batches_have_the_declared_shapes(cfg):
    cfg.TRAIN.BATCH_SIZE = 2
    batches = list(build_loader(cfg, "train"))
    assert len(batches) == 3
    clips, labels, videos, views = batches[0]
    assert clips.shape == (2, 3, 4, 32, 32) and clips.dtype == torch.uint8
    assert normalize_clips(clips, cfg).dtype == torch.float32
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


@pytest.mark.parametrize("pin", [True, False])
def test_batches_of_a_gpu_are_in_pinned_memory(cfg, monkeypatch, pin):
    """Also those that are cut from the views of several videos: 4 of 6 each."""
    cfg.DATA_LOADER.PIN_MEMORY = pin
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaders = {split: build_loader(cfg, split) for split in ("train", "val", "test")}
    assert {split: loader.pin_memory for split, loader in loaders.items()} == dict.fromkeys(
        loaders, pin
    )
    monkeypatch.undo()
    empty, pinned = torch.empty, []

    def noted(*size, pin_memory=False, **keys):  # a CPU has none
        pinned.extend([size] * pin_memory)
        return empty(*size, **keys)

    plain = list(build_loader(cfg, "test"))
    monkeypatch.setattr(torch, "empty", noted)
    batches = list(loaders["test"])
    assert bool(pinned) == pin
    assert [len(batch[0]) for batch in batches] == [len(batch[0]) for batch in plain]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, plain))


@pytest.mark.parametrize("batch", [1, 4, 12, 100])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_is_opened_once_for_all_its_views(cfg, batch, workers, monkeypatch):
    cfg.TEST.BATCH_SIZE, cfg.DATA_LOADER.NUM_WORKERS = batch, workers
    rewrite(cfg, "".join(f"{number}.mp4 0\n" for number in range(5)), "test.csv")
    opened = torch.zeros(1, dtype=torch.int64).share_memory_()

    class Counting(Video):
        def __init__(self, *args, **keys):
            opened[0] += 1
            super().__init__(*args, **keys)

    monkeypatch.setattr("stts_slowfast.video.frame_cache.Video", Counting)
    loader = build_loader(cfg, "test")
    batches = list(loader)
    assert opened.item() == 5
    sizes = [len(labels) for _, labels, *_ in batches]
    assert sizes[:-1] == [batch] * (len(loader) - 1) and sum(sizes) == 30
    assert len(sizes) == len(loader)


@pytest.mark.parametrize("jitter", [32, 40])  # 40: some frames are scaled by the decoder
@pytest.mark.parametrize("size", [(48, 64), (24, 40), (32, 50)])
@pytest.mark.parametrize("backend", ["pyav", "torchvision"])
def test_views_equal_those_decoded_alone(cfg, tmp_path, size, jitter, backend):
    """By the formulas of one view on its own: decode, float, scale, crop, normalise."""
    cfg.DATA.DECODING_BACKEND = backend
    write_video(tmp_path / "videos" / "0.mp4", size=size)
    cfg.DATA.MEAN, cfg.DATA.STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
    cfg.DATA.TRAIN_JITTER_SCALES = [jitter, 48]
    scale = transforms.view_scale(cfg)
    clips = torch.cat([normalize_clips(clips, cfg) for clips, *_ in build_loader(cfg, "test")])
    for view in range(6):
        with Video(tmp_path / "videos" / "0.mp4") as video:
            span = clip_span(32, 16.0, view // 3, 2)
            frames = video.decode(frame_indices(*span, 4, 32), scale * (backend != "pyav"))
            frames = frames.permute(0, 3, 1, 2)
        frames = transforms.F.to_dtype(frames, torch.float32, scale=True)
        crop = transforms.UniformCrop(scale, 32, view % 3)(frames)
        expected = transforms.F.normalize(crop, cfg.DATA.MEAN, cfg.DATA.STD).transpose(0, 1)
        assert torch.equal(clips[view], expected)


def test_views_cover_the_video_in_time_and_space(cfg, tmp_path):
    write_video(tmp_path / "videos" / "0.mp4")
    cfg.DATA.USE_OFFSET_SAMPLING = True
    dataset = ClipDataset(cfg, "test")
    clips = pixels(cfg, dataset[0][0])
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


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_order_and_draws_follow_seed_epoch_and_item_alone(cfg, workers):
    cfg.AUG.ENABLE, cfg.TRAIN.BATCH_SIZE = True, 2
    cfg.DATA_LOADER.NUM_WORKERS = workers

    def epoch(number, skip=0, **keys):
        for key, value in keys.items():
            cfg[key] = value
        loader = build_loader(cfg, "train")
        torch.manual_seed(workers + 5)
        loader.set_epoch(number)
        loader.skip(skip)
        return list(loader)

    def same(one, other):
        return len(one) == len(other) and all(
            torch.equal(a, b) for left, right in zip(one, other) for a, b in zip(left, right)
        )

    whole = epoch(3)
    loader = build_loader(cfg, "train")  # as above, after other epochs
    for number in range(4):
        loader.set_epoch(number)
        batches = list(loader)
    assert same(whole, batches)
    assert same(whole[1:], epoch(3, skip=1))
    cfg.DATA_LOADER.NUM_WORKERS = 0
    assert same(whole, epoch(3))
    assert not same(whole, epoch(2)) and not same(whole, epoch(3, RNG_SEED=2))
    cfg.RNG_SEED = 1
    clips, _, videos, _ = whole[0]
    assert torch.equal(ClipDataset(cfg, "train")[3, int(videos[0])][0][0], clips[0])


def test_an_item_is_drawn_anew_in_every_epoch(cfg):
    dataset = ClipDataset(cfg, "train")
    clips = {dataset[epoch, 1][0].numpy().tobytes() for epoch in range(6)}
    assert len(clips) > 3


def test_reading_leaves_the_generators_alone(cfg):
    dataset = ClipDataset(cfg, "train")
    states = random.getstate(), torch.get_rng_state()
    dataset[0]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_processes_share_the_videos(cfg):
    cfg.TRAIN.BATCH_SIZE = 2  # of a machine: one video for each of its two processes
    for split in ("val", "test", "train"):
        loaders = [build_loader(cfg, split, rank, 2) for rank in range(2)]
        seen = [torch.cat([batch[2] for batch in loader]).unique() for loader in loaders]
        assert sorted(torch.cat(seen).tolist()) == [0, 1, 2, 3, 4, 5]
    cfg.TRAIN.BATCH_SIZE, cfg.NUM_SHARDS = 1, 4
    lengths = {len(list(build_loader(cfg, "train", rank, 4))) for rank in range(4)}
    assert lengths == {2}  # two videos come twice, so that no process waits for another


def test_reversed_channels(cfg):
    cfg.DATA.MEAN = [0.3, 0.4, 0.5]
    plain = normalize_clips(ClipDataset(cfg, "test")[1][0], cfg)
    cfg.DATA.REVERSE_INPUT_CHANNEL = True
    assert torch.equal(normalize_clips(ClipDataset(cfg, "test")[1][0], cfg), plain.flip(1))


def test_relative_scales_crop_and_resize(cfg):
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = [0.08, 1.0]
    cfg.DATA.TRAIN_JITTER_ASPECT_RELATIVE = [0.75, 1.3333]
    assert ClipDataset(cfg, "train")[0][0].shape == (1, 3, 4, 32, 32)


def test_dataset_can_be_sent_to_another_process(cfg):
    cfg.AUG.ENABLE = True
    for split in ("train", "val", "test"):
        dataset = pickle.loads(pickle.dumps(ClipDataset(cfg, split)))
        assert dataset[0][0].shape == (6 if split == "test" else 1, 3, 4, 32, 32)


# ---- what cannot be read


def break_video(cfg, *numbers):
    for number in numbers:
        with open(f"{cfg.DATA.PATH_PREFIX}/{number}.mp4", "wb") as file:
            file.write(b"broken" * 100)


def written(cfg):
    with open(f"{cfg.OUTPUT_DIR}/bad_videos.jsonl") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_video_is_replaced_logged_and_written_once(cfg, workers, caplog):
    break_video(cfg, 2)
    cfg.DATA_LOADER.NUM_WORKERS, cfg.TRAIN.BATCH_SIZE = workers, 2
    loader = build_loader(cfg, "train")
    for epoch in range(3):
        loader.set_epoch(epoch)
        _, labels, videos, _ = (torch.cat(parts) for parts in zip(*loader))
        assert len(videos) == 6 and 2 not in videos and torch.equal(labels, videos % 3)
        assert loader.bad.count() == {"unreadable": 1, "damaged": 0}
    assert caplog.text.count("2.mp4 is unreadable") == 1
    assert "another one replaces it" in caplog.text
    (record,) = written(cfg)
    assert record["path"].endswith("2.mp4") and record["split"] == "train"
    assert record["kind"] == "unreadable" and "not a video" in record["reason"]
    next(iter(build_loader(cfg, "val")))  # another loader, of a resumed run
    assert len(written(cfg)) == 1


def test_a_bad_video_is_written_once_over_restarts_and_processes(cfg):
    finding = VideoIssue(2, "2.mp4", "unreadable", "not a video")
    for _ in range(3):
        VideoErrorLog(cfg, "train").add([finding])
    VideoErrorLog(cfg, "train").add([finding._replace(kind="damaged")])
    assert [record["kind"] for record in written(cfg)] == ["unreadable", "damaged"]


def _in_a_group(rank, cfg, store, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    bad = VideoErrorLog(cfg, "test")
    bad.add([VideoIssue(2, "2.mp4", "unreadable", "gone")] * 2)  # both processes met it
    if rank == 1:
        bad.add(
            [VideoIssue(4, "4.mp4", "damaged", "cut"), VideoIssue(5, "5.mp4", "unreadable", "cut")]
        )
    count = bad.count()
    try:
        bad.require_all(allow_missing=False)
        error = ""
    except ValueError as raised:
        error = str(raised)
    results.put((rank, count, error))
    torch.distributed.destroy_process_group()


def test_processes_count_bad_videos_together_and_all_of_them_stop(cfg, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_in_a_group, args=(rank, cfg, tmp_path / "store", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert len(found) == 2
    for _, count, error in found:
        assert count == {"unreadable": 2, "damaged": 1}
        assert "2 of the test videos" in error and "2.mp4: gone" in error and "5.mp4" in error
    assert len(written(cfg)) == 3


def test_broken_video_is_unreadable_in_all_its_test_views(cfg, tmp_path, caplog):
    (tmp_path / "videos" / "2.mp4").unlink()
    loader = build_loader(cfg, "test")
    labels = torch.cat([batch[1] for batch in loader]).view(6, 6)
    assert (labels[2] == UNREADABLE).all() and (labels[[0, 1, 3, 4, 5]] >= 0).all()
    assert caplog.text.count("2.mp4") == 1 and "counts as wrong" in caplog.text
    loader.bad.require_all(allow_missing=True)
    with pytest.raises(ValueError, match=r"1 of the test videos .*ALLOW_MISSING.*\n.*2\.mp4: No"):
        loader.bad.require_all(allow_missing=False)


def test_training_continues_up_to_the_share_of_bad_videos_and_stops_above(cfg):
    break_video(cfg, 0, 2, 4)
    cfg.TRAIN.BATCH_SIZE = 2
    for seed in range(5):
        cfg.RNG_SEED = seed
        videos = torch.cat([batch[2] for batch in build_loader(cfg, "train")])
        assert set(videos.tolist()) == {1, 3, 5}
    break_video(cfg, 5)
    with pytest.raises(VideoError, match=r"3 other videos.*more than DATA\.MAX_BAD_SHARE 0\.5"):
        list(build_loader(cfg, "train"))


def test_the_share_of_bad_videos_is_judged_beyond_doubt():
    assert not exceeds_limit(60, 100, 100_000, 0.5)  # luck
    assert exceeds_limit(80, 100, 100_000, 0.5)
    assert not exceeds_limit(50, 100, 100, 0.5)
    assert exceeds_limit(51, 100, 100, 0.5)  # certain


def test_a_damaged_video_is_used_counted_and_written(cfg, tmp_path):
    path = tmp_path / "videos" / "2.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "8"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for number in range(64):
            image = np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    loader = build_loader(cfg, "test")
    labels = torch.cat([labels for _, labels, *_ in loader])
    assert (labels >= 0).all() and loader.bad.count() == {"unreadable": 0, "damaged": 1}
    loader.bad.require_all(allow_missing=False)
    (record,) = written(cfg)
    assert record["kind"] == "damaged" and "ends early" in record["reason"]


def test_a_pipe_and_a_hung_file_do_not_stop_a_run(cfg, tmp_path, monkeypatch):
    (tmp_path / "videos" / "2.mp4").unlink()
    os.mkfifo(tmp_path / "videos" / "2.mp4")
    real = Video

    def hung(path, **keys):
        if path.endswith("3.mp4"):
            time.sleep(20)
        return real(path, **keys)

    monkeypatch.setattr("stts_slowfast.video.frame_cache.Video", hung)
    cfg.DATA.READ_TIMEOUT = 0.5
    start = time.perf_counter()
    loader = build_loader(cfg, "val")
    assert not {2, 3} & set(torch.cat([videos for _, _, videos, _ in loader]).tolist())
    assert time.perf_counter() - start < 15
    reasons = " ".join(record["reason"] for record in written(cfg))
    assert "not a regular file" in reasons and "DATA.READ_TIMEOUT, 0.5" in reasons


def test_videos_are_rotated_unless_the_config_forbids_it(cfg, tmp_path):
    with av.open(str(tmp_path / "videos" / "0.mp4"), "w") as container:
        stream = container.add_stream("libx264rgb", rate=30, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        stream.set_display_rotation(180)
        image = np.zeros((48, 64, 3), np.uint8)
        image[:, :32] = 200
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    centre = ClipDataset(cfg, "test")[0][0][1, 0, 0].float()
    cfg.DATA.ROTATE = False
    stored = ClipDataset(cfg, "test")[0][0][1, 0, 0].float()
    assert centre[:, :8].mean() < 5 and centre[:, -8:].mean() > 195
    assert stored[:, :8].mean() > 195 and stored[:, -8:].mean() < 5


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


def test_separator_allows_spaces_in_paths(cfg, tmp_path):
    (tmp_path / "videos" / "0.mp4").rename(tmp_path / "videos" / "my own.mp4")
    rewrite(cfg, "my own.mp4,2\n")
    cfg.DATA.PATH_LABEL_SEPARATOR, cfg.TRAIN.BATCH_SIZE = ",", 1
    assert next(iter(build_loader(cfg, "train")))[1].tolist() == [2]


def test_an_item_is_the_same_whatever_was_read_before(cfg, monkeypatch):
    """Of files that are not what they claim; else a resumed run is another run."""
    files = Path(__file__).parents[1] / "fixtures" / "videos"
    names = "xvid.avi", "nvop.avi", "nostss_m4.mp4", "catoff.mkv", "hflip.mp4"
    rewrite(cfg, "".join(f"{files / name} 0\n" for name in names))
    dataset = ClipDataset(cfg, "train")

    def fresh(epoch, index):
        monkeypatch.setattr(reader, "_cache", LRUCache())
        return dataset[epoch, index][0]

    alone = {(epoch, index): fresh(epoch, index) for epoch in range(3) for index in range(5)}
    monkeypatch.setattr(reader, "_cache", LRUCache())
    for (epoch, index), clips in alone.items():
        assert torch.equal(dataset[epoch, index][0], clips)


def test_a_path_may_have_a_space_and_a_line_slowfasts_number(cfg):
    text = "my vids/a.mp4 2\nb.mp4 300 1\nmy 2/c.mp4 0\nd.mp4  1\n"
    rewrite(cfg, text, "val.csv")
    videos = list_kinetics(cfg, "val")
    folder = cfg.DATA.PATH_PREFIX
    expected = [(f"{folder}/{path}", label) for path, label in
                (("my vids/a.mp4", 2), ("b.mp4", 1), ("my 2/c.mp4", 0), ("d.mp4", 1))]  # fmt: skip
    assert [(video.path, video.label) for video in videos] == expected


def test_a_byte_order_mark_belongs_to_no_path(cfg):
    for line in ("a.mp4,4", "a.mp4\t4", "a.mp4 4", "a.mp4;-1"):
        cfg.DATA.PATH_LABEL_SEPARATOR = "|"
        rewrite(cfg, f"{line}\n", "test.csv")
        with pytest.raises(ValueError, match=r"DATA\.PATH_LABEL_SEPARATOR, which is '\|'"):
            list_kinetics(cfg, "test")
    cfg.DATA.PATH_LABEL_SEPARATOR = " "
    rewrite(cfg, "\ufeff0.mp4 2\n1.mp4 1\n", "val.csv")
    assert [os.path.basename(video.path) for video in list_kinetics(cfg, "val")] == [
        "0.mp4",
        "1.mp4",
    ]


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
    assert len(dataset) == 2
    for item, (label, frames) in enumerate([(1, [2, 7, 12, 16]), (0, [1, 4, 7, 9])]):
        clips, labels, *_ = dataset[item]
        assert labels.tolist() == [label] * 6
        red, green, _ = pixels(ssv2, clips[0])
        expected = 10.0 * torch.tensor(frames)
        torch.testing.assert_close(red.mean((1, 2)), expected, atol=0.1, rtol=0)
        assert green.abs().max() < 0.1


def test_a_list_of_many_frames_takes_few_bytes_each(ssv2):
    rows = ["original_vido_id video_id frame_id path labels"]
    rows += [f'{n % 50} 0 {n} {n % 50}/{n:06d}.jpg ""' for n in range(20_000)]  # not in one place
    rewrite(ssv2, "\n".join(rows))
    videos = [{"id": str(n), "template": "Holding [something]"} for n in (7, 3)]
    rewrite(ssv2, json.dumps(videos), "something-something-v2-train.json")
    tracemalloc.start()
    entries = list_ssv2(ssv2, "train")
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 60 * 20_000
    assert [entry.path for entry in entries] == ["7", "3"] and len(entries) == 2
    frames = entries[1].frames
    assert len(frames) == 400 and frames[1] == f"{ssv2.DATA.PATH_PREFIX}/3/000053.jpg"


def test_ssv2_trains_and_validates(ssv2):
    for split in ("train", "val"):
        clips, labels, _, _ = next(iter(build_loader(ssv2, split)))
        assert clips.shape == (2, 3, 4, 32, 32) and sorted(labels.tolist()) == [0, 1]


def test_ssv2_names_the_missing_image(ssv2, tmp_path, caplog):
    (tmp_path / "videos" / "74225_4.png").write_bytes(b"no image")
    list(build_loader(ssv2, "test"))
    assert "74225_4.png" in caplog.text
    assert ClipDataset(ssv2, "test")[1][1].tolist() == [UNREADABLE] * 6


def test_ssv2_lists_may_begin_with_a_byte_order_mark(ssv2, tmp_path):
    for path in [*tmp_path.glob("*.json"), *tmp_path.glob("*.csv")]:
        path.write_text("\ufeff" + path.read_text())
    assert ClipDataset(ssv2, "test")[1][1].tolist() == [0] * 6


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


@pytest.mark.parametrize("ends", ["closed", "gone"])
def test_the_workers_of_a_loader_end_without_the_garbage_collector(cfg, ends):
    """Collected with its queues, the loader closes files of others (the queue of a worker that
    never got an index starts its thread then, for connections that are being closed)."""
    cfg.DATA_LOADER.NUM_WORKERS, cfg.TRAIN.BATCH_SIZE = 2, 4  # one batch: one worker gets none
    gc.disable()
    try:
        loader = build_loader(cfg, "train")
        assert len(list(loader)) == 1 and len(multiprocessing.active_children()) == 2
        if ends == "closed":
            loader.close()
        else:
            gone = weakref.ref(loader)
            del loader
            assert gone() is None
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
