"""pytorchvideo's MViT: blocks with their grid, as SlowFast's."""

import copy

import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import pytorchvideo


@torch.no_grad()
def test_the_blocks_get_what_was_kept():
    model, clips, _ = pytorchvideo()
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    logits = model(clips)
    kept = selections(model)

    for block in model.blocks:
        block._forward_pre_hooks.clear()
    x, thw = model.blocks[0](model.cls_positional_encoding(model.patch_embed(clips)), [4, 4, 4])
    grid = frames(x[:, 1:].unflatten(1, (4, 4, 4)), kept["time_1"])
    x, thw = model.blocks[1](torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1), [2, 4, 4])
    grid = windows(x[:, 1:].unflatten(1, (2, 4, 4)), kept["space_2"])
    x, thw = model.blocks[2](torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1), [2, 3, 3])
    x, thw = model.blocks[3](x, thw)
    assert torch.equal(model.head(model.norm_embed(x)), logits)


@torch.no_grad()
def test_fused_attention_gives_the_same():
    model, clips, logits = pytorchvideo()
    fused = attach(copy.deepcopy(model), time={1: 0.5}, space={2: 0.6})
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    model.load_state_dict(fused.state_dict())
    assert type(fused.blocks[0].attn) is not type(model.blocks[0].attn)
    assert type(fused.blocks[0]) is not type(model.blocks[0])
    torch.testing.assert_close(logits(fused, clips), logits(model, clips), atol=1e-5, rtol=0)
