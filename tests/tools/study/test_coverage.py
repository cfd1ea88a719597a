"""Recalls count what shows the class, shares what is kept."""

import pytest
import torch

from stts_slowfast.tools.demo import make_data
from stts_slowfast.tools.study import coverage
from stts_slowfast.visualization import KeptRegions


def test_boxes_count_in_frames_of_tokens_and_shares_of_the_frame(tiny_cfg):
    # 8 frames at every second of the video, in 4 frames of tokens.
    tiny_cfg.DATA.SAMPLING_RATE, tiny_cfg.DATA.TEST_CROP_SIZE = 2, 32
    truth = make_data.Truth(0, [3, 4, 5], [[8, 0, 16, 16]] * 3)
    box = (0.25, 0.0, 0.5, 0.5)
    assert coverage.true_boxes(tiny_cfg, truth) == {0: box, 1: box}
    assert coverage.share_inside(box, (0, 0, 1, 1)) == 1
    assert coverage.share_inside(box, (0.5, 0.25, 0.5, 0.5)) == 0.25
    assert coverage.share_inside(box, (0.75, 0, 0.25, 1)) == 0
    assert coverage.share_inside(box, (0.875, 0.875, 0.125, 0.125)) == 0


def test_kept_positions_are_summed_up(tiny_cfg):
    tiny_cfg.DATA.SAMPLING_RATE, tiny_cfg.DATA.TEST_CROP_SIZE = 2, 32
    stats = coverage.CoverageStats(tiny_cfg, [])  # a grid of 4x8x8
    stats.truth = {"a": make_data.Truth(0, [4, 8], [[0, 0, 16, 16]] * 2)}
    stats.add(KeptRegions({1: (0.0, 0.25, 0.5, 0.5)}), "a")
    stats.add(KeptRegions({1: (0.5, 0.5, 0.5, 0.5), 2: (0.0, 0.0, 1.0, 1.0)}), "a")
    found = stats.summary()
    assert found["frames_kept"] == [0, 1, 0.5, 0]
    assert found["frame_recall"] == 0.75 and found["box_recall"] == (0.5 + 0 + 1) / 4
    tokens = torch.tensor(found["tokens_kept"])
    assert tokens.shape == (8, 8)
    assert tokens[0, 2].item() == pytest.approx(2 / 3, abs=1e-4)
    assert tokens[7, 7].item() == pytest.approx(2 / 3, abs=1e-4)
    assert tokens[0, 7].item() == pytest.approx(1 / 3, abs=1e-4)
