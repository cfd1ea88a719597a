"""Selectors have the device and the dtype in which their block computes."""

import copy
import warnings

import pytest
import torch
from torch import nn

from stts_slowfast.hooks import attach, selections
from tests.hosts.examples import EXAMPLES, timm_frames, videomae

SELECTION = {"time": {0: 0.5, 2: 0.5}, "space": {1: 0.6}, "fused_attention": False}


class Int8Linear(nn.Module):
    """A linear layer with integer weights, as bitsandbytes and torchao have it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 127
        weight = (linear.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias, self.scale = linear.bias, float(scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantise(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantise(child)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_weights_are_no_guide_to_the_scorers(example, dtype):
    model = example.model.to(dtype)
    for block in _blocks(model):
        quantise(block)
        first = {"packed": nn.Parameter(torch.zeros(2, dtype=torch.int8), False)}
        block._parameters = first | block._parameters
    attach(model, **SELECTION)
    assert {parameter.dtype for parameter in model.stts.parameters()} == {dtype}
    assert example.logits(model, example.clips.to(dtype)).isfinite().all()


def _blocks(model):
    from stts_slowfast.hosts import find_blocks

    return find_blocks(model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["videomae", "timm-frames", "pytorchvideo"])
@pytest.mark.filterwarnings("ignore:.*quantization:DeprecationWarning")
def test_dynamic_quantisation_after_attach(name):
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch quantises nothing")
    example = EXAMPLES[name]()
    attach(example.model, **SELECTION)
    plain = example.logits(example.model, example.clips)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(example.model))
    assert any("quantized" in type(m).__module__ for m in quantised.stts.modules())
    out = example.logits(quantised, example.clips)
    assert out.shape == plain.shape and out.isfinite().all()


def offloaded(model, device):
    """A model whose weights accelerate brings to a device for each call of a layer."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.cpu_offload(model, execution_device=device)


@torch.no_grad()
@pytest.mark.parametrize("make", [videomae, timm_frames])
def test_layers_that_accelerate_offloads(make):
    model, clips, logits = make()
    plain = attach(copy.deepcopy(model), **SELECTION)
    model = attach(offloaded(model, torch.device("cpu")), **SELECTION)
    assert {parameter.device.type for parameter in model.stts.parameters()} == {"cpu"}
    model.stts.load_state_dict(plain.stts.state_dict())
    assert torch.equal(logits(model, clips), logits(plain, clips))
    assert torch.equal(selections(model)["time_2"], selections(plain)["time_2"])


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2", "timesformer-divided"])
def test_a_model_over_two_devices(name):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    example = EXAMPLES[name]()
    plain = attach(copy.deepcopy(example.model), **SELECTION)
    blocks = _blocks(example.model)
    devices = {}
    for path, module in example.model.named_modules():
        if module in blocks:
            devices[path] = 0 if blocks.index(module) in (1, 2) else "cpu"
    others = [
        path
        for path, module in example.model.named_modules()
        if not list(module.children())
        and not any(path.startswith(f"{block}.") for block in devices)
    ]
    devices |= {path: "cpu" for path in others}
    model = accelerate.dispatch_model(example.model, devices, main_device="cpu")
    attach(model, **SELECTION)
    assert {p.device.type for p in model.stts["time_2"].parameters()} == {"cuda"}
    model.stts.load_state_dict(plain.stts.state_dict())
    out = example.logits(model, example.clips).cpu()
    torch.testing.assert_close(out, example.logits(plain, example.clips), atol=1e-3, rtol=1e-3)
    out = selections(model)["time_2"].cpu()
    assert torch.equal(out, selections(plain)["time_2"])


def test_a_model_on_meta_has_its_selectors_there():
    with torch.device("meta"):
        model = timm_frames().model
    attach(model, **SELECTION)
    assert {parameter.device.type for parameter in model.stts.parameters()} == {"meta"}
