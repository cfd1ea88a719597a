"""Fused attention beside SlowFast's own ``MultiScaleAttention``, in the modes that it has."""

import pytest
import torch
from torch import nn

from stts_slowfast.fused import fuse_model
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.grid import Grid

KERNELS = {"kernel_q": (3, 3, 3), "kernel_kv": (3, 3, 3), "stride_kv": (1, 4, 4)}
RELATIVE = {"rel_pos_spatial": True, "rel_pos_temporal": True, "residual_pooling": True}


@pytest.fixture
def make(checkout):
    from slowfast.models.attention import MultiScaleAttention

    def make(**options):
        options = {"qkv_bias": True, "stride_q": (1, 2, 2), **KERNELS, **options}
        attn = MultiScaleAttention(16, 32, (4, 12, 12), num_heads=2, **options)
        for parameter in attn.parameters():
            nn.init.normal_(parameter, std=0.3)
        return nn.ModuleDict({"attn": attn.double()})

    return make


@pytest.mark.parametrize("size", [12, 9, 7])
@pytest.mark.parametrize(
    "options",
    [
        {},
        RELATIVE,
        {**RELATIVE, "has_cls_embed": False},
        {**RELATIVE, "rel_pos_temporal": False},
        {**RELATIVE, "stride_kv": (1, 8, 8), "stride_q": (1, 1, 1)},
        {**RELATIVE, "separate_qkv": True},
        {"separate_qkv": True, "qkv_bias": False},
        {"kernel_q": (1, 1, 1), "stride_q": (1, 1, 1)},
        {"kernel_kv": (1, 1, 1), "stride_kv": (1, 1, 1)},
        {"mode": "avg"},
        {"mode": "max", "has_cls_embed": False},
    ],
    ids=str,
)
def test_equals_slowfast(make, options, size):
    holder = make(**options)
    has_cls = options.get("has_cls_embed", True)
    x = torch.randn(2, has_cls + 4 * size * size, 16, dtype=torch.float64, requires_grad=True)
    inputs = [x, *holder.parameters()]
    stock, stock_thw = holder["attn"](x, [4, size, size])
    stock_grads = torch.autograd.grad(stock.square().sum(), inputs)
    assert fuse_model(holder, True, True) == 1
    fused, thw = holder["attn"](x, [4, size, size])
    assert thw == stock_thw and type(thw) is list
    torch.testing.assert_close(fused, stock)
    torch.testing.assert_close(torch.autograd.grad(fused.square().sum(), inputs), stock_grads)


@pytest.mark.parametrize("mode", ["conv", "conv_unshared"])
def test_pooling_before_the_projection_stays_stock(make, mode):
    holder = make(pool_first=True, mode=mode)
    assert fuse_model(holder, True, True) == 0
    assert not isinstance(holder["attn"], AttentionReplacement)


@pytest.mark.parametrize("recipe", ["MVIT_B_16x4_CONV", "MVITv2_S_16x4"])
def test_stock_recipes_are_fused(get_cfg, build, recipe):
    cfg = get_cfg(stock=f"configs/Kinetics/{recipe}.yaml")
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = 64
    cfg.DATA.NUM_FRAMES = 8
    cfg.STTS.FUSED_ATTENTION = False
    model = build(cfg).eval()
    clips = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        stock = model([clips])
        assert fuse_model(model, True, True) == len(model.blocks)
        torch.testing.assert_close(model([clips]), stock, rtol=1e-5, atol=1e-5)


V2 = [
    *("MVIT.USE_ABS_POS", False, "MVIT.REL_POS_SPATIAL", True, "MVIT.REL_POS_TEMPORAL", True),
    *("MVIT.RESIDUAL_POOLING", True, "MVIT.DIM_MUL_IN_ATT", True, "MVIT.DROPPATH_RATE", 0.3),
]
SELECTIONS = {
    "time": ([0], [0.75], [], []),
    "space": ([], [], [1], [0.6]),
    "both": ([0], [0.75], [2], [0.6]),
    "twice": ([0, 2], [0.75, 0.7], [1, 2], [0.6, 0.8]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("version", [(), V2, [*V2, "MVIT.SEPARATE_QKV", True]], ids=["1", "2", "s"])
def test_numbers_do_not_depend_on_fusion(get_cfg, build, version, selection, training):
    blocks, keep, space_blocks, space_keep = SELECTIONS[selection]
    selected = ["STTS.TIME.BLOCKS", blocks, "STTS.TIME.KEEP", keep]
    selected += ["STTS.SPACE.BLOCKS", space_blocks, "STTS.SPACE.KEEP", space_keep]
    selected += ["STTS.SHRINK", 0.0]  # else the first iterations keep more
    cfg = get_cfg("STTS.ENABLE", True, "MODEL.HEAD_ACT", "none", *version, *selected)
    # In float64: rounding of scores this far apart would show in the gradients.
    model = build(cfg).train(training).double()
    for name, parameter in model.named_parameters():
        if "rel_pos" in name or name.startswith("stts"):
            nn.init.normal_(parameter, std=0.3)
    clips = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    results = {}
    for fuse in (True, False):
        for true_distances in (True, False):
            count = fuse_model(model, fuse, true_distances)
            assert count == (4 if fuse or (true_distances and version) else 0)
            torch.manual_seed(0)
            out = model([clips])
            out.square().sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            results[fuse, true_distances] = [out.detach(), *grads]
            model.zero_grad(set_to_none=True)
    for true_distances in (True, False):
        ours, theirs = results[True, true_distances], results[False, true_distances]
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
        scale = max(grad.abs().max() for grad in theirs[1:]).item()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5 * max(scale, 1.0))
    apart = (results[True, True][0] - results[True, False][0]).abs().max()
    assert (apart > 1e-5) == bool(version)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("mode", ["conv", "conv_unshared"])
def test_pooling_before_the_projection_reads_true_distances(make, mode, fuse):
    """The same tables with all frames kept are the stock module's; with some, they are not."""
    holder = make(**RELATIVE, pool_first=True, mode=mode)
    x = torch.randn(2, 1 + 4 * 9 * 9, 16, dtype=torch.float64)
    stock = holder["attn"](x, [4, 9, 9])[0]
    assert fuse_model(holder, fuse, True) == (0 if fuse else 1)
    frames = torch.arange(4).expand(2, -1)
    torch.testing.assert_close(holder["attn"](x, Grid((4, 9, 9), frames))[0], stock)
    frames = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
    out, thw = holder["attn"](x, Grid((4, 9, 9), frames))
    torch.testing.assert_close(out[0], stock[0])
    assert (out[1] - stock[1]).abs().max() > 1e-3
    assert isinstance(thw, Grid) and torch.equal(thw.frames, frames)


def test_hooks_and_adapters_of_submodules_run(get_cfg, build):
    model = build(get_cfg("STTS.ENABLE", True, *V2)).eval()
    clips, calls = [torch.randn(2, 3, 8, 32, 32)], []
    plain = model(clips)
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(model(clips), plain, rtol=1e-5, atol=1e-6)
    assert calls == [1]
    handle.remove()
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1, nn.ReLU())
    assert not model.blocks[1].is_fused() and model.blocks[2].is_fused()
    assert not torch.equal(model(clips), plain)
