"""TimeSformer of transformers: layers read the sizes of their grid from a config."""

import copy

import pytest
import torch

from stts_slowfast.hooks import attach, detach, selections
from tests.hosts.byhand import frames, windows
from tests.hosts.examples import timesformer


def smaller(model, num_frames, image_size):
    """The layers of ``model`` as a model for smaller clips has them."""
    config = copy.deepcopy(model.config)
    config.num_frames, config.image_size = num_frames, image_size
    twin = type(model)(config).eval()
    twin.timesformer.encoder.load_state_dict(model.timesformer.encoder.state_dict())
    return twin.timesformer.encoder.layer


def pick(x, sizes, choose, kept):
    """Applies a choice to tokens in the order (h, w, t) after their cls token."""
    grid = x[:, 1:].unflatten(1, (*sizes[1:], sizes[0])).permute(0, 3, 1, 2, 4)
    grid = choose(grid, kept).permute(0, 2, 3, 1, 4)
    return torch.cat([x[:, :1], grid.flatten(1, 3)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["divided_space_time", "joint_space_time"])
def test_each_layer_computes_as_in_a_model_of_its_sizes(attention):
    model, clips, _ = timesformer(attention)
    attach(model, time={1: 0.5}, space={2: 0.6}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)

    body = model.timesformer
    x = smaller(model, 8, 32)[0](body.embeddings(clips))[0]
    x = smaller(model, 4, 32)[1](pick(x, (8, 4, 4), frames, kept["time_1"]))[0]
    last = smaller(model, 4, 24)
    x = last[2](pick(x, (4, 4, 4), windows, kept["space_2"]))[0]
    x = body.layernorm(last[3](x)[0])
    assert x.shape == (2, 1 + 4 * 3 * 3, 24)
    assert torch.equal(model.classifier(x[:, 0]), logits)


@torch.no_grad()
def test_frame_by_frame_the_cls_tokens_are_selected_with_their_frames():
    model, clips, _ = timesformer("space_only")
    attach(model, time={1: 0.5}, fused_attention=False)
    logits = model(clips).logits
    kept = selections(model)["time_1"]

    body, layers = model.timesformer, smaller(model, 8, 32)
    x = layers[0](body.embeddings(clips))[0]
    x = frames(x.unflatten(0, (2, 8)), kept).flatten(0, 1)
    for layer in layers[1:]:
        x = layer(x)[0]
    assert logits.shape == (2 * 4, 5)
    assert torch.equal(model.classifier(body.layernorm(x)[:, 0]), logits)


@torch.no_grad()
def test_the_shared_config_stays_as_it_is(tmp_path):
    model, clips, logits = timesformer()
    twin = type(model)(model.config).eval()
    assert twin.config is model.config
    before, plain = model.config.to_dict(), logits(twin, clips)
    attach(model, time={0: 0.5}, space={1: 0.6}, fused_attention=False)
    logits(model, clips)
    assert model.config.to_dict() == before and model.timesformer.encoder.config is model.config
    assert torch.equal(logits(twin, clips), plain)
    assert model.timesformer.encoder.layer[1].config.patch_size == 8
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = model.timesformer.encoder.layer[1].config.nothing_such
    detach(model)
    assert all(layer.config is model.config for layer in model.timesformer.encoder.layer)


def test_an_attach_that_fails_leaves_the_layers_their_config(monkeypatch):
    model, _, _ = timesformer()

    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("stts_slowfast.hooks.fused.fuse_model", fail)
    with pytest.raises(RuntimeError):
        attach(model, time={0: 0.5})
    assert all(layer.config is model.config for layer in model.timesformer.encoder.layer)
