"""torchvision's Video Swin: a grid comes and a grid goes."""

import pytest
import torch
from torch import nn

from stts_slowfast.hosts.video_swin import SwinHost

HOST = SwinHost(nn.Module())


def test_a_grid_stays_a_grid():
    grid = torch.randn(2, 4, 3, 2, 5)
    tokens = HOST.unpack((grid,), {}, HOST.incoming_grid((grid,), {}, None))
    assert tokens.thw == (4, 3, 2) and tokens.cls is None and tokens.frame_cls is None
    (x,), kwargs = HOST.pack(tokens._replace(grid=grid[:, ::2]), (grid,), {})
    assert torch.equal(x, grid[:, ::2]) and kwargs == {}


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\): give \(B, T, H, W, C\)"):
        HOST.incoming_grid((torch.randn(2, 3, 4),), {}, None)
