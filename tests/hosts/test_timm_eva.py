"""timm's Eva, frame by frame: rotary positions stay those of the image."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import timm_eva

KINDS = {
    "eva02": {"rope_type": "cat", "attn_type": "eva", "rope_rotate_half": False},
    "pe": {"rope_type": "cat", "rope_grid_indexing": "xy", "global_pool": "map"},
    "dinov3": {"rope_type": "dinov3", "num_reg_tokens": 2},
    "mixed": {"rope_type": "mixed", "rope_rotate_half": False},
    "without": {"use_rot_pos_emb": False, "attn_type": "eva"},
}


@pytest.fixture(params=KINDS)
def example(request):
    return timm_eva(**KINDS[request.param])


@torch.no_grad()
def test_keeping_all_changes_no_bit(example):
    model, clips, logits = example
    plain = logits(model, clips)
    attach(model, time={0: 1.0, 2: 1.0}, space={1: 1.0}, fused_attention=False)
    torch.testing.assert_close(logits(model, clips), plain, rtol=0, atol=0)


@torch.no_grad()
def test_each_block_gets_the_positions_of_kept_tokens(example):
    model, clips, _ = example
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    found = model.forward_features(clips.flatten(0, 1))
    kept = selections(model)

    for block in model.blocks:
        block._forward_pre_hooks.clear()
    x, rope = model._pos_embed(model.patch_embed(clips.flatten(0, 1)))
    x, count = model.norm_pre(x), model.num_prefix_tokens
    of = (lambda i: rope[i]) if model.rope_mixed else (lambda i: rope)
    x = model.blocks[0](x, rope=of(0)).unflatten(0, (2, 8))
    x = model.blocks[1](frames(x, kept["time_1"]).flatten(0, 1), rope=of(1))
    grid = windows(x[:, count:].unflatten(1, (4, 4)).unflatten(0, (2, 4)), kept["space_2"])
    x = torch.cat([x[:, :count], grid.flatten(0, 1).flatten(1, 2)], dim=1)
    for i in (2, 3):
        left = of(i)
        if left is not None:
            heads = left if left.dim() == 3 else left[None]
            crops = [
                windows(
                    head.unflatten(0, (4, 4)).expand(2, 4, -1, -1, -1), kept["space_2"]
                ).flatten(0, 1)
                for head in heads
            ]
            left = torch.stack(crops, dim=1).flatten(2, 3)
            assert not torch.equal(left[0], left[1])  # so that positions matter
        x = model.blocks[i](x, rope=left)
    assert x.shape == (2 * 4, count + 9, 32)
    assert torch.equal(model.norm(x), found)


@torch.no_grad()
def test_maps_have_the_sizes_of_kept_tokens():
    model, clips, _ = timm_eva(rope_type="dinov3")
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    maps = model.forward_intermediates(clips.flatten(0, 1), [0, 1, 3], intermediates_only=True)
    assert [tuple(each.shape) for each in maps] == [(16, 32, 4, 4), (8, 32, 4, 4), (8, 32, 3, 3)]
    by_position = model.forward_intermediates(
        clips.flatten(0, 1), [0, 1, 3], False, False, False, "NCHW", True, None, False
    )
    assert all(torch.equal(*pair) for pair in zip(maps, by_position))
