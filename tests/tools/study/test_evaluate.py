"""Agreement of views is what it is called."""

import pytest
import torch

from stts_slowfast.tools.study import evaluate


def test_agreement_is_of_pairs_of_views():
    videos = torch.tensor([0, 0, 0, 1, 1, 1])
    predicted = torch.tensor([2, 2, 5, 3, 3, 3])
    assert evaluate.agreement(predicted, videos) == pytest.approx((1 / 3 + 1) / 2, abs=1e-4)
    assert evaluate.agreement(predicted[:2], torch.tensor([0, 1])) is None
