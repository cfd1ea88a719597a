"""Vision towers of Qwen: clips of any sizes in one sequence, one cell for each merged token."""

import copy
from importlib import import_module

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast.annealing import set_progress
from stts_slowfast.hooks import attach, detach, selections
from tests.hosts.byhand import frames, windows

TOKENS = {"tokens": {1: 0.7, 2: 0.6}, "tokens_rest": "merge"}
CLIPS = [(4, 8, 8), (2, 4, 12)]  # in patches; 2x2 of them make a token
COMMON = {"depth": 4, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2}
WIDTHS = {"hidden_size": 24, "intermediate_size": 48, "out_hidden_size": 16}
KINDS = {
    "qwen3_vl": ("Qwen3VLVision", {"deepstack_visual_indexes": [0, 2]} | WIDTHS),
    "qwen3_5": ("Qwen3_5Vision", WIDTHS),
    "qwen2_vl": ("Qwen2VLVision", {"embed_dim": 24, "hidden_size": 16, "mlp_ratio": 2}),
}


def tower(kind="qwen3_vl", **more):
    pytest.importorskip("transformers", reason="transformers is not installed")
    name, sizes = KINDS[kind]
    library = f"transformers.models.{kind}"
    if kind != "qwen2_vl":
        sizes = {"num_position_embeddings": 16, **sizes}
    config = getattr(import_module(f"{library}.configuration_{kind}"), f"{name}Config")
    names = {"qwen2_vl": "Qwen2VisionTransformerPretrainedModel"}
    made = getattr(import_module(f"{library}.modeling_{kind}"), names.get(kind, f"{name}Model"))
    torch.manual_seed(0)
    model = made(config(**COMMON | sizes | more)).eval()
    for parameter in model.parameters():  # so that the blocks change something
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def packed(clips=CLIPS):
    sizes = torch.tensor(clips)
    draw = torch.Generator().manual_seed(1)
    return torch.randn(int(sizes.prod(1).sum()), 3 * 2 * 4 * 4, generator=draw), sizes


def run(model, clips=None):
    patches, sizes = clips or packed()
    out = model(patches, grid_thw=sizes)
    return [out.last_hidden_state, out.pooler_output, *getattr(out, "deepstack_features", [])]


@pytest.fixture(params=KINDS)
def model(request):
    return tower(request.param)


@torch.no_grad()
def test_keeping_all_changes_no_bit_and_detaching_gives_the_model_back(model):
    plain = run(model)
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    attach(model, time={0: 1.0, 2: 1.0}, space={1: 1.0}, tokens={2: 1.0})
    assert all(torch.equal(*pair) for pair in zip(run(model), plain))
    detach(model)
    attach(model, time={0: 0.5}, space={1: 0.5})
    assert run(model)[1].shape == (2 * 4 + 4, 16)
    detach(model)
    assert all(torch.equal(*pair) for pair in zip(run(model), plain))
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


@pytest.mark.parametrize("second", [{"space": {2: 0.6}}, TOKENS])
@torch.no_grad()
def test_a_clip_in_a_pack_is_computed_as_alone(model, second):
    attach(model, time={0: 0.5}, **second)
    patches, sizes = packed()
    both = run(model)
    places, kept = stts.positions(model), selections(model)
    start = 0
    for i, (part, size) in enumerate(zip(patches.split(sizes.prod(1).tolist()), sizes)):
        alone = run(model, (part, size[None]))
        assert torch.equal(stts.positions(model)[0], places[i])
        assert torch.equal(selections(model)["time_0"][0], kept["time_0"][i])
        count = places[i].shape[1]
        torch.testing.assert_close(both[1][start : start + count], alone[1])
        for of_both, of_one in zip(both[2:], alone[2:]):
            torch.testing.assert_close(of_both[start : start + count], of_one)
        start += count
    assert start == len(both[1]) == both[0].shape[0] // 4


@torch.no_grad()
def test_blocks_get_the_rotary_positions_and_the_frames_of_kept_tokens(model):
    """Against blocks that are called by hand with what was kept of one clip."""
    patches, sizes = packed([(8, 8, 12)])
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True
    )
    model(patches, grid_thw=sizes)
    handle.remove()
    (x, kwargs), (cos, sin) = seen[0], seen[0][1]["position_embeddings"]
    attach(model, time={1: 0.5}, space={2: 0.5})
    for parameter in model.stts.parameters():
        parameter.normal_()
    found = model(patches, grid_thw=sizes).last_hidden_state
    kept = selections(model)
    for block in model.blocks:
        block._forward_pre_hooks.clear()

    cells = [part.reshape(1, 8, 4, 6, -1) for part in (model.blocks[0](x, **kwargs), cos, sin)]
    cells = [frames(part, kept["time_1"][0]) for part in cells]

    def call(block, cells, length):
        count = cells[0].shape[1] * length
        x, *rotary = (part.reshape(count, -1) for part in cells)
        ends = torch.arange(0, count + 1, length, dtype=torch.int32)
        x = block(x, **{**kwargs, "cu_seqlens": ends, "position_embeddings": tuple(rotary)})
        return [x.reshape(cells[0].shape), *cells[1:]]

    cells = call(model.blocks[1], cells, 4 * 6 * 4)
    cells = [windows(part, kept["space_2"][0]) for part in cells]
    length = cells[0].shape[2] * cells[0].shape[3] * 4
    for block in model.blocks[2:]:
        cells = call(block, cells, length)
    torch.testing.assert_close(cells[0].reshape(found.shape), found)
    # So that positions matter:
    assert any(not torch.equal(cells[1][0, 0], frame) for frame in cells[1][0])


@pytest.mark.parametrize("tokens", [False, True])
def test_gradients_reach_scorers_also_with_checkpointing(tokens):
    model = tower()
    second = TOKENS if tokens else {"space": {1: 0.5}}
    attach(model, time={0: 0.5}, **second, num_samples=20).train()
    if tokens:
        set_progress(model, 0.0)  # all tokens pass

    def gradients():
        torch.manual_seed(0)
        model.zero_grad()
        sum(part.square().mean() for part in run(model)).backward()
        return {name: p.grad.clone() for name, p in model.stts.named_parameters()}

    plain = gradients()
    assert all(g.isfinite().all() and (g.abs().sum() > 0 or g.numel() == 1) for g in plain.values())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients().items())


@torch.no_grad()
def test_compiles_and_copies():
    """With breaks at sizes that are read from tensors, as the original has them too."""
    model = tower(depth=1, deepstack_visual_indexes=[0])
    attach(model, time={0: 0.5}, space={0: 0.5}, tokens={0: 0.5}, tokens_rest="merge")
    plain = run(model)
    twin = copy.deepcopy(model)
    assert all(torch.equal(*pair) for pair in zip(run(twin), plain))
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="eager")
    for found, expected in zip(run(compiled), plain):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_features_are_put_back_on_the_grid_of_each_clip():
    model = tower()
    attach(model, time={0: 0.5}, space={1: 0.5})
    tokens = run(model)[1]
    dense = stts.scatter(tokens, model, fill=7.0)
    assert [tuple(each.shape) for each in dense] == [(1, 4, 4, 4, 16), (1, 2, 2, 6, 16)]
    left = torch.cat([each.flatten(0, 3) for each in dense])
    assert torch.equal(left[(left != 7.0).any(1)], tokens)
    with pytest.raises(ValueError, match="do not fit 12 tokens of 2 packed clips"):
        stts.scatter(tokens[1:], model)


def test_the_tower_of_qwen2_5_is_refused():
    pytest.importorskip("transformers", reason="transformers is not installed")
    library = import_module("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    kind = library.Qwen2_5_VisionTransformerPretrainedModel
    with torch.device("meta"):
        model = kind(kind.config_class(depth=1, hidden_size=24, num_heads=2))
    with pytest.raises(ValueError, match="windows of whole frames"):
        attach(model, time={0: 0.5})
