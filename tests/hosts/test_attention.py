"""The layers of transformers select the same whichever way they attend."""

import pytest
import torch

from stts_slowfast import attach, selections
from tests.hosts.examples import videomae, vivit, vjepa2


@pytest.mark.parametrize("make", [videomae, vivit, vjepa2])
@torch.no_grad()
def test_eager_attention_selects_the_same(make):
    model, clips, logits = make()
    attach(model, time={0: 0.5}, space={1: 0.6}, fused_attention=False)
    assert model.config._attn_implementation == "sdpa"
    sdpa, kept = logits(model, clips), selections(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, clips), sdpa, atol=1e-5, rtol=0)
    assert all(torch.equal(kept[key], value) for key, value in selections(model).items())
