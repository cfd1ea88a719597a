"""Image transformers of transformers, frame by frame: positions and masks follow what is left."""

import pytest
import torch

from stts_slowfast.hooks import attach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import hf_frames


@torch.no_grad()
def test_rotary_positions_of_dinov3_stay_those_of_the_image():
    model, clips, _ = hf_frames("DINOv3ViT", "Model", num_register_tokens=2)
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    found = model(clips.flatten(0, 1)).last_hidden_state
    kept = selections(model)

    layers = model.model.layer
    for layer in layers:
        layer._forward_pre_hooks.clear()
    images = clips.flatten(0, 1)
    x, rotary = model.embeddings(images), model.rope_embeddings(images)
    x = layers[0](x, position_embeddings=rotary).unflatten(0, (2, 8))
    x = layers[1](frames(x, kept["time_1"]).flatten(0, 1), position_embeddings=rotary)
    grid = windows(x[:, 3:].unflatten(1, (4, 4)).unflatten(0, (2, 4)), kept["space_2"])
    x = torch.cat([x[:, :3], grid.flatten(0, 1).flatten(1, 2)], dim=1)
    whole = [part.unflatten(0, (4, 4)).expand(2, 4, -1, -1, -1) for part in rotary]
    rotary = [windows(part, kept["space_2"]).flatten(0, 1).flatten(1, 2)[:, None] for part in whole]
    for layer in layers[2:]:
        x = layer(x, position_embeddings=rotary)
    assert x.shape == (2 * 4, 3 + 9, 24)
    assert torch.equal(model.norm(x), found)
    assert not torch.equal(rotary[0][0], rotary[0][1])  # so that positions matter


@torch.no_grad()
def test_a_mask_of_dinov2_is_cut_to_kept_tokens():
    """A mask of nothing changes nothing; one of a row of patches is the same as if they were 0."""
    model, clips, _ = hf_frames("Dinov2WithRegisters", num_register_tokens=2)
    attach(model, time={1: 0.5}, space={1: 0.6}, fused_attention=False)
    images = clips.flatten(0, 1)
    mask = torch.ones(len(images), 3 + 16, dtype=torch.long)
    plain = model(images).logits
    torch.testing.assert_close(model(images, attention_mask=mask).logits, plain)
    mask[:, -4:] = 0
    hidden = model(images, attention_mask=mask).logits
    assert hidden.isfinite().all() and not torch.allclose(hidden, plain)


@torch.no_grad()
def test_images_of_other_sizes():
    model, _, _ = hf_frames("Dinov2WithRegisters")
    model.num_frames = 2
    images = torch.randn(4, 3, 16, 64)
    plain = model(images).logits
    attach(model, time={0: 1.0}, space={1: 1.0}, fused_attention=False)
    assert torch.equal(model(images).logits, plain)
    assert selections(model)["space_1"].tolist() == [[0, 0, 2, 8]] * 4


@pytest.mark.parametrize(
    ("name", "match"),
    [("Siglip2VisionModel", "SiglipVisionModel, which"), ("Dinov2Backbone", "Dinov2Model")],
)
def test_relatives_that_cannot_be_served_are_refused(name, match):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class(hidden_size=24, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match=match):
        attach(model, time={0: 0.5})


def test_a_model_of_images_and_text_names_its_vision_model():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    small = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = transformers.SiglipConfig(vision_config=small, text_config=small)
    with torch.device("meta"):
        model = transformers.SiglipModel(config)
    with pytest.raises(ValueError, match=r"attach\(model.vision_model, ...\)"):
        attach(model, time={0: 0.5})
