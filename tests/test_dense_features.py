"""Where tokens that come out are from, and features back on the grid of the clip."""

import pytest
import torch
import torch.fx

import stts_slowfast as stts
from stts_slowfast.grid import Grid
from stts_slowfast.hooks import attach
from stts_slowfast.hosts import find_blocks, resolve_host
from tests.hosts.examples import EXAMPLES, timesformer, timm_frames, timm_tubelets
from tests.test_fx_tracing import mvit_v2, swin

SELECTION = {"time": {0: 0.5, 2: 0.5}, "space": {1: 0.6}, "fused_attention": False}


@pytest.fixture(params=EXAMPLES)
def example(request):
    return EXAMPLES[request.param]()


def last_tokens(model, run):
    """What the model's last block gives, laid out as the host lays it out."""
    seen = []
    block = find_blocks(model)[-1]
    handle = block.register_forward_hook(lambda block, args, out: seen.append(out))
    run()
    handle.remove()
    return seen[0][0] if isinstance(seen[0], (tuple, list)) else seen[0]


def marked(model, run):
    """What enters the first block, and what its last one gives."""
    seen = []
    handle = find_blocks(model)[0].register_forward_pre_hook(
        lambda block, args: seen.append(args[0]), prepend=True
    )
    out = last_tokens(model, run)
    handle.remove()
    return seen[0], out


@torch.no_grad()
def test_features_of_all_tokens_are_put_at_their_positions(example, monkeypatch):
    """Blocks that pass tokens on as they are: what comes out is a part of what went in."""
    model, clips, logits = example
    if model.__class__.__name__ == "MultiscaleVisionTransformers":
        pytest.skip("its blocks pool")
    attach(model, **SELECTION)
    for block in find_blocks(model):
        alone = type(block).__name__ not in ("VJEPA2Layer", "TimesformerLayer")
        monkeypatch.setattr(
            block, "forward", lambda x, *args, alone=alone, **kwargs: x if alone else (x,)
        )
    entered, out = marked(model, lambda: logits(model, clips))
    host, _ = resolve_host(model)
    places = stts.positions(model)
    dense = stts.scatter(out, model, fill=7.0)
    whole = host.unpack((entered,), {}, Grid(dense.shape[1:4])).grid
    assert dense.shape == whole.shape
    flat, expected = dense.flatten(1, 3), whole.flatten(1, 3)
    left = torch.zeros(flat.shape[:2], dtype=torch.bool).scatter(1, places, True)
    assert places.shape[1] == left[0].sum() < flat.shape[1]
    assert torch.equal(flat[left], expected[left]) and (flat[~left] == 7.0).all()


@torch.no_grad()
def test_features_without_cls_tokens_and_of_other_width():
    model, clips, logits = timm_frames(reg_tokens=1)
    attach(model, **SELECTION)
    out = last_tokens(model, lambda: logits(model, clips))
    dense = stts.scatter(out, model)
    assert torch.equal(stts.scatter(out[:, 2:], model), dense)
    assert stts.scatter(out[..., :3], model).shape == (2, 8, 4, 4, 3)
    places = stts.positions(model)
    features = out[:, 2:].unflatten(0, (2, -1)).flatten(1, 2)
    assert torch.equal(stts.scatter(features, places, sizes=(8, 4, 4)), dense)
    with pytest.raises(ValueError, match=r"needs sizes=\(T, H, W\)"):
        stts.scatter(features, places)
    with pytest.raises(ValueError, match="do not fit positions"):
        stts.scatter(out, places, sizes=(8, 4, 4))


@torch.no_grad()
@pytest.mark.parametrize("name", ["pytorchvideo", "swin"])
def test_hierarchical_models_count_in_the_grid_that_comes_out(name):
    model, clips, _ = swin() if name == "swin" else EXAMPLES[name]()
    attach(model, time={0: 0.5}, space={1: 0.6})
    out = last_tokens(model, lambda: model(clips))
    places = stts.positions(model)
    assert stts.scatter(out, model).shape[1:4] == (4, 4, 4)
    assert places.shape[1] < 64 and places.max() < 64
    frames = stts.selections(model)["time_0"]
    assert torch.equal(places[:, :: places.shape[1] // frames.shape[1]] // 16, frames)


@torch.no_grad()
@pytest.mark.parametrize("make", [swin, mvit_v2])
@pytest.mark.parametrize("traced", [False, True])
def test_pooling_by_an_unknown_ratio_is_refused(make, traced):
    """Of a window of one token, one token is left: by how much the grid was pooled is not seen."""
    model, clips, _ = make()
    attach(model, space={0: 0.02}, fused_attention=False)
    (torch.fx.symbolic_trace(model) if traced else model)(clips)
    with pytest.raises(ValueError, match="keep windows of two tokens or more"):
        stts.positions(model)


def test_gradients_pass_and_checkpointing_changes_nothing():
    model, clips, logits = timm_frames()
    attach(model, **SELECTION).train()
    model.set_grad_checkpointing()
    out = last_tokens(model, lambda: logits(model, clips))
    places = stts.positions(model)
    stts.scatter(out, model).sum().backward()
    assert torch.equal(stts.positions(model), places)
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


def test_replicas_of_data_parallel_have_no_positions(monkeypatch):
    made = timm_frames()
    made.logits(attach(made.model, **SELECTION), made.clips)
    parallel = torch.nn.DataParallel(made.model)
    monkeypatch.setattr(parallel, "device_ids", [0, 1])
    with pytest.raises(ValueError, match=r"run model\.module instead"):
        stts.positions(parallel)


def test_a_model_that_has_not_run_has_no_positions():
    model = attach(timm_frames().model, **SELECTION)
    with pytest.raises(ValueError, match="run the model first"):
        stts.positions(model)
    with pytest.raises(ValueError, match="has no selectors"):
        stts.positions(timesformer().model)


@torch.no_grad()
@pytest.mark.parametrize("indices", [None, 2, [0, -1]])
def test_maps_of_timm_have_the_sizes_of_kept_tokens(indices):
    model, clips, _ = timm_frames()
    images = clips.flatten(0, 1)
    attach(model, **SELECTION)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out[:, 1:]))
    maps = model.forward_intermediates(images, indices, intermediates_only=True)
    numbers = {None: [0, 1, 2, 3], 2: [2, 3]}.get(indices if indices != [0, -1] else 0, [0, 3])
    sides = [4, 3, 3, 3]
    assert len(maps) == len(numbers)
    for found, number in zip(maps, numbers):
        batch = 8 if number < 2 else 4
        assert found.shape == (batch, 24, sides[number], sides[number])
        assert torch.equal(found.flatten(2).transpose(1, 2), seen[number])
    final, again = model.forward_intermediates(images, indices)
    assert all(torch.equal(a, b) for a, b in zip(again, maps)) and final.shape == (4, 10, 24)
    dictionary = model.forward_intermediates(images, indices, output_dict=True)
    assert dictionary["image_intermediates"][-1].shape == maps[-1].shape
    with_prefix = model.forward_intermediates(
        images, indices, True, False, False, "NCHW", True
    )  # all by position
    assert with_prefix[-1][0].shape == maps[-1].shape and with_prefix[-1][1].shape == (4, 1, 24)
    tokens = model.forward_intermediates(images, indices, output_fmt="NLC", intermediates_only=True)
    assert tokens[-1].shape == (4, 9, 24)
    layers = model.get_intermediate_layers(images, indices or 4, reshape=True)
    assert torch.equal(layers[-1], maps[-1])


@torch.no_grad()
def test_maps_are_the_stock_ones_before_and_after():
    model, clips, _ = timm_frames()
    images = clips.flatten(0, 1)
    plain = model.get_intermediate_layers(images, 2, reshape=True)
    attach(model, time={0: 1.0}, space={1: 1.0}, fused_attention=False)
    kept = model.get_intermediate_layers(images, 2, reshape=True)
    stts.detach(model)
    assert "forward_intermediates" not in vars(model)
    for other in (kept, model.get_intermediate_layers(images, 2, reshape=True)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other))


def test_tubelets_are_left_alone():
    model = attach(timm_tubelets().model, **SELECTION)
    assert "forward_intermediates" not in vars(model)
