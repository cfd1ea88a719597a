"""Augmentation has the distributions and the pixels of SlowFast's, which uses PIL."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from stts_slowfast.standalone import rand_augment, transforms
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.video import image_ops

GREY = (128, 128, 128)


def by_pil(image, name, level, increasing, sign, resample):
    """timm's operations (arXiv 1909.13719) on one PIL image, at the same scales."""
    signed, enhance = sign * level, 1 + sign * 0.9 * level if increasing else 0.1 + 1.8 * level

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, resample, fillcolor=GREY)

    steps = int(level * 4)
    threshold = 256 - int(level * 256) if increasing else int(level * 256)
    values = np.arange(256)
    added = np.where(values < 128, np.minimum(values + int(level * 110), 255), values)
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(-30 * signed, resample, fillcolor=GREY),
        "Posterize": lambda: image.point(
            [v & ~(2 ** (8 - (4 - steps if increasing else steps)) - 1) for v in range(256)] * 3
        ),
        "Solarize": lambda: ImageOps.solarize(image, threshold),
        "SolarizeAdd": lambda: image.point(added.tolist() * 3),
        "Color": lambda: ImageEnhance.Color(image).enhance(enhance),
        "Contrast": lambda: ImageEnhance.Contrast(image).enhance(enhance),
        "Brightness": lambda: ImageEnhance.Brightness(image).enhance(enhance),
        "Sharpness": lambda: ImageEnhance.Sharpness(image).enhance(enhance),
        "ShearX": lambda: affine(1, 0.3 * signed, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, 0.3 * signed, 1, 0),
        "TranslateX": lambda: affine(1, 0, -0.45 * signed * image.size[0], 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, -0.45 * signed * image.size[1]),
    }[name]()


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("name", image_ops.OPERATIONS)
def test_every_operation_is_within_a_grey_level_of_pils(name, increasing, bicubic):
    rng = np.random.default_rng(0)
    low, high = rng.integers(0, 40), rng.integers(180, 250)
    images = rng.integers(low, high, (3, 37, 52, 3), dtype=np.uint8)
    images[2, ..., 0], images[2, :9, :, 1], images[2, 1:, :, 2] = 77, 250, 99  # flat, or nearly
    images[1] = np.asarray(Image.fromarray(images[1, :6, :8]).resize((52, 37)))  # a smooth one
    resample = Image.BICUBIC if bicubic else Image.BILINEAR
    for level in (0.0, 0.3, 0.7, 1.0):
        for sign in (-1, 1):
            operation = rand_augment.operation(name, level, increasing, sign, (37, 52), bicubic)
            out = image_ops.operate(images, operation)
            assert out.shape == images.shape and out.dtype == np.uint8
            for image, frame in zip(images, out):
                expected = by_pil(Image.fromarray(image), name, level, increasing, sign, resample)
                difference = np.asarray(expected).astype(int) - frame
                assert np.abs(difference).max() <= 1, (level, sign)
                # PIL rounds each pixel's grey before it takes their mean.
                assert abs(difference.mean()) < 0.1 or name == "Contrast", (level, sign)


def test_a_part_of_an_augmented_clip_is_that_part_of_the_whole():
    policy = rand_augment.RandAugment("rand-m7-n4-mstd0.5-inc1", "random")
    clip = torch.randint(0, 256, (2, 37, 52, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for seed in range(60):
        random.seed(seed)
        whole = policy(clip)
        random.seed(seed)
        assert torch.equal(policy(clip, (5, 9, 20, 31)), whole[..., 5:25, 9:40])
        random.seed(seed)
        assert torch.equal(policy(clip, (34, 0, 3, 4)), whole[..., 34:, :4])


@pytest.mark.parametrize("relative", [[], [0.1, 1.0]])
def test_crops_in_bytes_are_within_a_grey_level_of_those_in_float(relative):
    cfg = get_cfg()
    cfg.DATA.TRAIN_JITTER_SCALES, cfg.DATA.TRAIN_CROP_SIZE = [40, 60], 32
    cfg.DATA.TRAIN_JITTER_SCALES_RELATIVE = relative
    crop = transforms.train_transform(cfg, "train")
    clip = torch.randint(0, 256, (2, 48, 70, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for seed in range(20):
        random.seed(seed), torch.manual_seed(seed)
        out = crop(clip)
        random.seed(seed), torch.manual_seed(seed)
        exact = crop(clip.float())
        assert out.shape == (3, 2, 32, 32) and out.dtype == torch.uint8
        assert (out - exact.round()).abs().max() <= 1


def test_erased_clips_are_normalised_before():
    cfg = get_cfg()
    cfg.DATA.TRAIN_JITTER_SCALES, cfg.DATA.TRAIN_CROP_SIZE = [40, 40], 32
    cfg.AUG.ENABLE, cfg.AUG.AA_TYPE, cfg.AUG.RE_PROB = True, "", 1.0
    clip = torch.full((4, 3, 40, 50), 200, dtype=torch.uint8)
    out = transforms.train_transform(cfg, "train")(clip)
    close = torch.isclose(out, torch.tensor((200 / 255 - 0.45) / 0.225), atol=1e-5)
    noise = out[~close]
    assert 0.6 < close.float().mean() < 0.99
    assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2


def test_frames_may_be_interpolated_each_in_its_own_way():
    frames = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    for name, argument in (("Rotate", 12.0), ("ShearX", 0.2), ("TranslateY", -3.4)):
        out = image_ops.operate(frames, image_ops.Operation(name, argument, [0, True, 1, False]))
        for bicubic, places in ((False, [0, 3]), (True, [1, 2])):
            expected = image_ops.operate(frames, image_ops.Operation(name, argument, bicubic))
            assert np.array_equal(out[places], expected[places])


def test_operations_treat_frames_alike():
    clip = torch.randint(0, 256, (1, 3, 24, 32), dtype=torch.uint8).expand(3, 3, 24, 32)
    policy = rand_augment.RandAugment("rand-m7-n4-mstd0.5-inc1")
    for _ in range(10):
        out = policy(clip)
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_policy_is_parsed_as_timm_writes_it():
    policy = rand_augment.RandAugment("rand-m7-n4-mstd0.5-inc1")
    assert (policy.magnitude, policy.num_ops, policy.deviation) == (7, 4, 0.5)
    assert policy.increasing and not rand_augment.RandAugment("rand-m9").increasing
    for wrong in ("auto-m7", "rand-q3", "rand-m", "rand-m9-inc0"):
        with pytest.raises(ValueError, match=r"AUG\.AA_TYPE"):
            rand_augment.RandAugment(wrong)


def test_erased_boxes_lie_in_the_same_place_in_all_frames():
    clip = torch.ones(3, 4, 32, 32)
    for mode, count in (("pixel", 1), ("rand", 1), ("const", 1)):
        out = rand_augment.RandomErasing(1.0, mode, count)(clip)
        gone = (out != 1).all(0)
        assert torch.equal(gone, gone[:1].expand_as(gone))
        assert 0.01 < gone[0].float().mean() < 0.36
        assert mode == "const" or not torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(rand_augment.RandomErasing(0.0)(clip), clip) and (clip == 1).all()


def test_short_side_is_scaled_and_the_long_side_rounded_down():
    assert transforms.scale_short_side(torch.zeros(2, 3, 50, 77), 32).shape == (2, 3, 32, 49)
    assert transforms.scale_short_side(torch.zeros(2, 3, 77, 50), 32).shape == (2, 3, 49, 32)
