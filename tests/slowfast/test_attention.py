"""Fused attention beside SlowFast's own ``MultiScaleAttention``, in the modes that it has."""

import pytest
import torch
from torch import nn

from stts_slowfast.fused import configure
from stts_slowfast.fused.attention import AttentionView

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
    assert configure(holder, True, True) == 1
    fused, thw = holder["attn"](x, [4, size, size])
    assert thw == stock_thw and type(thw) is list
    torch.testing.assert_close(fused, stock)
    torch.testing.assert_close(torch.autograd.grad(fused.square().sum(), inputs), stock_grads)


@pytest.mark.parametrize("mode", ["conv", "conv_unshared"])
def test_pooling_before_the_projection_stays_stock(make, mode):
    holder = make(pool_first=True, mode=mode)
    assert configure(holder, True, True) == 0
    assert not isinstance(holder["attn"], AttentionView)


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
        assert configure(model, True, True) == len(model.blocks)
        torch.testing.assert_close(model([clips]), stock, rtol=1e-5, atol=1e-5)
