"""Agreement and recall are what they are called."""

import pytest
import torch

from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.study import evaluate


def test_agreement_is_of_pairs_of_views():
    videos = torch.tensor([0, 0, 0, 1, 1, 1])
    predicted = torch.tensor([2, 2, 5, 3, 3, 3])
    assert evaluate.agreement(predicted, videos) == pytest.approx((1 / 3 + 1) / 2, abs=1e-4)
    assert evaluate.agreement(predicted[:2], torch.tensor([0, 1])) is None


def test_boxes_count_in_frames_of_tokens_and_shares_of_the_frame(tiny_cfg):
    # 8 frames at every second of the video, in 4 frames of tokens.
    tiny_cfg.DATA.SAMPLING_RATE, tiny_cfg.DATA.TEST_CROP_SIZE = 2, 32
    truth = make_data.Truth(0, [3, 4, 5], [[8, 0, 16, 16]] * 3)
    box = (0.25, 0.0, 0.5, 0.5)
    assert evaluate.shown_boxes(tiny_cfg, truth) == {0: box, 1: box}
    assert evaluate.share_inside(box, (0, 0, 1, 1)) == 1
    assert evaluate.share_inside(box, (0.5, 0.25, 0.5, 0.5)) == 0.25
    assert evaluate.share_inside(box, (0.75, 0, 0.25, 1)) == 0
    assert evaluate.share_inside(box, (0.875, 0.875, 0.125, 0.125)) == 0


def test_places_are_summed_up(tiny_cfg):
    tiny_cfg.DATA.SAMPLING_RATE, tiny_cfg.DATA.TEST_CROP_SIZE = 2, 32
    places = evaluate.CoverageStats.of(tiny_cfg)  # a grid of 4x8x8
    places.truth = {"a": make_data.Truth(0, [4, 8], [[0, 0, 16, 16]] * 2)}
    places.add(tiny_cfg, {1: (0.0, 0.25, 0.5, 0.5)}, "a")
    places.add(tiny_cfg, {1: (0.5, 0.5, 0.5, 0.5), 2: (0.0, 0.0, 1.0, 1.0)}, "a")
    found = places.summary()
    assert found["frames_kept"] == [0, 1, 0.5, 0]
    assert found["frame_recall"] == 0.75 and found["box_recall"] == (0.5 + 0 + 1) / 4
    tokens = torch.tensor(found["tokens_kept"])
    assert tokens.shape == (8, 8)
    assert tokens[0, 2].item() == pytest.approx(2 / 3, abs=1e-4)
    assert tokens[7, 7].item() == pytest.approx(2 / 3, abs=1e-4)
    assert tokens[0, 7].item() == pytest.approx(1 / 3, abs=1e-4)
