"""A small MViT, and what the tests of its replacements compare."""

import pytest
import torch
from torch import nn
from torchvision.models.video.mvit import MSBlockConfig, MViT


def make_mvit(relative: bool, residual_with_cls: bool = False, dropout: float = 0.0) -> MViT:
    """Three blocks on 4x16x16 tokens that pool keys by 8, 4 and 1, queries by 1, 2 and 2."""
    kernel = [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 8, 16, kernel if relative else [], kernel, [1, 1, 1], [1, 8, 8]),
        MSBlockConfig(2, 16, 16, kernel, kernel, [1, 2, 2], [1, 4, 4]),
        MSBlockConfig(2, 16, 16, kernel, kernel, [1, 2, 2], [1, 1, 1]),
    ]
    if not relative:
        blocks[0].stride_q = []
    model = MViT(
        (64, 64),
        8,
        blocks,
        residual_pool=relative,
        residual_with_cls_embed=residual_with_cls,
        rel_pos_embed=relative,
        proj_after_attn=relative,
        dropout=dropout,
        num_classes=5,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def run(model, clips):
    out = model(clips)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


@pytest.fixture
def mvit():
    """Makes an MViT: ``mvit(relative, residual_with_cls=False, dropout=0.0)``."""
    return make_mvit


@pytest.fixture
def outputs_and_gradients():
    """Runs a model on clips: its output, and the gradients of all parameters by name."""
    return run


@pytest.fixture
def clips():
    return torch.randn(2, 3, 8, 64, 64)
