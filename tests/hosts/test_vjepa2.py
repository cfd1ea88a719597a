"""V-JEPA 2 of transformers: rotary positions follow the tokens that are left."""

import pytest
import torch

from stts_slowfast.hooks import attach, detach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import vjepa2


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 4, 12])
def test_every_layer_gets_the_positions_in_the_clip(length):
    model, _, _ = vjepa2()
    clips = torch.randn(2, length, 3, 32, 32)
    attach(model, time={1: 0.5}, space={1: 0.6, 2: 0.5}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)

    encoder, half = model.vjepa2.encoder, length // 4
    layers = encoder.layer
    for layer in layers:
        layer._forward_pre_hooks.clear()
    x = layers[0](encoder.embeddings(clips))[0]
    places = torch.arange(half * 2 * 16).view(1, half * 2, 4, 4, 1).expand(2, -1, -1, -1, -1)
    for block, sizes in ((1, (half * 2, 4, 4)), (2, (half, 3, 3)), (3, None)):
        if sizes is not None:
            grid = x.unflatten(1, sizes)
            if block == 1:
                grid, places = (frames(both, kept["time_1"]) for both in (grid, places))
            grid, places = (windows(both, kept[f"space_{block}"]) for both in (grid, places))
            x = grid.flatten(1, 3)
        x = layers[block](x, places.flatten(1))[0]
    x = model.pooler(encoder.layernorm(x))
    assert torch.equal(model.classifier(x), logits)
    assert not torch.equal(places[0], places[1])  # so that positions matter


@torch.no_grad()
def test_the_model_without_a_head_is_an_encoder():
    whole, clips, _ = vjepa2()
    model = whole.vjepa2
    plain, stock = model(clips, skip_predictor=True).last_hidden_state, model(clips)
    attach(model, time={0: 1.0}, space={1: 1.0}, fused_attention=False)
    assert torch.equal(model(clips, skip_predictor=True).last_hidden_state, plain)
    detach(model)
    attach(model, time={0: 0.5}, fused_attention=False)
    assert model.get_vision_features(clips).shape == (2, 2 * 16, 24)
    assert torch.equal(
        whole(clips).logits, whole.classifier(whole.pooler(model.get_vision_features(clips)))
    )
    with pytest.raises(ValueError, match="call the model with skip_predictor=True"):
        model(clips)
    detach(model)
    again = model(clips).predictor_output.last_hidden_state
    assert torch.equal(again, stock.predictor_output.last_hidden_state)
