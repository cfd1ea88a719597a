import copy
import io
import logging
import pickle

import pytest
import torch
import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.video import mvit_v1_b, mvit_v2_s

from stts_slowfast import backbones
from stts_slowfast.config import add_stts_config
from stts_slowfast.fused.attention import fuse_attention
from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.schedule import set_progress


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


def test_the_cls_token_passes_by_untouched():
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
    """See tests/backbones/test_mvit.py for the outputs; here, what selections() says."""
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
    compiled(clips)
    with torch._dynamo.config.patch(error_on_recompile=True):
        set_progress(model, 0.5)
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
        for _ in range(2):  # the second step raises where a parameter got no gradient
            ddp(clips).sum().backward()
        assert set(selections(ddp)) == {"time_0", "space_2"}
    finally:
        dist.destroy_process_group()


def test_activation_checkpointing_gives_the_same_gradients(model, clips):
    """The noise of the first pass comes again when a block is computed a second time."""
    model.train()
    for module in model.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    checkpointed = copy.deepcopy(model)
    grads = []
    for which in (model, checkpointed):
        torch.manual_seed(3)
        x = which.pos_encoding(which.conv_proj(clips).flatten(2).transpose(1, 2))
        thw = (4, 8, 8)
        for block in which.blocks:
            if which is checkpointed:
                x, thw = checkpoint(block, x, thw, use_reentrant=False)
            else:
                x, thw = block(x, thw)
        which.head(which.norm(x)[:, 0]).square().sum().backward()
        grads.append({name: p.grad for name, p in which.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name])


def test_autocast_runs_in_training_and_evaluation(model, clips):
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            out = model.train(mode)(clips)
        assert torch.isfinite(out).all()


def test_attach_twice_says_so(model, tiny_cfg):
    with pytest.raises(ValueError, match=r"has selectors already \(time_0, space_2\): call detach"):
        attach(model, tiny_cfg.STTS)


def test_detach_without_selectors_says_so(plain):
    with pytest.raises(ValueError, match="has no selectors"):
        detach(plain)


def test_selections_before_a_forward_say_so(model):
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
    """Found when the second selector is made: the first must not stay behind."""
    model = AnyBlocks(0)
    model.blocks[2].norm = nn.LayerNorm(6)
    with pytest.raises(ValueError, match="6 is no multiple of 4"):
        attach(model, tiny_cfg.STTS)
    assert not hasattr(model, "stts") and not any(b._forward_pre_hooks for b in model.blocks)


def test_fused_attention_forgets_selectors_that_are_detached(golden, clips):
    cfg = golden("slowfast_mvit_v2").cfg()
    cfg.STTS.TIME.KEEP, cfg.STTS.SPACE.BLOCKS = [1.0], []
    # Without strides in time, distances are read at the kept frames of each clip.
    cfg.MVIT.POOL_KV_STRIDE_ADAPTIVE = [1, 4, 4]
    model = attach(backbones.build(cfg), cfg.STTS).eval()
    fuse_attention(model)
    with torch.no_grad():
        whole = model(clips)
        torch.testing.assert_close(detach(model)(clips[:1]), whole[:1], rtol=1e-5, atol=1e-5)


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


def test_random_selection_is_drawn_anew_in_evaluation(tiny_cfg, plain, clips):
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = "random"
    model = attach(plain, tiny_cfg.STTS)
    draws = set()
    for _ in range(8):
        model(clips)
        draws.add(tuple(selections(model)["time_0"].flatten().tolist()))
    assert len(draws) > 1 and not list(model.stts.parameters())
