"""torchvision's Video Swin: a grid comes and a grid goes."""

import pytest
import torch
from torch import nn

from stts_slowfast.hosts.video_swin import SwinHost

HOST = SwinHost(nn.Module())


def test_a_grid_stays_a_grid():
    grid = torch.randn(2, 4, 3, 2, 5)
    tokens = HOST.read((grid,), {}, HOST.incoming_grid((grid,), {}, None))
    assert tokens.thw == (4, 3, 2) and tokens.clip is None and tokens.frames is None
    (x,), kwargs = HOST.write(tokens._replace(grid=grid[:, ::2]), (grid,), {})
    assert torch.equal(x, grid[:, ::2]) and kwargs == {}


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"must be \(B, T, H, W, C\), not \(2, 3, 4\)"):
        HOST.incoming_grid((torch.randn(2, 3, 4),), {}, None)
