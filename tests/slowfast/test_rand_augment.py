"""STTS.FAST_AUGMENT: SlowFast's draws, its pixels up to a grey level, and nothing unless asked."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from stts_slowfast.pyslowfast import rand_augment as pyslowfast_rand_augment
from stts_slowfast.pyslowfast.lazy_clip import LazyClip

GREY = 1 / 255 / 0.225  # a grey level of normalised clips


def seeded(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def drawn() -> tuple:
    """What the generators would give next."""
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.fixture
def config(get_cfg, videos):
    def make(*opts):
        return get_cfg(
            *("DATA.PATH_TO_DATA_DIR", str(videos), "AUG.ENABLE", True, "AUG.RE_PROB", 0.3),
            *("DATA.DECODING_BACKEND", "torchvision", "DATA.TRAIN_JITTER_SCALES", [40, 48]),
            *opts,
        )

    return make


@pytest.fixture
def pictures():
    """Frames with smooth parts, noise and a flat channel."""
    rng = np.random.default_rng(0)
    frames = rng.integers(10, 240, (4, 37, 52, 3), dtype=np.uint8)
    frames[1] = np.asarray(Image.fromarray(frames[1, :6, :8]).resize((52, 37)))
    frames[2, ..., 0] = 77
    return frames


@pytest.mark.parametrize("policy", ["rand-m7-n1-mstd0.5-inc1", "rand-m9-n1", "rand-m5-n1-mstd0.5"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_each_operation_has_slowfasts_draws_and_pixels(checkout, pictures, policy, interpolation):
    from slowfast.datasets.transform import create_random_augment

    images, used = [Image.fromarray(frame) for frame in pictures], set()
    ours = pyslowfast_rand_augment.LazyImages(pictures)
    for seed in range(60):
        transform = create_random_augment((37, 52), policy, interpolation)
        seeded(seed)
        expected, theirs_next = transform(images), drawn()
        seeded(seed)
        found, next_drawn = transform(ours), drawn()
        assert next_drawn == theirs_next
        assert isinstance(found, pyslowfast_rand_augment.LazyImages) and len(found.operations) <= 1
        used.update(operation.name for operation in found.operations)
        part = found.crop((0, 0, 37, 52)).astype(int)
        assert np.abs(part - np.stack([np.asarray(each) for each in expected])).max() <= 1
    assert len(used) > 8


def test_every_function_of_slowfasts_has_its_operation(checkout):
    from slowfast.datasets import rand_augment

    names = {*rand_augment._RAND_TRANSFORMS, *rand_augment._RAND_INCREASING_TRANSFORMS}
    assert {rand_augment.NAME_TO_OP[name].__name__ for name in names} == set(
        pyslowfast_rand_augment.NAMES
    )


def item_of(cfg, number: int, seed: int):
    from slowfast.datasets import build_dataset

    dataset = build_dataset(cfg.TRAIN.DATASET, cfg, "train")
    seeded(seed)
    inputs, *others = dataset[number]
    return inputs, others[:2], drawn()


@pytest.mark.parametrize("relative", [[], [0.2, 1.0]])
@pytest.mark.parametrize("samples", [1, 2])
def test_items_have_slowfasts_draws_and_nearly_its_pixels(config, relative, samples):
    keys = ("AUG.AA_TYPE", "rand-m7-n2-mstd0.5-inc1", "AUG.NUM_SAMPLE", samples)
    keys += ("DATA.TRAIN_JITTER_SCALES_RELATIVE", relative)
    keys += ("DATA.TRAIN_JITTER_ASPECT_RELATIVE", [0.75, 1.3333] if relative else [])
    worst = []
    for seed in range(12):
        theirs = item_of(config(*keys), seed % 8, seed)
        ours = item_of(config(*keys, "STTS.FAST_AUGMENT", True), seed % 8, seed)
        assert ours[1:] == theirs[1:]
        clips = [[one[0] for one in item[0]] if samples > 1 else item[0] for item in (ours, theirs)]
        for clip, expected in zip(*clips):
            assert type(clip) is torch.Tensor and clip.shape == expected.shape
            apart = (clip - expected).abs() / GREY
            assert apart.mean() < 1  # a grey level may grow in a second operation
            worst.append(apart.max().item())
    assert np.median(worst) <= 1.01


def test_nothing_changes_if_it_is_off(config, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(pyslowfast_rand_augment.LazyImages, "__init__", fail)
    keys = ("AUG.AA_TYPE", "rand-m7-n4-mstd0.5-inc1")
    inputs, *_ = item_of(config(*keys), 0, 0)
    assert type(inputs[0]) is torch.Tensor
    assert config().STTS.FAST_AUGMENT is False


def test_it_works_without_selection_and_only_on_the_crop(config, monkeypatch):
    made, part = [], pyslowfast_rand_augment.augment

    def counted(frames, operations, box):
        made.append(box)
        return part(frames, operations, box)

    monkeypatch.setattr(pyslowfast_rand_augment, "augment", counted)
    keys = ("AUG.AA_TYPE", "rand-m7-n4-mstd0.5-inc1", "STTS.FAST_AUGMENT", True)
    keys += ("DATA.TRAIN_JITTER_SCALES_RELATIVE", [0.1, 0.3], "STTS.ENABLE", False)
    keys += ("DATA.TRAIN_JITTER_ASPECT_RELATIVE", [0.75, 1.3333])
    item_of(config(*keys), 0, 0)
    ((_, _, height, width),) = made
    assert 0.05 < height * width / (40 * 53) < 0.4


def test_validation_and_views_are_unchanged(config):
    from slowfast.datasets import build_dataset

    for split in ("val", "test"):
        clips = []
        for asked in (False, True):
            dataset = build_dataset("kinetics", config("STTS.FAST_AUGMENT", asked), split)
            seeded(3)
            clips.append(dataset[1][0][0])
        assert torch.equal(*clips)


def test_clips_of_images_are_augmented_too(config, pictures):
    """SSv2's frames come as bytes in `aug_frame`."""
    from slowfast.datasets import utils

    frames = torch.from_numpy(pictures)
    keys = ("AUG.AA_TYPE", "rand-m7-n1-mstd0.5-inc1", "AUG.RE_PROB", 0.0)
    for seed in range(20):
        clips = []
        for asked in (False, True):
            cfg = config(*keys, "STTS.FAST_AUGMENT", asked)
            seeded(seed)
            clips.append(utils.aug_frame(cfg, "train", False, frames, -1, 33, 36, 32))
        assert not isinstance(clips[1], LazyClip)
        assert ((clips[0] - clips[1]).abs() / GREY).max() <= 1.01


def test_other_interpolations_are_refused(config):
    keys = ("AUG.AA_TYPE", "rand-m7-n4-inc1", "AUG.INTERPOLATION", "hamming")
    with pytest.raises(ValueError, match=r"STTS\.FAST_AUGMENT is True, but AUG\.INTERPOLATION"):
        for seed in range(20):
            item_of(config(*keys, "STTS.FAST_AUGMENT", True), 0, seed)
