import copy
import io
import pickle
import shutil
from unittest import mock

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.video.mvit import (
    MultiscaleAttention,
    MultiscaleBlock,
)

from stts_slowfast.backbones import block_grids, build
from stts_slowfast.fused import fuse_model, unfuse_model
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.hooks import attach, selections


@pytest.mark.parametrize(
    ("relative", "residual_with_cls"), [(False, False), (True, False), (True, True)]
)
def test_outputs_and_gradients_are_the_originals(
    outputs_and_gradients, mvit, relative, residual_with_cls, clips
):
    model = mvit(relative, residual_with_cls)
    stock, stock_grads = outputs_and_gradients(model, clips)
    assert fuse_model(model, True, True) == 3
    fused, fused_grads = outputs_and_gradients(model, clips)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=1e-5)
    assert fused_grads.keys() == stock_grads.keys()
    scale = max(grad.abs().max() for grad in stock_grads.values()).item()
    for name, grad in stock_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("relative", [False, True])
def test_exact_in_double_precision(outputs_and_gradients, mvit, relative, clips):
    model = mvit(relative).double()
    stock, stock_grads = outputs_and_gradients(model, clips.double())
    fuse_model(model, True, True)
    fused, fused_grads = outputs_and_gradients(model, clips.double())
    torch.testing.assert_close(fused, stock, rtol=1e-12, atol=1e-12)
    for name, grad in stock_grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("kernel", "stride_q", "stride_kv"),
    [
        ([3, 3, 3], [2, 2, 2], [2, 4, 4]),
        ([1, 3, 3], [1, 3, 2], [1, 5, 7]),
        ([5, 5, 5], [1, 2, 2], [3, 1, 6]),
    ],
)
def test_any_kernel_and_stride(kernel, stride_q, stride_kv):
    attn = MultiscaleAttention(
        [6, 13, 13], 16, 16, 2, kernel, kernel, stride_q, stride_kv, True, False, True
    ).double()
    holder = nn.ModuleDict({"attn": attn})
    x = torch.randn(2, 1 + 6 * 13 * 11, 16, dtype=torch.float64, requires_grad=True)
    stock, thw = attn(x, (6, 13, 11))
    grad = torch.autograd.grad(stock.square().sum(), [x, *attn.parameters()])
    assert fuse_model(holder, True, True) == 1
    fused, fused_thw = holder["attn"](x, (6, 13, 11))
    assert fused_thw == thw
    torch.testing.assert_close(fused, stock)
    torch.testing.assert_close(
        torch.autograd.grad(fused.square().sum(), [x, *attn.parameters()]), grad
    )


def test_parameters_keep_their_names_order_and_identity(mvit, clips):
    model = mvit(True)
    before = list(model.named_parameters())
    keys = list(model.state_dict())
    modules = [module for block in model.blocks for module in block.modules()]
    fuse_model(model, True, True)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in before]
    assert all(a is b for a, (_, b) in zip(model.parameters(), before))
    assert list(model.state_dict()) == keys
    model.load_state_dict(mvit(True).state_dict())
    loaded = model(clips)
    unfuse_model(model)
    assert all(
        a is b for a, b in zip(modules, (m for block in model.blocks for m in block.modules()))
    )
    torch.testing.assert_close(model(clips), loaded, rtol=1e-5, atol=1e-5)


def test_unfused_model_follows_what_happened_while_fused(mvit, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    model.double().train()
    unfuse_model(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(isinstance(module, AttentionReplacement) for module in model.modules())
    model(clips.double())


def test_what_cannot_be_fused_is_kept(mvit):
    model = mvit(False)
    model.blocks[0].attn.pool_k.norm_act[0] = nn.BatchNorm3d(16)
    model.blocks[1].attn.qkv = nn.Sequential(model.blocks[1].attn.qkv)
    assert fuse_model(model, True, True) == 1
    assert isinstance(model.blocks[0].attn, MultiscaleAttention)
    assert isinstance(model.blocks[1].attn, MultiscaleAttention)
    assert fuse_model(nn.Linear(2, 2), True, True) == 0


@pytest.fixture
def selecting(tiny_cfg):
    def make(relative: bool = True, time=((0, 0.75),), true_distances: bool = True):
        tiny_cfg.MVIT.USE_ABS_POS = not relative
        tiny_cfg.MVIT.REL_POS_SPATIAL = tiny_cfg.MVIT.REL_POS_TEMPORAL = relative
        tiny_cfg.MVIT.RESIDUAL_POOLING = relative
        tiny_cfg.STTS.TIME.BLOCKS = [block for block, _ in time]
        tiny_cfg.STTS.TIME.KEEP = [keep for _, keep in time]
        model = build(tiny_cfg).eval()
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                nn.init.normal_(parameter)
        attach(model, tiny_cfg.STTS, block_grids(tiny_cfg))
        return model

    return make


SMALL = (2, 3, 8, 32, 32)


@pytest.mark.parametrize("relative", [False, True])
def test_stretched_tables_give_the_original_output_after_a_selection(selecting, relative):
    model = selecting(relative)
    unfuse_model(model)
    clips = torch.randn(SMALL)
    stock = model(clips)
    fuse_model(model, True, False)
    torch.testing.assert_close(model(clips), stock, rtol=1e-5, atol=1e-5)


def explicit(attn, x, thw, frames, spans):
    """Attention with its position term written out for every pair of tokens.

    ``frames (B, T)`` are the frames' places in the clip; ``spans`` are the sides of the whole
    query and key grids in front of which the window was cut.
    """
    heads = attn.num_heads
    q, k, v = attn.qkv(x).unflatten(2, (3, heads, -1)).transpose(1, 3).unbind(2)
    k, k_thw = attn.pool_k(k, thw)
    v, _ = attn.pool_v(v, thw)
    q_thw = thw
    if attn.pool_q is not None:
        q, q_thw = attn.pool_q(q, thw)
    logits = attn.scaler * q @ k.transpose(2, 3)
    steps = [span / min(spans) for span in spans]  # places per side of the finer grid, inverted
    q_step, k_step = steps[1], steps[0]  # a coarser grid takes longer steps
    middle = round((spans[1] - 1) * max(1.0, k_step / q_step if spans[1] < spans[0] else 1.0))
    for b in range(len(x)):
        for qi in range(q.shape[2] - 1):
            qt, qh, qw = qi // (q_thw[1] * q_thw[2]), qi // q_thw[2] % q_thw[1], qi % q_thw[2]
            for ki in range(k.shape[2] - 1):
                kt, kh, kw = ki // (k_thw[1] * k_thw[2]), ki // k_thw[2] % k_thw[1], ki % k_thw[2]
                rows = (
                    attn.rel_pos_t[frames[b, qt] - frames[b, kt] + len(attn.rel_pos_t) // 2]
                    + attn.rel_pos_h[int(qh * q_step - kh * k_step) + middle]
                    + attn.rel_pos_w[int(qw * q_step - kw * k_step) + middle]
                )
                logits[b, :, 1 + qi, 1 + ki] += q[b, :, 1 + qi] @ rows
    x = logits.softmax(3) @ v
    if attn.residual_pool:
        x[:, :, 1:] += q[:, :, 1:]
    return attn.project(x.transpose(1, 2).flatten(2))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_true_distances_equal_an_explicit_computation(selecting, number, training):
    model = selecting(time=((0, 0.75), (1, 0.7))).train(training)
    seen = {}
    attn = model.blocks[number].attn
    attn_input = model.blocks[number].norm1.register_forward_hook(
        lambda module, args, out: seen.update(x=out)
    )
    model.blocks[number].register_forward_pre_hook(lambda m, args: seen.update(thw=args[1]))
    assert fuse_model(model, True, True) == len(model.blocks)
    model.blocks[number].attn.register_forward_hook(
        lambda module, args, out: seen.update(out=out[0])
    )
    model(torch.randn(SMALL))
    attn_input.remove()
    kept = selections(model)
    frames = kept["time_0"].gather(1, kept["time_1"])  # (B, 2) places among the 4 frames
    assert frames.shape == (2, 2)
    assert seen["thw"][0] == 2
    # Block 2 sees a 3x3 window of a 4x4 grid; block 1 the whole 8x8 grid.
    whole = {1: 8, 2: 4, 3: 4}[number]
    spans = [-(-whole // stride) for stride in strides(attn)]
    torch.testing.assert_close(
        seen["out"], explicit(attn, seen["x"], tuple(seen["thw"]), frames, spans)
    )


def strides(attn):
    """Query and key stride in space."""
    return [1 if pool is None else pool.pool.stride[1] for pool in (attn.pool_q, attn.pool_k)]


def test_true_distances_differ_from_stretched_ones_only_after_a_selection(mvit, selecting):
    model, whole = selecting(), mvit(True)
    clips = torch.randn(SMALL)
    tokens = torch.randn(1, 1 + 3 * 10 * 10, 8)
    outputs = {}
    for true_distances in (True, False):
        fuse_model(model, True, true_distances)
        fuse_model(whole, True, true_distances)
        outputs[true_distances] = model(clips), whole.blocks[0](tokens, (3, 10, 10))[0]
    assert (outputs[True][0] - outputs[False][0]).abs().max() > 1e-4
    assert torch.equal(outputs[True][1], outputs[False][1])


def test_flops_are_those_of_the_original_model(mvit, clips):
    model = mvit(True)

    def count():
        return FlopCountAnalysis(model, clips[:1]).unsupported_ops_warnings(False).total()

    stock = count()
    fuse_model(model, True, True)
    assert count() == stock


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_model_reads_true_distances(selecting):
    model = selecting()
    fuse_model(model, True, True)
    clips = torch.randn(SMALL)
    with torch.no_grad():
        traced = torch.jit.trace(model, clips, check_trace=False)
        torch.testing.assert_close(traced(clips), model(clips), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_follow_their_own_selectors(selecting, how):
    model = selecting()
    fuse_model(model, True, True)
    clips, other = torch.randn(SMALL), torch.randn(SMALL)
    expected = model(clips)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        twin = pickle.loads(pickle.dumps(model))
    assert list(twin.state_dict()) == list(model.state_dict())
    model(other)
    torch.testing.assert_close(twin(clips), expected, rtol=0, atol=0)
    twin.requires_grad_(False).zero_grad()
    unfuse_model(twin)
    assert twin.blocks[0].attn.rel_pos_h is not model.blocks[0].attn.rel_pos_h
    assert list(twin.state_dict()) == list(model.state_dict())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert "original" not in " ".join(model.state_dict())


def test_autocast(outputs_and_gradients, mvit, clips):
    model = mvit(True)
    exact = model(clips)
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = outputs_and_gradients(model, clips)
        fuse_model(model, True, True)
        fused, fused_grads = outputs_and_gradients(model, clips)
    assert fused.dtype == stock.dtype == torch.bfloat16
    assert all(torch.isfinite(grad).all() for grad in fused_grads.values())
    assert fused_grads["conv_proj.weight"].dtype == torch.float32
    error = (fused - exact).abs().max()
    assert error <= 2 * (stock - exact).abs().max() + 0.01


def test_activation_checkpointing(mvit, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    attn = model.blocks[0].attn
    x = torch.randn(2, 1 + 4 * 16 * 16, 8, requires_grad=True)
    plain = torch.autograd.grad(attn(x, (4, 16, 16))[0].square().sum(), x)
    saved = torch.autograd.grad(
        checkpoint(attn, x, (4, 16, 16), use_reentrant=False)[0].square().sum(), x
    )
    torch.testing.assert_close(saved, plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_graph_breaks(mvit, backend):
    model = mvit(True)
    fuse_model(model, True, True)
    block = model.blocks[1]
    parameters = list(block.parameters())
    x = torch.randn(2, 1 + 4 * 16 * 16, 16, requires_grad=True)
    eager = block(x, (4, 16, 16))[0]
    grads = torch.autograd.grad(eager.square().sum(), [x, *parameters])
    torch.compiler.reset()
    out, thw = torch.compile(block, fullgraph=True, backend=backend)(x, (4, 16, 16))
    assert thw == (4, 8, 8)
    torch.testing.assert_close(out, eager, rtol=1e-5, atol=1e-5)
    compiled = torch.autograd.grad(out.square().sum(), [x, *parameters])
    torch.testing.assert_close(compiled, grads, rtol=1e-4, atol=2e-3)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_compiles_to_native_code(mvit):
    model = mvit(False)
    fuse_model(model, True, True)
    x = torch.randn(2, 1 + 4 * 16 * 16, 16)
    torch.compiler.reset()
    with torch.no_grad():
        out, thw = torch.compile(model.blocks[1], fullgraph=True)(x, (4, 16, 16))
        torch.testing.assert_close(out, model.blocks[1](x, (4, 16, 16))[0], rtol=1e-5, atol=1e-5)
    assert thw == (4, 8, 8)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_with_selection(selecting, training):
    model = selecting()
    model.stts.train(training)
    fuse_model(model, True, True)
    clips = torch.randn(SMALL)
    for selector in model.stts.values():
        selector.sigma = 0.0  # no noise, so that both runs select alike
    torch.compiler.reset()
    out = torch.compile(model, fullgraph=True, backend="eager")(clips)
    torch.testing.assert_close(out, model(clips), rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("relative", [False, True])
def test_no_score_matrix_on_cuda(mvit, relative, clips):
    model = mvit(relative).cuda().half()
    fuse_model(model, True, True)
    with (
        torch.no_grad(),
        nn.attention.sdpa_kernel(
            [nn.attention.SDPBackend.FLASH_ATTENTION, nn.attention.SDPBackend.EFFICIENT_ATTENTION]
        ),
    ):
        assert torch.isfinite(model(clips.cuda().half())).all()


def test_what_happens_to_a_part_of_a_fused_block_counts(mvit, clips):
    model = mvit(False)
    fuse_model(model, True, True)
    plain = model(clips)
    calls = []
    mlp = model.blocks[1].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: calls.append(out) or out * 0)
    assert not torch.equal(model(clips), plain)
    assert len(calls) == 1
    handle.remove()
    assert torch.equal(model(clips), plain)
    mlp[0] = nn.Sequential(mlp[0], nn.Tanh())  # as adapters do
    assert not torch.equal(model(clips), plain)
    model.blocks[2].mlp = nn.Linear(16, 16)
    model(clips)


def test_blocks_with_dropout_are_kept(mvit):
    model = mvit(False)
    for block in model.blocks:
        block.mlp[2].p = 0.1
    assert fuse_model(model, True, True) == 3
    assert all(type(block) is MultiscaleBlock for block in model.blocks)
    assert all(isinstance(block.attn, AttentionReplacement) for block in model.blocks)


@pytest.mark.parametrize("relative", [False, True])
def test_stochastic_depth_drops_the_same(outputs_and_gradients, mvit, relative, clips):
    model = mvit(relative).train()
    for block in model.blocks:
        block.stochastic_depth.p = 0.5
    torch.manual_seed(0)
    stock, stock_grads = outputs_and_gradients(model, clips)
    fuse_model(model, True, True)
    torch.manual_seed(0)
    out, grads = outputs_and_gradients(model, clips)
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, stock_grads, rtol=1e-3, atol=1e-3)


def last_tokens(model, clips):
    """How many tokens the last norm sees; looked at from where no module can tell."""
    tokens, forward = [], nn.LayerNorm.forward

    def spy(norm, x):
        if norm is model.norm:
            tokens.append(x.shape[1])
        return forward(norm, x)

    with mock.patch.object(nn.LayerNorm, "forward", spy):
        model(clips)
    return tokens


def test_last_block_computes_what_the_head_reads(outputs_and_gradients, mvit, clips):
    model = mvit(False)
    model.blocks[2].attn.pool_q = model.blocks[2].pool_skip = None
    everything = last_tokens(model, clips)
    stock, stock_grads = outputs_and_gradients(model, clips)
    fuse_model(model, True, True)
    assert everything == [1 + 4 * 8 * 8]
    assert last_tokens(model, clips) == [1]
    out, grads = outputs_and_gradients(model, clips)
    torch.testing.assert_close(out, stock, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, stock_grads, rtol=1e-3, atol=1e-3)
    for module in (model.blocks[2], model.norm):  # whoever looks sees all of it
        handle = module.register_forward_hook(lambda module, args, out: None)
        assert last_tokens(model, clips) == everything
        handle.remove()


def test_last_block_keeps_tokens_that_its_parameters_serve(outputs_and_gradients, mvit, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    assert last_tokens(model, clips) == [1 + 4 * 4 * 4]
    _, grads = outputs_and_gradients(model, clips)
    assert all(grad is not None for grad in grads.values())
