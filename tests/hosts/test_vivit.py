"""ViViT of transformers: a cls token in front."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import vivit


@torch.no_grad()
def test_the_layers_get_kept_tokens_after_the_cls_token():
    model, clips, _ = vivit()
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)

    layers = model.vivit.layers
    for layer in layers:
        layer._forward_pre_hooks.clear()
    x = layers[0](model.vivit.embeddings(clips))
    grid = frames(x[:, 1:].unflatten(1, (4, 4, 4)), kept["time_1"])
    x = layers[1](torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1))
    grid = windows(x[:, 1:].unflatten(1, (2, 4, 4)), kept["space_2"])
    x = layers[3](layers[2](torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1)))
    assert x.shape == (2, 1 + 2 * 3 * 3, 24)
    assert torch.equal(model.classifier(model.vivit.layernorm(x)[:, 0]), logits)


def test_another_size_is_refused():
    """Positions can be stretched, but the grid is then not the config's."""
    model, _, _ = vivit()
    attach(model, time={0: 0.5}, fused_attention=False)
    tokens = model.vivit.embeddings.position_embeddings[:, :37].expand(2, -1, -1)
    with pytest.raises(ValueError, match=r"\(2, 37, 24\) do not make a grid of 4x4x4 with 1 cls"):
        model.vivit.layers[0](tokens)
