"""timm's VisionTransformer: frame by frame and with patches of several frames."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import timm_frames, timm_tubelets


@torch.no_grad()
def test_frames_leave_the_batch_with_their_tokens():
    model, clips, _ = timm_frames(reg_tokens=2)
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    logits = model(clips.flatten(0, 1))
    kept = selections(model)

    for block in model.blocks:
        block._forward_pre_hooks.clear()
    x = model.blocks[0](model._pos_embed(model.patch_embed(clips.flatten(0, 1))))
    x = model.blocks[1](frames(x.unflatten(0, (2, 8)), kept["time_1"]).flatten(0, 1))
    grid = windows(x[:, 3:].unflatten(1, (4, 4)).unflatten(0, (2, 4)), kept["space_2"])
    x = torch.cat([x[:, :3], grid.flatten(0, 1).flatten(1, 2)], dim=1)
    x = model.blocks[3](model.blocks[2](x))
    assert x.shape == (2 * 4, 3 + 3 * 3, 24)
    assert torch.equal(model.forward_head(model.norm(x)), logits)


@torch.no_grad()
def test_tubelets_are_a_grid_of_the_clip():
    model, clips, _ = timm_tubelets()
    attach(model, time={1: 0.5}, fused_attention=False)
    logits = model(clips)
    kept = selections(model)["time_1"]

    for block in model.blocks:
        block._forward_pre_hooks.clear()
    x = model.blocks[0](model._pos_embed(model.patch_embed(clips)))
    grid = frames(x[:, 1:].unflatten(1, (4, 4, 4)), kept)
    x = model.blocks[1:](torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1))
    assert torch.equal(model.forward_head(model.norm(x)), logits)


def test_without_num_frames_an_image_is_a_clip():
    model, clips, _ = timm_frames()
    del model.num_frames
    attach(model, space={0: 0.5}, fused_attention=False)
    model(clips.flatten(0, 1))
    assert selections(model)["space_0"].shape == (16, 4)


def test_batches_that_make_no_clips_are_refused():
    model, clips, _ = timm_frames()
    attach(model, time={0: 0.5}, fused_attention=False)
    with pytest.raises(ValueError, match=r"\(15, 17, 24\) do not make a grid of 8x4x4 with 1 cls"):
        model(clips.flatten(0, 1)[:15])


def test_a_patch_embed_without_a_grid_is_refused():
    model, _, _ = timm_frames()
    model.patch_embed.grid_size = None
    with pytest.raises(ValueError, match="give it an img_size"):
        attach(model, time={0: 0.5})


def test_fused_attention_of_timm_selects_the_same():
    model, clips, logits = timm_frames()
    attach(model, time={0: 0.5}, space={1: 0.6}, fused_attention=False)
    with torch.no_grad():
        fused, kept = logits(model, clips), selections(model)
        for block in model.blocks:
            assert block.attn.fused_attn
            block.attn.fused_attn = False
        torch.testing.assert_close(logits(model, clips), fused, atol=1e-5, rtol=0)
    assert all(torch.equal(kept[key], value) for key, value in selections(model).items())
