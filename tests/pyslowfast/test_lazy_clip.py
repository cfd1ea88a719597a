"""A clip whose arithmetic waits gives the bits of one whose does not."""

import numpy as np
import pytest
import torch

from stts_slowfast.pyslowfast.lazy_clip import LazyClip

IMAGES = list(np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8))
MEAN, STD = torch.tensor([0.3, 0.4, 0.5]), torch.tensor([0.2, 0.25, 0.3])


def normalised(clip):
    """As SlowFast does it: (T, H, W, 3) uint8 to (3, T, H, W) float32."""
    clip = torch.index_select(clip, 0, torch.tensor([0, 2, 2, 5])).float()
    clip = (clip / 255.0 - MEAN) / STD
    return clip.permute(3, 0, 1, 2)


@pytest.fixture
def whole():
    return normalised(torch.from_numpy(np.stack(IMAGES)))


def test_a_crop_has_the_bits_of_the_whole(whole):
    clip = normalised(LazyClip.create(IMAGES))
    assert type(clip) is LazyClip and clip.shape == whole.shape and clip.dtype == whole.dtype
    square = clip[:, :, 2:9, 3:10]
    assert type(square) is torch.Tensor and torch.equal(square, whole[:, :, 2:9, 3:10])


def test_other_operations_run_on_whole_frames(whole):
    for ask in (lambda c: c * 2, lambda c: c.flip(-1), lambda c: c[1], lambda c: c / c.amax()):
        found = ask(normalised(LazyClip.create(IMAGES)))
        assert type(found) is torch.Tensor and torch.equal(found, ask(whole))


def test_three_numbers_are_those_of_channels_only_if_channels_come_last():
    narrow = [image[:, :3] for image in IMAGES]
    both = LazyClip.create(narrow), torch.from_numpy(np.stack(narrow))
    found, expected = (clip.float().permute(3, 0, 1, 2) / STD for clip in both)
    assert torch.equal(found[:, :], expected)


def test_frames_that_were_not_decoded_are_not_needed(whole):
    images = [image if number in (0, 2, 5) else None for number, image in enumerate(IMAGES)]
    assert torch.equal(normalised(LazyClip.create(images))[:, :, :, :], whole)
