"""Decoding inside SlowFast: its sampling, both backends, its retries."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BACKENDS = pytest.mark.parametrize("backend", ["pyav", "torchvision"])
FRAMES, SIZE, RATE = 50, 8, 4


@pytest.fixture(scope="module")
def counting(tmp_path_factory, write_video):
    """A video whose i-th frame has the grey level 5 i."""
    path = tmp_path_factory.mktemp("counting") / "counting.mp4"
    write_video(path, [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(FRAMES)])
    return path


@pytest.fixture
def decode(checkout):
    """Calls SlowFast's ``decode`` as its Kinetics dataset does."""
    from slowfast.datasets import decoder
    from slowfast.datasets.video_container import get_video_container

    def call(path, backend, num_clips=1, rate=RATE, **kwargs):
        arguments = {"video_meta": {}, "target_fps": 30, "max_spatial_scale": 0, **kwargs}
        container = get_video_container(str(path), False, backend)
        return decoder.decode(
            container, [rate] * num_clips, [SIZE] * num_clips, backend=backend, **arguments
        )

    return call


@pytest.fixture
def last_file(checkout):
    """The last file of a dataset, for whose items ``decode`` is called."""
    from stts_slowfast.pyslowfast import read_context

    context = read_context.ReadContext(SimpleNamespace())
    token = read_context._current.set(context)
    yield context.last_file
    read_context._current.reset(token)
    context.last_file.close()


def levels(clip: torch.Tensor) -> list[int]:
    """Which frames of the counting video a clip holds."""
    return (clip.float().mean((1, 2, 3)) / 5).round().int().tolist()


def expected(decoder, clip_idx, num_clips, use_offset=False, length=FRAMES) -> list[int]:
    """The frames by SlowFast's own functions: the clip's span, then evenly out of it."""
    spans = decoder.get_multiple_start_end_idx(
        length, [float(SIZE * RATE)], clip_idx, num_clips, use_offset=use_offset
    )
    start, end = spans[0, :2]
    trimmed = torch.arange(length)[int(np.ceil(start)) : int(end) + 1]
    return decoder.temporal_sampling(trimmed, 0, SIZE * RATE - 1, SIZE).tolist()


@BACKENDS
@pytest.mark.parametrize("use_offset", [False, True])
@pytest.mark.parametrize(("clip_idx", "num_clips"), [(0, 1), (0, 3), (1, 3), (2, 3)])
def test_test_views_hold_slowfasts_frames(
    checkout, counting, decode, backend, clip_idx, num_clips, use_offset
):
    from slowfast.datasets import decoder

    frames, spans, _ = decode(
        counting, backend, clip_idx=clip_idx, num_clips_uniform=num_clips, use_offset=use_offset
    )
    assert frames[0].shape == (SIZE, 48, 64, 3) and frames[0].dtype == torch.uint8
    assert levels(frames[0]) == expected(decoder, clip_idx, num_clips, use_offset)
    assert spans.shape == (1, 3)


@BACKENDS
def test_training_clips_are_random_and_follow_the_seed(checkout, counting, decode, backend):
    from slowfast.datasets import decoder

    found = set()
    for seed in range(6):
        random.seed(seed)
        frames, *_ = decode(counting, backend, clip_idx=-1)
        random.seed(seed)
        assert levels(frames[0]) == expected(decoder, -1, 10)
        found.add(levels(frames[0])[0])
    assert len(found) > 2


@BACKENDS
def test_short_videos_repeat_their_last_frame(checkout, decode, backend, tmp_path, write_video):
    path = tmp_path / "short.mp4"
    write_video(path, [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(10)])
    frames, *_ = decode(path, backend, clip_idx=0)
    assert levels(frames[0]) == [0, 4, 8, 9, 9, 9, 9, 9]


@BACKENDS
@pytest.mark.parametrize(("rate", "before"), [(RATE, True), (2, False)])
def test_several_clips_of_one_video(checkout, counting, decode, backend, rate, before):
    """Of a video that is shorter than they are together SlowFast decodes all frames, and takes the
    one before each start; else it decodes from the one behind."""
    frames, spans, _ = decode(counting, backend, num_clips=2, rate=rate, clip_idx=-1)
    assert [len(clip) for clip in frames] == [SIZE, SIZE]
    for clip, (start, *_) in zip(frames, spans):
        assert levels(clip)[0] == int(np.floor(start) if before else np.ceil(start))


@pytest.fixture
def decoded(monkeypatch):
    """Counts the videos opened and the frames decoded inside SlowFast."""
    from stts_slowfast.pyslowfast import decoder

    counts = {"opened": 0, "decoded": 0}

    class Counting(decoder.Video):
        def __init__(self, *args, **keys):
            counts["opened"] += 1
            super().__init__(*args, **keys)

        def close(self):
            counts["decoded"] += self.num_decoded
            super().close()

    monkeypatch.setattr(decoder, "Video", Counting)
    return counts


@BACKENDS
def test_views_of_one_file_are_one_pass_and_equal_views_alone(
    checkout, decode, backend, tmp_path, write_video, decoded, last_file
):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path in paths:
        write_video(path, [rng.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(90)])

    def view(path, clip, alone=False):
        frames, spans, _ = decode(
            path, backend, clip_idx=clip, num_clips_uniform=5, max_spatial_scale=24
        )
        if alone:
            last_file.close()
        return frames[0], spans

    alone = {(path, clip): view(path, clip, True) for path in paths for clip in range(5)}
    assert decoded["opened"] == 10

    def check(order):
        decoded.update(opened=0, decoded=0)
        for path, clip in order:
            frames, spans = view(path, clip)
            assert torch.equal(frames, alone[path, clip][0])
            np.testing.assert_array_equal(spans, alone[path, clip][1])
        last_file.close()

    check([(path, clip) for path in paths for clip in range(5) for _ in range(3)])
    assert decoded["opened"] == 2 and decoded["decoded"] <= 2 * 90
    check([(paths[0], clip) for clip in (2, 3, 4)])  # another worker had the first
    assert decoded["opened"] == 1 and decoded["decoded"] <= 90 - 30
    check([(paths[0], clip) for clip in (3, 1, 4, 4, 0, 2)])
    check([(paths[number % 2], number) for number in range(5)])


@BACKENDS
@pytest.mark.parametrize("jitter", [32, 40])  # 40: PyAV's frames are scaled in float
def test_views_are_cropped_before_they_are_normalised(
    get_cfg, videos, backend, jitter, monkeypatch
):
    from slowfast.datasets import build_dataset

    from stts_slowfast.pyslowfast.lazy_clip import LazyClip

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.DECODING_BACKEND", backend)
    cfg.DATA.MEAN, cfg.DATA.STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
    cfg.TEST.NUM_SPATIAL_CROPS, cfg.DATA.TRAIN_JITTER_SCALES = 3, [jitter, 48]
    dataset = build_dataset("kinetics", cfg, "test")
    computed, now = [], LazyClip.materialize

    def counted(self, *square):
        computed.append(now(self, *square))
        return computed[-1]

    monkeypatch.setattr(LazyClip, "materialize", counted)
    views = [dataset[view][0][0] for view in range(6)]
    assert len(computed) == 6 and all(type(view) is torch.Tensor for view in views)
    if backend == "torchvision":
        assert {each.shape for each in computed} == {(3, 8, 32, 32)}
    monkeypatch.setattr(LazyClip, "_record_op", lambda *_: None)
    for view in range(6):
        assert torch.equal(dataset[view][0][0], views[view])


def test_the_frames_of_one_clip_are_kept(checkout, counting, decode, last_file):
    for clip in range(10):
        decode(counting, "pyav", clip_idx=clip, num_clips_uniform=10)
        assert len(last_file.opened[2].images) <= SIZE * RATE


def test_a_file_that_changed_is_opened_anew(decode, tmp_path, write_video, decoded, last_file):
    path = tmp_path / "a.mp4"
    for level in (50, 200):
        write_video(path, [np.full((48, 64, 3), level, np.uint8)] * (level // 5))
        frames, *_ = decode(path, "pyav", clip_idx=0)
        assert abs(frames[0].float().mean() - level) < 3
    assert decoded["opened"] == 2


def test_augmentation_of_raw_frames_sees_all_of_them(checkout, counting, decode, monkeypatch):
    from slowfast.datasets import transform

    seen = []

    def augment(frames, *_):
        seen.extend(levels(frames))
        return frames, 0

    monkeypatch.setattr(transform, "augment_raw_frames", augment)
    decode(counting, "pyav", clip_idx=0, time_diff_prob=1.0)
    assert seen == list(range(SIZE * RATE))


def test_only_the_torchvision_backend_scales(checkout, counting, decode):
    sizes = [
        decode(counting, backend, clip_idx=0, max_spatial_scale=24)[0][0].shape[1:3]
        for backend in ("torchvision", "pyav")
    ]
    assert sizes == [(24, 32), (48, 64)]


def test_frames_are_augmented_before_they_are_sampled(checkout, counting, decode):
    frames, _, augmented = decode(counting, "pyav", clip_idx=0, time_diff_prob=1.0)
    assert augmented[0] == 1
    assert len(frames[0]) == SIZE


@pytest.mark.parametrize("content", [b"", b"no video at all", "truncated"])
def test_unreadable_bytes_give_none(checkout, counting, decode, tmp_path, content, capsys):
    path = tmp_path / "broken.mp4"
    whole = counting.read_bytes()
    path.write_bytes(whole[: len(whole) // 3] if content == "truncated" else content)
    assert decode(path, "torchvision", clip_idx=0) == (None, None, None)
    assert "Failed to decode by torchvision with exception: cannot read" in capsys.readouterr().out


@BACKENDS
@pytest.mark.parametrize("mode", ["train", "val", "test"])
def test_datasets_give_clips(get_cfg, videos, backend, mode):
    from slowfast.datasets import build_dataset

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.DECODING_BACKEND", backend)
    dataset = build_dataset("kinetics", cfg, mode)
    inputs, label, index, *_ = dataset[3]
    assert inputs[0].shape == (3, 8, 32, 32)
    assert index == 3
    assert label == (1 if mode == "test" else 3)  # two views a video in testing


@BACKENDS
def test_a_broken_file_is_replaced_by_another(get_cfg, videos, backend, tmp_path):
    from slowfast.datasets import build_dataset

    random.seed(0)
    places = "DATA.PATH_TO_DATA_DIR", str(videos), "OUTPUT_DIR", str(tmp_path)
    cfg = get_cfg(*places, "DATA.DECODING_BACKEND", backend)
    dataset = build_dataset("kinetics", cfg, "train")
    broken = len(dataset) - 1
    assert dataset._path_to_videos[broken].endswith("broken.mp4")
    inputs, _, index, *_ = dataset[broken]
    assert index != broken and inputs[0].shape == (3, 8, 32, 32)


def test_multi_threaded_decoding_continues_from_view_to_view(get_cfg, videos):
    from slowfast.datasets import build_dataset

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.DECODING_BACKEND", "pyav",
                  "DATA_LOADER.ENABLE_MULTI_THREAD_DECODE", True)  # fmt: skip
    assert build_dataset("kinetics", cfg, "val")[0][0][0].shape == (3, 8, 32, 32)


@BACKENDS
@pytest.mark.parametrize("crops", [1, 3])
def test_views_are_those_of_the_standalone_runner(get_cfg, videos, backend, crops):
    """Frames of another size than the crop: with pyav SlowFast scales after decoding, in floats."""
    from slowfast.datasets import build_dataset

    from stts_slowfast.standalone.config import get_cfg as standalone_cfg
    from stts_slowfast.standalone.data import ClipDataset, normalize_clips

    cfg = get_cfg("DATA.PATH_TO_DATA_DIR", str(videos), "DATA.DECODING_BACKEND", backend,
                  "TEST.NUM_SPATIAL_CROPS", crops)  # fmt: skip
    ours = standalone_cfg()
    ours.DATA.update({key: cfg.DATA[key] for key in ours.DATA if key in cfg.DATA})
    ours.TEST.update(NUM_ENSEMBLE_VIEWS=2, NUM_SPATIAL_CROPS=crops)
    dataset = build_dataset("kinetics", cfg, "test")
    views = normalize_clips(ClipDataset(ours, "test")[0][0], ours)
    assert len(views) == 2 * crops
    for number, view in enumerate(views):
        torch.testing.assert_close(view, dataset[number][0][0], rtol=0, atol=2e-6)
