"""VideoMAE of transformers: tokens alone, no cls token."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import hugging, videomae


@torch.no_grad()
def test_the_layers_get_what_was_kept():
    model, clips, _ = videomae()
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)

    layers = model.videomae.encoder.layer
    for layer in layers:
        layer._forward_pre_hooks.clear()
    x = layers[0](model.videomae.embeddings(clips, None))
    x = layers[1](frames(x.unflatten(1, (4, 4, 4)), kept["time_1"]).flatten(1, 3))
    x = layers[2](windows(x.unflatten(1, (2, 4, 4)), kept["space_2"]).flatten(1, 3))
    x = layers[3](x)
    assert x.shape == (2, 2 * 3 * 3, 24)
    assert torch.equal(model.classifier(model.fc_norm(x.mean(1))), logits)


def test_masked_clips_are_refused():
    model, clips, _ = videomae("Model")
    attach(model, time={0: 0.5}, fused_attention=False)
    mask = torch.zeros(2, 64, dtype=torch.bool)
    mask[:, :20] = True
    with pytest.raises(ValueError, match=r"\(2, 44, 24\) do not make a grid of 4x4x4"):
        model(clips, bool_masked_pos=mask)


def test_pretraining_is_no_host():
    """Its decoder looks for every token of the clip."""
    with pytest.raises(ValueError, match="VideoMAEForPreTraining has no blocks"):
        attach(hugging("VideoMAE", "ForPreTraining", {}, 1).model, time={0: 0.5})


def test_clips_that_are_not_square():
    model, _, logits = hugging(
        "VideoMAE",
        "ForVideoClassification",
        {"num_frames": 4, "image_size": [16, 32], "patch_size": 8, "intermediate_size": 48},
        1,
    )
    attach(model, space={0: 0.5}, fused_attention=False)
    logits(model, torch.randn(1, 4, 3, 16, 32))
    assert selections(model)["space_0"][:, 2:].tolist() == [[1, 2]] * 2
