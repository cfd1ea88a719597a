"""Mini-batches are mixed as SlowFast mixes them; the numbers in the fixture are SlowFast's."""

import numpy as np
import pytest
import torch

from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.mixup import batch_mixer


def mixing(num_classes=3, **keys):
    cfg = get_cfg()
    cfg.MODEL.NUM_CLASSES = num_classes
    cfg.MIXUP.ENABLE = True
    cfg.MIXUP.update(keys)
    return batch_mixer(cfg)


def test_nothing_is_mixed_unless_asked():
    assert batch_mixer(get_cfg()) is None


def test_batches_are_slowfasts(golden):
    """Pairs, boxes, shares and labels of four configs, 12 batches each, drawn from one seed."""
    fixture = golden("slowfast_mixup")
    clips, labels = fixture["clips"], fixture["labels"]
    before = clips.clone()
    for name, (alpha, cutmix, prob, switch, smoothing) in fixture.config.items():
        keys = {"ALPHA": alpha, "CUTMIX_ALPHA": cutmix, "PROB": prob, "SWITCH_PROB": switch}
        mix = mixing(4, **keys, LABEL_SMOOTH_VALUE=smoothing)
        np.random.seed(11)
        for mixed, soft in zip(fixture[f"{name}/mixed"], fixture[f"{name}/soft"]):
            found = mix(clips, labels)
            torch.testing.assert_close(found, (mixed, soft), rtol=0, atol=1e-6)
    assert torch.equal(clips, before)  # who watches a run sees the clips that were read


def test_clips_of_one_video_are_mixed_with_another_videos():
    """NUM_SAMPLE clips of a video are neighbours in a batch."""
    videos = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    _, soft = mixing(4, LABEL_SMOOTH_VALUE=0.0)(torch.rand(8, 3, 1, 8, 8), videos)
    assert ((soft > 0).sum(1) == 2).all()


@pytest.mark.parametrize("keys", [{"CUTMIX_ALPHA": 0.0}, {"ALPHA": 0.0}, {}])
def test_soft_labels_follow_the_mixed_pixels(keys):
    mix = mixing(LABEL_SMOOTH_VALUE=0.0, **keys)
    labels = torch.tensor([0, 1, 2])
    clips = labels.view(3, 1, 1, 1, 1).float().expand(3, 3, 2, 16, 16).clone()
    for _ in range(10):
        mixed, soft = mix(clips, labels)
        assert mixed.shape == clips.shape
        torch.testing.assert_close(soft.sum(1), torch.ones(3))
        mean = (soft * torch.arange(3.0)).sum(1)
        torch.testing.assert_close(mixed.mean((1, 2, 3, 4)), mean, atol=1e-5, rtol=0)


def test_labels_are_smoothed_even_without_mixing():
    _, soft = mixing(PROB=0.0)(torch.zeros(2, 3, 2, 8, 8), torch.tensor([2, 0]))
    low, high = 0.1 / 3, 0.9 + 0.1 / 3
    torch.testing.assert_close(soft, torch.tensor([[low, low, high], [high, low, low]]))
