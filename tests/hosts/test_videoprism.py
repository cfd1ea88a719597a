"""VideoPrism of transformers: layers over time get the frames that are left, at their times."""

import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import videoprism


@torch.no_grad()
def test_frames_keep_their_positions_in_time():
    model, clips, _ = videoprism()
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    found = model(clips).logits
    kept = selections(model)
    tower = model.vision_model
    for layer in tower.spatial_layers:
        layer._forward_pre_hooks.clear()

    x = tower.spatial_layers[0](tower.spatial_embeddings(clips)).unflatten(0, (2, 8))
    x = tower.spatial_layers[1](frames(x, kept["time_1"]).flatten(0, 1))
    x = windows(x.unflatten(1, (4, 4)).unflatten(0, (2, 4)), kept["space_2"])
    x = x.flatten(0, 1).flatten(1, 2)
    for layer in tower.spatial_layers[2:]:
        x = layer(x)
    x = tower.layernorm1(x).unflatten(0, (2, 4)).transpose(1, 2)  # (B, N, T, C)
    times = tower.temporal_embeddings.position_embeddings[0][kept["time_1"]]
    x = (x + times[:, None]).flatten(0, 1)
    x = tower.layernorm2(tower.temporal_layers[0](x)).unflatten(0, (2, -1))
    x = model.head_layernorm(model.head(x.transpose(1, 2).flatten(1, 2))[0])
    torch.testing.assert_close(model.classifier(x).squeeze(1), found.squeeze(1))
    assert not torch.equal(kept["time_1"], torch.arange(4).expand(2, -1))
