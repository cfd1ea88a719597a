"""Masks that a model makes once for all of its blocks follow the tokens that are left."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from stts_slowfast.hosts import masks
from tests.hosts.examples import timm_frames, vivit

SELECTION = {"time": {1: 0.5}, "space": {2: 0.6}, "fused_attention": False}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padding_mask_of_vivit_hides_the_same_tokens_after_a_selection(attention):
    """What is hidden may hold anything, wherever it goes."""
    model, clips, _ = vivit()
    model.set_attn_implementation(attention)
    mask = torch.ones(2, 1 + 64, dtype=torch.long)
    mask[0, 1 + 16 : 1 + 24] = 0  # half of the second frame
    mask[1, 1:17] = 0  # the first frame
    attach(model, **{**SELECTION, "time": {1: 0.75}}, time_scorer="uniform", space_scorer="uniform")
    plain = model(clips, attention_mask=mask).logits
    assert not torch.equal(plain, model(clips).logits)
    other = clips.clone()
    other[0, 2:4, :, :16] = 0.3
    other[1, :2] = -1.0
    assert selections(model)["time_1"].tolist() == [[0, 2, 3]] * 2
    changed = model(other, attention_mask=mask).logits
    torch.testing.assert_close(changed, plain)


@torch.no_grad()
def test_keeping_all_under_a_mask_changes_no_bit():
    model, clips, _ = vivit()
    mask = torch.ones(2, 1 + 64, dtype=torch.long)
    mask[0, 20:] = 0
    plain = model(clips, attention_mask=mask).logits
    attach(model, time={0: 1.0}, space={2: 1.0}, fused_attention=False)
    assert torch.equal(model(clips, attention_mask=mask).logits, plain)


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_vivit_is_exported_whose_export_makes_a_mask(strict):
    model, clips, _ = vivit()
    attach(model, **SELECTION)
    program = torch.export.export(model, (clips,), strict=strict).module()
    torch.testing.assert_close(program(clips.flip(0)).logits, model(clips.flip(0)).logits)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(17, 17), (16, 1, 17, 17), (16, 2, 17, 17), (16, 1, 1, 17)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_mask_of_timm_hides_the_same_tokens_after_a_selection(shape, fused):
    model, clips, _ = timm_frames()
    for block in model.blocks:
        block.attn.fused_attn = fused
    attach(model, **{**SELECTION, "space": {}}, time_scorer="uniform")
    images = clips.flatten(0, 1)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[..., 5:9] = False  # keys of the second row of patches
    plain = model(images, attn_mask=mask)
    other = images.clone()
    other[:, :, 8:16] = 0.3
    torch.testing.assert_close(model(other, attn_mask=mask), plain)
    assert not torch.allclose(model(other), model(images))


@torch.no_grad()
def test_a_mask_of_each_frame_is_selected_with_its_frame():
    model, clips, _ = timm_frames()
    attach(model, **SELECTION)
    images = clips.flatten(0, 1)
    mask = torch.rand(16, 1, 17, 17) > 0.3
    mask |= torch.eye(17, dtype=torch.bool)
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(
            lambda block, args, kwargs: seen.append(kwargs["attn_mask"]), with_kwargs=True
        )
    model(images, attn_mask=mask)
    kept = selections(model)
    whole = mask.unflatten(0, (2, 8))
    expected = torch.stack([m[k] for m, k in zip(whole, kept["time_1"])]).flatten(0, 1)
    assert torch.equal(seen[1], expected)
    for entry, (top, left, height, width) in enumerate(kept["space_2"].tolist()):
        rows = [1 + 4 * row + column for row in range(top, top + height)
                for column in range(left, left + width)]  # fmt: skip
        rows = torch.tensor([0, *rows])
        assert torch.equal(seen[3][entry, 0], expected[entry, 0][rows][:, rows])


def test_a_block_mask_of_flex_attention_is_cut_alike():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    hidden = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)) > 0.4
    whole = flex.create_block_mask(
        lambda b, h, q, k: hidden[b, k] | (q == k), 2, None, 20, 20, device="cpu"
    )
    entries, places = torch.tensor([0, 0, 1]), torch.tensor([[0, 3, 4], [0, 7, 19], [1, 2, 5]])
    cut = masks.cut(whole, entries, places)
    found = flex.create_mask(cut.mask_mod, 3, 1, 3, 3, device="cpu")[:, 0]
    expected = hidden[entries[:, None], places][:, None] | torch.eye(3, dtype=torch.bool)
    assert cut.shape == (3, 1, 3, 3) and torch.equal(found, expected)
