import copy
import io
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.video import mvit_v1_b, mvit_v2_s

from stts_slowfast import backbones, hosts
from stts_slowfast.annealing import update_schedule
from stts_slowfast.config import add_stts_config
from stts_slowfast.grid import Grid
from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.standalone.model import build_model


@pytest.fixture
def clips():
    return torch.randn(2, 3, 8, 32, 32)


@pytest.fixture
def plain(tiny_cfg):
    return backbones.build(tiny_cfg).eval()


@pytest.fixture
def model(tiny_cfg, plain):
    return attach(copy.deepcopy(plain), tiny_cfg.STTS, backbones.block_grids(tiny_cfg))


class AnyBlocks(nn.Module):
    """A model that shares nothing with MViT but the signature of its blocks."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.mix = nn.Linear(8, 8)
            self.seen = None

        def forward(self, x, thw):
            self.seen = tuple(x.shape), thw
            return x + self.mix(self.norm(x)), thw

    def __init__(self, cls_tokens):
        super().__init__()
        self.cls_tokens = cls_tokens
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x):
        thw = [4, 5, 5]
        x = torch.cat([torch.full_like(x[:, : self.cls_tokens], 7.0), x], dim=1)
        for block in self.blocks:
            x, thw = block(x, thw)
        return x


@pytest.mark.parametrize("cls_tokens", [0, 1])
@pytest.mark.parametrize("mode", [True, False])
def test_any_model_with_blocks_gets_a_smaller_grid(cls_tokens, mode):
    cfg = CfgNode()
    add_stts_config(cfg)
    cfg.STTS.TIME.KEEP, cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [0.5], [1], [0.4]
    model = attach(AnyBlocks(cls_tokens), cfg.STTS).train(mode)
    out = model(torch.randn(2, 100, 8))
    assert model.blocks[0].seen == ((2, 50 + cls_tokens, 8), (2, 5, 5))
    assert model.blocks[1].seen == ((2, 18 + cls_tokens, 8), (2, 3, 3))
    assert out.shape == (2, 18 + cls_tokens, 8)
    kept = selections(model)
    assert kept["time_0"].shape == (2, 2) and kept["space_1"].shape == (4, 4)


def test_the_cls_token_passes_unchanged():
    cfg = CfgNode()
    add_stts_config(cfg)
    cfg.STTS.SPACE.BLOCKS = []
    model = attach(AnyBlocks(1), cfg.STTS)
    seen = []
    model.blocks[0].register_forward_hook(lambda block, args, out: seen.append(args[0][:, 0]))
    model(torch.randn(2, 100, 8))
    assert torch.equal(seen[0], torch.full((2, 8), 7.0))


@pytest.mark.parametrize("build", [mvit_v1_b, mvit_v2_s])
def test_works_on_torchvisions_models_at_full_size(build):
    """On the meta device: shapes without arithmetic."""
    cfg = CfgNode()
    add_stts_config(cfg)
    with torch.device("meta"):
        model = build(num_classes=5)
    attach(model, cfg.STTS).train()
    assert model(torch.empty(1, 3, 16, 224, 224, device="meta")).shape == (1, 5)
    assert selections(model)["space_4"].shape == (7, 4)


def test_golden_scores_and_indices_of_the_authors(golden, tiny_cfg):
    """See tests/backbones/test_mvit.py for the outputs; here, for selections()."""
    from stts_slowfast.checkpoints import load_weights

    case = golden("official_stts_mvit")
    model = attach(backbones.build(tiny_cfg), tiny_cfg.STTS).eval()
    load_weights(model, case.weights)
    model(case["input"])
    kept = selections(model)
    assert torch.equal(kept["time_0"], case["indices/time_score_predictor.0"])
    windows = case["indices/space_score_predictor.0"][:, 0]
    assert torch.equal(kept["space_2"][:, 0] * 2 + kept["space_2"][:, 1], windows)


def test_detach_restores_the_same_bits(plain, model, clips):
    before = plain(clips)
    assert not torch.equal(model(clips), before)
    assert detach(model) is model
    assert torch.equal(model(clips), before)
    assert set(model.state_dict()) == set(plain.state_dict())


def test_keeping_everything_equals_the_unpatched_model(tiny_cfg, plain, clips):
    tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = [1.0], [1.0]
    tiny_cfg.STTS.FUSED_ATTENTION = False
    model = attach(copy.deepcopy(plain), tiny_cfg.STTS)
    assert torch.equal(model(clips), plain(clips))


def test_keeping_everything_leaves_relative_positions_as_they_are(golden, clips):
    cfg = golden("slowfast_mvit_v2").cfg()
    cfg.STTS.TIME.KEEP, cfg.STTS.FUSED_ATTENTION = [1.0], False
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [1], [1.0]
    model = backbones.build(cfg).eval()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
    expected = model(clips)
    assert torch.equal(attach(model, cfg.STTS)(clips), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_whole_and_independent(model, clips, duplicate):
    twin = duplicate(model)
    assert torch.equal(twin(clips), model(clips))
    kept = selections(model)["time_0"]
    with torch.no_grad():
        for parameter in twin.stts.parameters():
            parameter.neg_()
    twin(clips)
    assert torch.equal(selections(model)["time_0"], kept)
    assert not torch.equal(selections(twin)["time_0"], kept)
    detach(twin)
    model(clips)
    assert list(model.stts) == ["time_0", "space_2"]


def test_state_dict_round_trip(tiny_cfg, model, clips):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = attach(backbones.build(tiny_cfg), tiny_cfg.STTS).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(clips), model(clips))


@pytest.mark.parametrize("mode", [True, False])
def test_compiles_without_graph_breaks(model, clips, mode):
    model.train(mode)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(clips)
    kept = selections(compiled)
    if mode:
        out.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    else:
        torch.testing.assert_close(out, model(clips))
        assert torch.equal(kept["time_0"], selections(model)["time_0"])


def test_a_falling_sigma_does_not_recompile(model, clips):
    compiled = torch.compile(model.train(), fullgraph=True, backend="aot_eager")
    update_schedule(model, 0.0)
    compiled(clips)
    with torch._dynamo.config.patch(error_on_recompile=True):
        update_schedule(model, 0.5)
        compiled(clips)


def test_models_with_other_shares_compile_too():
    """What the compiler saw change from one model to the next it takes for a variable."""
    cfg = CfgNode()
    add_stts_config(cfg)
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.NUM_SAMPLES = [1], 5
    for keep, tokens in ((0.5, 18), (0.75, 27), (0.25, 9)):
        cfg.STTS.TIME.KEEP, cfg.STTS.SPACE.KEEP = [keep], [0.4]
        model = attach(AnyBlocks(0), cfg.STTS)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for mode in (True, False):
            model.train(mode)
            assert compiled(torch.randn(2, 100, 8)).shape == (2, tokens, 8)


def test_ddp_without_unused_parameters(model, clips, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(model.train())
        for _ in range(2):  # the second step raises if a parameter got no gradient
            ddp(clips).sum().backward()
        assert set(selections(ddp)) == {"time_0", "space_2"}
    finally:
        dist.destroy_process_group()


@pytest.fixture
def relative(golden):
    """MViTv2 whose frames and windows are selected twice: attention reads the grid that travels."""
    cfg = golden("slowfast_mvit_v2").cfg()
    # Without strides in time, distances are read at the kept frames of each clip.
    cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE = [1, 4, 4]
    cfg.MVIT.DROPPATH_RATE, cfg.STTS.NUM_SAMPLES = 0.0, 20
    cfg.STTS.TIME.BLOCKS, cfg.STTS.TIME.KEEP = [0, 1], [0.75, 0.7]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [1], [0.7]
    model = backbones.build(cfg)
    for name, parameter in model.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
    attach(model, cfg.STTS, backbones.block_grids(cfg))
    for parameter in model.stts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def seen_grids(model):
    """The grid at every block of the last forward pass."""
    grids = {}
    for number, block in enumerate(hosts.find_blocks(model)):
        block.register_forward_pre_hook(
            lambda block, args, number=number: grids.update({number: args[1]})
        )
    return grids


def test_the_grid_travels_in_the_coordinates_of_the_clip(relative, clips):
    grids = seen_grids(relative)
    relative(clips)
    kept = selections(relative)
    frames = kept["time_0"].gather(1, kept["time_1"])
    windows = kept["space_1"].view(2, 2, 4)
    assert torch.equal(grids[0].frames, kept["time_0"]) and grids[0].windows is None
    for number in range(1, len(relative.blocks)):
        assert torch.equal(grids[number].frames, frames)
        scale = 8 // {1: 8, 2: 4, 3: 4}[number]
        assert torch.equal(grids[number].windows[..., :2], windows[..., :2] // scale)
        assert grids[number].windows[0, 0, 2:].tolist() == list(grids[number][1:])


def test_one_model_in_two_threads(relative):
    """Each thread's attention reads the positions of its own tokens."""
    batches = [torch.randn(2, 3, 8, 32, 32) for _ in range(12)]
    with torch.no_grad():
        expected = [relative(batch) for batch in batches]

        def run(number):
            with torch.no_grad():
                return number, relative(batches[number])

        with ThreadPoolExecutor(4) as pool:
            for number, out in pool.map(run, list(range(12)) * 5):
                torch.testing.assert_close(out, expected[number], rtol=1e-5, atol=1e-5)


def torchs_checkpoint(block, x, thw):
    return checkpoint(block, x, thw, use_reentrant=False)


def reentrant_checkpoint(block, x, thw):
    return checkpoint(block, x, thw, use_reentrant=True)


def fairscales_checkpoint(block, x, thw):
    wrapper = pytest.importorskip("fairscale.nn.checkpoint").checkpoint_wrapper
    if "forward" not in vars(block):
        wrapper(block)
    return block(x, thw)


@pytest.mark.parametrize(
    "through", [torchs_checkpoint, reentrant_checkpoint, fairscales_checkpoint]
)
def test_two_passes_before_one_backward_under_checkpointing(relative, through):
    """Recomputed blocks have the noise and the positions of their own pass, not of the last one."""
    batches = [torch.randn(2, 3, 8, 32, 32) for _ in range(2)]
    grads = []
    for call in (lambda block, x, thw: block(x, thw), through):
        model = copy.deepcopy(relative).train()
        torch.manual_seed(3)
        loss = 0
        for clips in batches:
            x = model.pos_encoding(model.conv_proj(clips).flatten(2).transpose(1, 2))
            thw = (4, 8, 8)
            for block in model.blocks:
                x, thw = call(block, x, thw)
            loss = loss + model.head(model.norm(x)[:, 0]).square().sum()
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def replicate(model):
    """What ``nn.DataParallel`` makes of a model for each device, with parameters of its own."""
    modules = list(model.modules())
    twins = {module: module._replicate_for_data_parallel() for module in modules}
    for module, twin in twins.items():
        for name, child in module._modules.items():
            twin._modules[name] = child and twins[child]
        for name, parameter in module._parameters.items():
            setattr(twin, name, None if parameter is None else parameter.detach().clone())
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.clone()
    return twins[model]


@pytest.mark.parametrize("which", ["model", "relative"])
def test_replicas_of_data_parallel_use_their_own_selectors(which, request, clips):
    """The hooks of a replica are the model's: its selectors are on another device."""
    model = request.getfixturevalue(which)
    expected = model(clips)
    replica = replicate(model)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)  # whoever asks the model's own modules gets NaN
    torch.testing.assert_close(replica(clips), expected)
    assert not hasattr(model.blocks[0], "stts_replicas")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_data_parallel_on_a_gpu(relative, clips):
    expected = relative(clips)
    parallel = nn.DataParallel(relative.cuda(), device_ids=[0, 0])
    out = parallel(clips.cuda()).cpu()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"run model\.module alone"):
        selections(parallel)


@pytest.mark.parametrize("mode", [True, False])
def test_grids_that_travel_compile_without_graph_breaks(relative, clips, mode):
    compiled = torch.compile(relative.train(mode), fullgraph=True, backend="aot_eager")
    out = compiled(clips)
    if mode:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in relative.parameters())
    else:
        torch.testing.assert_close(out, relative(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.filterwarnings("ignore:The tensor attributes .*kept")
def test_grids_that_travel_are_exported(relative, clips, strict):
    program = torch.export.export(relative, (clips,), strict=strict).module()
    other = torch.randn_like(clips)
    torch.testing.assert_close(program(other), relative(other), rtol=1e-4, atol=1e-5)


def test_grids_that_travel_are_traced_for_counting(relative, clips):
    from fvcore.nn import FlopCountAnalysis

    whole = detach(copy.deepcopy(relative))
    counts = [
        FlopCountAnalysis(which, clips).unsupported_ops_warnings(False).total()
        for which in (relative, whole)
    ]
    assert 0 < counts[0] < counts[1]


def test_detach_gives_back_the_stock_modules(relative, clips):
    stock = [type(module) for module in detach(copy.deepcopy(relative)).modules()]
    assert any(kind not in stock for kind in map(type, relative.modules()))  # it was fused
    detached = detach(relative)
    assert not any("stts_slowfast" in type(module).__module__ for module in detached.modules())
    for module in detached.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_with_kwargs
    assert torch.isfinite(detached(clips)).all()


class Layers(nn.Module):
    """Layers called with hidden states alone, as Hugging Face's: the config knows the grid."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.seen = None

        def forward(self, hidden_states, position_mask=None):
            self.seen = tuple(hidden_states.shape), position_mask
            return hidden_states + self.norm(hidden_states)

    def __init__(self):
        super().__init__()
        self.layer = nn.ModuleList(self.Layer() for _ in range(4))
        self.grid = (4, 5, 5)

    def forward(self, x):
        again = self.training and not torch.compiler.is_compiling()
        for layer in self.layer:
            x = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        return x


class LayersHost(hosts.Host):
    def __init__(self, model):
        self.grid = model.grid

    @staticmethod
    def blocks(model):
        return getattr(model, "layer", ())

    def default_grid(self):
        return Grid(self.grid)

    def unpack(self, args, kwargs, thw):
        return hosts.Tokens(args[0].unflatten(1, tuple(thw)), thw)

    def pack(self, tokens, args, kwargs):
        return (tokens.grid.flatten(1, 3),), kwargs

    def adapt_call(self, block, thw, args, kwargs):
        return args, {**kwargs, "position_mask": thw.frames}


@pytest.fixture
def layers_host():
    hosts.HOSTS.register(LayersHost)
    yield
    del hosts.HOSTS._obj_map["LayersHost"]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("compiling", [True, False])
def test_a_grid_travels_in_the_call_of_the_model(layers_host, mode, compiling):
    model = attach(Layers(), time={1: 0.5}, space={2: 0.4}, num_samples=5).train(mode)
    run = torch.compile(model, fullgraph=True, backend="eager") if compiling else model
    out = run(torch.randn(2, 100, 8))
    frames = selections(model)["time_1"]
    shapes, masks = zip(*(layer.seen for layer in model.layer))
    assert shapes == ((2, 100, 8), (2, 50, 8), (2, 18, 8), (2, 18, 8))
    assert masks[0] is None and all(torch.equal(mask, frames) for mask in masks[1:])
    if mode:
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_autocast_runs_in_training_and_evaluation(model, clips):
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            out = model.train(mode)(clips)
        assert torch.isfinite(out).all()


def test_attach_twice_is_refused(model, tiny_cfg):
    with pytest.raises(ValueError, match=r"has selectors already \(time_0, space_2\): call detach"):
        attach(model, tiny_cfg.STTS)


def test_detach_without_selectors_is_refused(plain):
    with pytest.raises(ValueError, match="has no selectors"):
        detach(plain)


def test_selections_before_a_forward_pass_are_refused(model):
    with pytest.raises(ValueError, match="run the model first"):
        selections(model)


def test_a_model_without_blocks_is_refused(tiny_cfg):
    with pytest.raises(ValueError, match="Linear has no blocks to select tokens before"):
        attach(nn.Linear(2, 2), tiny_cfg.STTS)


def test_a_bad_node_leaves_the_model_as_it_was(plain, tiny_cfg):
    tiny_cfg.STTS.TIME.BLOCKS = [9]
    with pytest.raises(ValueError, match="block 9"):
        attach(plain, tiny_cfg.STTS)
    assert not hasattr(plain, "stts") and not any(b._forward_pre_hooks for b in plain.blocks)


def test_a_width_no_scorer_can_have_leaves_the_model_as_it_was(tiny_cfg):
    """Found when the second selector is made: the first must not remain."""
    model = AnyBlocks(0)
    model.blocks[2].norm = nn.LayerNorm(6)
    with pytest.raises(ValueError, match="6 must be a multiple of 4"):
        attach(model, tiny_cfg.STTS)
    assert not hasattr(model, "stts") and not any(b._forward_pre_hooks for b in model.blocks)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("true_distances", [True, False])
def test_attach_is_all_that_a_node_needs(golden, clips, fuse, true_distances):
    """The built model and a stock one with selectors attached compute the same."""
    cfg = golden("slowfast_mvit_v2").cfg()
    cfg.STTS.ENABLE, cfg.STTS.TIME.KEEP = True, [0.5]
    cfg.STTS.SPACE.BLOCKS, cfg.STTS.SPACE.KEEP = [2], [0.6]
    cfg.STTS.FUSED_ATTENTION, cfg.STTS.TRUE_DISTANCES = fuse, true_distances
    built = build_model(cfg).eval()
    attached = attach(backbones.build(cfg), cfg.STTS).eval()
    assert [type(m) for m in built.modules()] == [type(m) for m in attached.modules()]
    nn.init.normal_(built.blocks[2].attn.rel_pos_h)
    attached.load_state_dict(built.state_dict())
    assert torch.equal(attached(clips), built(clips))


def test_plain_arguments_are_the_node(plain, tiny_cfg, clips):
    node = tiny_cfg.STTS
    node.TIME.SCORER, node.SPACE.SHARED, node.SPACE.STRIDE = "uniform", True, 2
    node.SIGMA, node.GRADIENT, node.FUSED_ATTENTION = 0.3, "diagonal", False
    by_node = attach(copy.deepcopy(plain), node)
    by_words = attach(
        plain, time={0: 0.5}, space={2: 0.6}, time_scorer="uniform", space_shared=True,
        space_stride=2, sigma=0.3, gradient="diagonal", fused_attention=False, num_samples=50,
        backbone_lr=0.1, shrink=0.0,
    )  # fmt: skip
    assert by_words.stts.settings == by_node.stts.settings
    assert [type(m) for m in by_words.modules()] == [type(m) for m in by_node.modules()]
    by_words.load_state_dict(by_node.state_dict())
    assert torch.equal(by_words(clips), by_node(clips))


def test_every_key_of_the_node_is_an_argument(plain, tiny_cfg):
    names = set()
    for key, value in tiny_cfg.STTS.items():
        for leaf in value if isinstance(value, dict) else [None]:
            name = key if leaf is None else f"{key}_{leaf}"
            names.add(key if leaf in ("BLOCKS", "KEEP") else name)
    # FAST_AUGMENT is SlowFast's data's, not the model's.
    names = {name.lower() for name in names - {"ENABLE", "FAST_AUGMENT"}}
    settings = attach(plain, tiny_cfg.STTS).stts.settings
    assert names == set(vars(settings))
    again = attach(detach(plain), **{name: getattr(settings, name) for name in names})
    assert again.stts.settings == settings


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"time": {9: 0.5}}, ValueError, "^time names block 9: the model's blocks are 0 to 3"),
        ({"space": {2: 1.5}}, ValueError, r"^space holds 1.5: a share is above 0"),
        ({"time": [0.5]}, ValueError, r"time is \[0.5\]: give shares by block, {4: 0.9}"),
        ({"time": {0: 0.5}, "time_scorer": "x"}, ValueError, "^time_scorer is 'x': use one of"),
        ({"time": {0: 0.5}, "sigma": -1}, ValueError, "^sigma is -1"),
        ({"time": {0: 0.5}, "sigmas": 1}, TypeError, "'sigmas': did you mean sigma?"),
        ({"sigma": 0.1}, TypeError, "give a node, or what to select"),
        ({}, TypeError, "give a node, or what to select"),
    ],
)
def test_bad_arguments_are_named(plain, arguments, error, message):
    with pytest.raises(error, match=message):
        attach(plain, **arguments)
    assert not hasattr(plain, "stts")


def test_a_node_beside_arguments_is_refused(plain, tiny_cfg):
    with pytest.raises(TypeError, match="give a node, or time, not both"):
        attach(plain, tiny_cfg.STTS, time={0: 0.5})


def test_fusion_that_fails_leaves_the_model_as_it_was(plain, tiny_cfg, clips, monkeypatch):
    def fail(*_):
        raise RuntimeError("no")

    before = plain(clips)
    monkeypatch.setattr("stts_slowfast.fused.fuse_model", fail)
    with pytest.raises(RuntimeError):
        attach(plain, tiny_cfg.STTS)
    assert not hasattr(plain, "stts") and torch.equal(plain(clips), before)


def test_attention_that_could_be_fused_and_was_not_is_logged(tiny_cfg, plain, caplog):
    tiny_cfg.STTS.SPACE.BLOCKS = []
    attach(detach(attach(plain, tiny_cfg.STTS)), tiny_cfg.STTS)
    attach(AnyBlocks(0), tiny_cfg.STTS)  # has none that could be
    assert not caplog.records
    detach(plain)
    for name, module in plain.named_modules():
        if name.endswith("qkv"):
            module.__class__ = type("Adapted", (nn.Linear,), {})
    attach(plain, tiny_cfg.STTS)
    (record,) = caplog.records
    assert "STTS.FUSED_ATTENTION is True, but nothing in this MViT could be" in record.message


def test_each_selector_is_logged_with_its_tokens(plain, tiny_cfg, caplog):
    with caplog.at_level(logging.INFO, "stts_slowfast"):
        attach(plain, tiny_cfg.STTS, backbones.block_grids(tiny_cfg))
    assert [record.message for record in caplog.records] == [
        "STTS time_0: learned frames before block 0, keep 0.5, 4x8x8 -> 2x8x8, 256 -> 128 tokens",
        "STTS space_2: learned window before block 2, keep 0.6, 2x4x4 -> 2x3x3, 32 -> 18 tokens",
    ]


def test_frames_then_windows_before_the_same_block(plain, tiny_cfg, clips):
    tiny_cfg.STTS.SPACE.BLOCKS = [0]
    model = attach(plain, tiny_cfg.STTS)
    assert list(model.stts) == ["time_0", "space_0"]
    model(clips)
    assert selections(model)["space_0"].shape == (2 * 2, 4)


def test_random_selection_is_sampled_anew_in_evaluation(tiny_cfg, plain, clips):
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = "random"
    model = attach(plain, tiny_cfg.STTS)
    draws = set()
    for _ in range(8):
        model(clips)
        draws.add(tuple(selections(model)["time_0"].flatten().tolist()))
    assert len(draws) > 1 and not list(model.stts.parameters())
