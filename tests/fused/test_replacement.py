"""Fusion is verified, and falls back to the original if a submodule is changed or observed."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.video.mvit import MultiscaleAttention, MultiscaleBlock

from stts_slowfast.fused import equivalence, fuse_model, unfuse_model
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.blocks import BlockReplacement


def fused(model) -> list[bool]:
    """Which replacements of attention and blocks are fused now."""
    kinds = (AttentionReplacement, BlockReplacement)
    return [module.is_fused() for module in model.modules() if isinstance(module, kinds)]


class Adapter(nn.Module):
    """A low-rank branch beside a layer, as LoRA has it."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def adapt(model):
    model.blocks[1].attn.qkv = Adapter(model.blocks[1].attn.qkv)


def adapt_pool(model):
    pool = model.blocks[1].attn.pool_v
    pool.pool = nn.Sequential(pool.pool, nn.ReLU())


def halve_weight(model):
    parametrize.register_parametrization(model.blocks[1].attn.project[0], "weight", Halved())


def wrap_forward(model):
    norm = model.blocks[1].norm2
    norm.forward = lambda x, forward=norm.forward: 2 * forward(x)


def hook_on_stochastic_depth(model):
    part = model.blocks[1].stochastic_depth
    part.register_forward_hook(lambda module, args, out: out / 2)


def hook_before_norm(model):
    part = model.blocks[1].attn.pool_v.norm_act[0]
    part.register_forward_pre_hook(lambda module, args: (args[0].flip(-1),))


CHANGES = [
    adapt,
    adapt_pool,
    halve_weight,
    wrap_forward,
    hook_on_stochastic_depth,
    hook_before_norm,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("relative", [False, True])
def test_what_happens_to_a_part_counts(outputs_and_gradients, mvit, change, when, relative, clips):
    model = mvit(relative)
    torch.manual_seed(1)
    stock = copy.deepcopy(model)
    if when == "after":
        fuse_model(model, True, True)
        plain = model(clips)
        assert all(fused(model))
    for one in (stock, model):
        torch.manual_seed(2)
        change(one)
    if when == "before":
        fuse_model(model, True, True)
    out, grads = outputs_and_gradients(model, clips)
    expected, expected_grads = outputs_and_gradients(stock, clips)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-3)
    if when == "after":
        assert (out - plain).abs().max() > 1e-4
        assert sum(fused(model)) in (4, 5)  # the attention of the block may go on


def test_hooks_see_every_call_until_they_are_removed(mvit, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    plain, calls = model(clips), []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda *args: calls.append(1))
    assert fused(model).count(False) == 2  # attention and block
    torch.testing.assert_close(model(clips), plain, rtol=1e-5, atol=1e-5)
    assert calls == [1]
    handle.remove()
    assert all(fused(model)) and torch.equal(model(clips), plain)


def test_what_was_checked_once_is_checked_in_copies_and_after_changes(mvit, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    plain = model(clips)
    assert all(fused(model))  # from here on, only what can have changed is checked
    twin = copy.deepcopy(model)
    handle = twin.blocks[1].mlp[0].register_forward_hook(lambda *args: None)
    assert fused(twin).count(False) == 1 and all(fused(model))
    handle.remove()
    assert all(fused(twin))
    layer = twin.blocks[1].mlp[0]
    twin.blocks[1].mlp[0] = nn.Linear(layer.in_features, layer.out_features)
    assert all(fused(twin))  # a layer of the same type
    assert (twin(clips) - plain).abs().max() > 1e-4
    twin.blocks[1].mlp[0] = Adapter(layer)
    assert fused(twin).count(False) == 1
    twin.blocks[1].mlp[0] = layer
    twin.blocks[1].mlp[-1].p = 0.5
    assert fused(twin).count(False) == 1
    twin.blocks[1].mlp[-1].p = 0.0
    assert all(fused(twin)) and torch.equal(twin(clips), plain)


def test_quantised_layers_compute(mvit, clips):
    model = mvit(True)
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and "attn" in name:
            part.weight.data += 0.3 * torch.rand_like(part.weight)
    fuse_model(model, True, True)
    plain = model(clips)
    with pytest.warns(DeprecationWarning):
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    restored = copy.deepcopy(quantised)
    unfuse_model(restored)
    assert not any(fused(quantised))
    out = quantised(clips)
    assert (out - plain).abs().max() > 1e-4
    torch.testing.assert_close(out, restored(clips), rtol=1e-5, atol=1e-5)


def test_hooks_on_all_modules_see_all(mvit, clips):
    model = mvit(False)
    fuse_model(model, True, True)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    model(clips)
    handle.remove()
    assert all(block.mlp[0] in seen and block.attn.qkv in seen for block in model.blocks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_hooks_fire(mvit, backend, clips):
    model = mvit(True)
    fuse_model(model, True, True)
    block, x = model.blocks[1], torch.randn(1, 1 + 4 * 16 * 16, 16)
    plain = block(x, (4, 16, 16))[0]
    torch.compiler.reset()
    compiled = torch.compile(block, backend=backend)
    torch.testing.assert_close(compiled(x, (4, 16, 16))[0], plain, rtol=1e-4, atol=1e-4)
    handle = block.attn.qkv.register_forward_hook(lambda module, args, out: out.flip(-1))
    turned = block(x, (4, 16, 16))[0]
    assert (turned - plain).abs().max() > 1e-2
    torch.testing.assert_close(compiled(x, (4, 16, 16))[0], turned, rtol=1e-4, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(compiled(x, (4, 16, 16))[0], plain, rtol=1e-4, atol=1e-4)


# ---- compared with the original ----------------------------------------------------------


class Doubled(MultiscaleAttention):
    def forward(self, x, thw):
        x, thw = super().forward(x, thw)
        return 2 * x, thw


class Same(MultiscaleAttention):
    def forward(self, x, thw):
        return super().forward(x, thw)


def test_a_subclass_is_fused_if_it_computes_the_same(mvit, clips, caplog):
    model = mvit(True)
    model.blocks[0].attn.__class__ = Same
    model.blocks[1].attn.__class__ = Doubled
    stock = model(clips)
    assert fuse_model(model, True, True) == 2
    assert isinstance(model.blocks[0].attn, AttentionReplacement)
    assert type(model.blocks[1].attn) is Doubled
    torch.testing.assert_close(model(clips), stock, rtol=1e-5, atol=1e-5)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 1 and lines[0].startswith("not replacing Doubled: the new output differs")


@pytest.mark.parametrize("kind", [MultiscaleAttention, MultiscaleBlock])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_formula_that_changed_in_this_process_is_not_believed(
    mvit, kind, fuse, clips, monkeypatch
):
    fuse_model(mvit(True), fuse, True)  # compared, and found equal
    forward = kind.forward

    def doubled(self, x, thw):
        x, thw = forward(self, x, thw)
        return 2 * x, thw

    monkeypatch.setattr(kind, "forward", doubled)
    model = mvit(True)
    stock = model(clips)
    fuse_model(model, fuse, True)
    assert all(
        type(m) is kind for m in model.modules() if getattr(m, "original", m).__class__ is kind
    )
    torch.testing.assert_close(model(clips), stock, rtol=1e-5, atol=1e-5)


def test_a_forward_of_one_module_alone_is_kept(mvit, clips):
    model = mvit(True)
    for part in (model.blocks[0].attn, model.blocks[1]):
        part.forward = lambda x, thw, forward=part.forward: (2 * forward(x, thw)[0], thw)
    model.blocks[1].forward = lambda x, thw, f=MultiscaleBlock.forward, b=model.blocks[1]: f(
        b, x, thw
    )
    calls = model.blocks[0].attn.forward
    fuse_model(model, True, True)
    assert model.blocks[0].attn.forward is calls


def test_comparing_touches_nothing(mvit, monkeypatch):
    model = mvit(True).train()
    model.blocks[0].register_forward_hook(lambda *args: pytest.fail("the model ran"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    equivalence._compare.cache_clear()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fuse_model(model, True, True)
    assert torch.equal(torch.rand(1), expected)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_each_kind_is_compared_once(mvit, monkeypatch):
    equivalence._compare.cache_clear()
    fuse_model(mvit(True), True, True)
    misses = equivalence._compare.cache_info().misses
    fuse_model(mvit(True), True, True)
    assert equivalence._compare.cache_info().misses == misses > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_any_type_and_on_meta_are_fused(mvit, dtype):
    assert fuse_model(mvit(True).to(dtype), True, True) == 3
    assert fuse_model(mvit(True).to("meta"), True, True) == 3


# ---- transforms and higher derivatives -------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_torch_func_runs_the_originals(mvit, relative, clips):
    model = mvit(relative).double()
    block, x = model.blocks[1], torch.randn(1, 1 + 4 * 16 * 16, 16, dtype=torch.float64)
    v = torch.randn_like(x)

    def energy(x):
        return block(x, (4, 16, 16))[0].square().sum()

    def transforms():
        gradient = torch.func.grad(energy)(x)
        forward = torch.func.jvp(energy, (x,), (v,))[1]
        second = torch.func.jvp(torch.func.grad(energy), (x,), (v,))[1]
        mapped = torch.func.vmap(lambda x: block(x[None], (4, 16, 16))[0])(torch.cat([x, v]))
        return gradient, forward, second, mapped

    stock = transforms()
    fuse_model(model, True, True)
    assert all(fused(model))
    torch.testing.assert_close(transforms(), stock)


def test_second_derivatives_outside_of_torch_func_are_refused_in_words(mvit, clips):
    model = mvit(False)
    fuse_model(model, True, True)
    x = torch.randn(1, 1 + 4 * 16 * 16, 16, requires_grad=True)
    out = model.blocks[1](x, (4, 16, 16))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|not implemented"):
        grad.square().sum().backward()
    fuse_model(model, False, True)
    out = model.blocks[1](x, (4, 16, 16))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_replica_computes_with_its_own_parameters(mvit):
    """A replica of ``nn.DataParallel``; here it runs the original's forward."""
    model = mvit(True)
    fuse_model(model, True, True)
    replacement = model.blocks[0].attn
    twice = copy.deepcopy(replacement)
    x = torch.randn(1, 1 + 4 * 16 * 16, 8)
    replica = replacement._replicate_for_data_parallel()
    for name, table in replacement._parameters.items():
        setattr(replica, name, table * 2)
        twice._parameters[name].data.mul_(2)
    replica.qkv = twice.qkv = Adapter(replacement.qkv)
    torch.testing.assert_close(replica(x, (4, 16, 16))[0], twice(x, (4, 16, 16))[0])
