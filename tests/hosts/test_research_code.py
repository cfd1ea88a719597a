"""Blocks of research code: those that depend on token order get positions, or are refused."""

import pytest
import torch
from torch import nn

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import PlainBlock, ResearchViT, RotaryBlock, research


@torch.no_grad()
def test_blocks_with_rotary_positions_get_those_of_kept_tokens():
    model, _, _ = research(RotaryBlock)
    clips = torch.randn(2, 3, 8, 32, 48)
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    found = model(clips)
    kept = selections(model)
    for block in model.blocks:
        block._forward_pre_hooks.clear()
    sizes = {"T": 4, "H_patches": 4, "W_patches": 6}
    x = model.blocks[0](model.patch_embed(clips), **sizes).unflatten(1, (4, 4, 6))
    places = torch.arange(96).view(1, 4, 4, 6, 1).expand(2, -1, -1, -1, -1)
    x, places = (frames(both, kept["time_1"]) for both in (x, places))
    x = model.blocks[1](x.flatten(1, 3), places.flatten(1), **sizes).unflatten(1, (2, 4, 6))
    x, places = (windows(both, kept["space_2"]) for both in (x, places))
    x, places = x.flatten(1, 3), places.flatten(1)
    for block in model.blocks[2:]:
        x = block(x, places, **sizes)
    torch.testing.assert_close(model.head(x.mean(1)), found)


class Numbered(PlainBlock):
    """Adds something that depends on the index of a token."""

    def forward(self, x):
        return super().forward(x + torch.arange(x.shape[1], device=x.device)[:, None])


class Folding(PlainBlock):
    """Takes tokens for a grid of 4x4x4."""

    def forward(self, x):
        return super().forward(x.view(-1, 4, 4, 4, x.shape[2]).flatten(1, 3))


class Cls(ResearchViT):
    def __init__(self, block):
        super().__init__(block)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 24))


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (ResearchViT(Numbered), "Numbered cannot be selected: its blocks depend on the order"),
        (ResearchViT(Folding), "Folding cannot be selected: its blocks do not take 6 tokens"),
        (Cls(PlainBlock), "it has a cls_token"),
    ],
)
def test_unknown_structures_are_refused_by_attach(model, match):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match):
        attach(model, time={0: 0.5})
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_tokens_that_were_masked_before_the_blocks_are_refused():
    model, clips, _ = research(PlainBlock)
    attach(model, time={0: 0.5}, fused_attention=False)
    model.patch_embed.register_forward_hook(lambda embed, args, out: out[:, :50])
    with pytest.raises(ValueError, match="do not make a grid of 4x4x4"):
        model(clips)
