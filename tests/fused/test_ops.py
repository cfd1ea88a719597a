import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stts_slowfast.fused import ops


@pytest.fixture(params=["whole", "pieces"])
def at_once(request, monkeypatch):
    """As one piece, and in pieces of 5 tokens of 8 channels, 1 token of an MLP."""
    if request.param == "pieces":
        monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 40)
    return request.param


def layers(*modules):
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return modules if len(modules) > 1 else modules[0]


def results(function, *parameters):
    """The output and its gradients by all parameters."""
    out = function()
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), parameters)


def assert_same(ours, theirs, dtype):
    for i, pair in enumerate(zip(ours, theirs, strict=True)):
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4 if i else 1e-5
        torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance)


def taken(x, places):
    return x if places is None else x[:, places]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("places", [None, [7, 0, 3]])
@pytest.mark.parametrize("normed", [True, False])
def test_linear(dtype, bias, places, normed, at_once):
    layer, norm = layers(nn.Linear(8, 6, bias=bias), nn.LayerNorm(8))
    layer, norm = layer.to(dtype), norm.to(dtype) if normed else None
    x = torch.randn(2, 11, 8, dtype=dtype, requires_grad=True)
    places = None if places is None else torch.tensor(places)
    parameters = [x, *layer.parameters(), *(norm.parameters() if normed else ())]
    ours = results(lambda: ops.linear(x, layer.weight, layer.bias, norm, places), *parameters)
    theirs = results(lambda: layer(taken(norm(x) if normed else x, places)), *parameters)
    assert_same(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_residual_mlp(dtype, projected, scaled, at_once):
    width = 6 if projected else 8
    norm, first, second, project = (
        module.to(dtype)
        for module in layers(
            nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, width), nn.Linear(8, width)
        )
    )
    project = project if projected else None
    scale = torch.tensor([2.0, 0.0], dtype=dtype).view(2, 1, 1) if scaled else None
    x = torch.randn(2, 11, 8, dtype=dtype, requires_grad=True)
    modules = [norm, first, second, *([project] if projected else [])]
    parameters = [x, *(p for module in modules for p in module.parameters())]

    def plain():
        y = norm(x)
        out = second(F.gelu(first(y)))
        return (project(y) if projected else x) + (out * scale if scaled else out)

    def fused():
        return ops.residual_mlp(x, norm, first, second, project, scale)

    assert_same(results(fused, *parameters), results(plain, *parameters), dtype)


def saved_numbers(function):
    """How many numbers a function keeps for its backward pass."""
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())


def test_residual_mlp_keeps_its_hidden_layer_at_most_once(at_once):
    norm, first, second = layers(nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8))
    x = torch.randn(2, 11, 8, requires_grad=True)
    weights = sum(p.numel() for module in (norm, first, second) for p in module.parameters())
    kept = saved_numbers(lambda: ops.residual_mlp(x, norm, first, second))
    assert kept <= weights + 22 * 8 + (22 * 32 if at_once == "whole" else 0)
    assert kept < saved_numbers(lambda: x + second(F.gelu(first(norm(x))))) - 22 * 32


def test_frozen_layers_pass_gradients_on():
    norm, first, second = layers(nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8))
    for module in (norm, first, second):
        module.requires_grad_(False)
    x = torch.randn(2, 11, 8, requires_grad=True)
    ops.residual_mlp(x, norm, first, second).sum().backward()
    (expected,) = torch.autograd.grad((x + second(F.gelu(first(norm(x))))).sum(), x)
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for module in (norm, first, second) for p in module.parameters())


def test_autocast_computes_products_in_bfloat16():
    norm, first, second = layers(nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8))
    x = torch.randn(2, 11, 8, requires_grad=True)
    parameters = [x, *norm.parameters(), *first.parameters(), *second.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, first.weight, first.bias, norm)
        out = ops.residual_mlp(x, norm, first, second)
        expected = x + second(F.gelu(first(norm(x))))
    assert y.dtype == torch.bfloat16
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    grads = torch.autograd.grad(out.sum() + y.float().sum(), parameters)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(parameters)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_depthwise(stride, frames, at_once):
    x = torch.randn(2, frames, 9, 7, 6).permute(0, 4, 1, 2, 3).requires_grad_()
    weight = torch.randn(6, 1, 3, 3, 3, requires_grad=True)
    sizes = ((1, stride, stride), (1, 1, 1))
    ours = results(lambda: ops.depthwise(x, weight, *sizes), x, weight)
    theirs = results(lambda: F.conv3d(x, weight, None, *sizes, groups=6), x, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    ours = results(lambda: ops.depthwise(x.detach(), weight, *sizes), weight)
    torch.testing.assert_close(ours[1], theirs[2], rtol=1e-5, atol=1e-4)
