"""Evaluation in half precision and compiled: the numbers are those without, and so is the model."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import stts_slowfast as stts
from stts_slowfast import evaluation
from stts_slowfast.evaluation import evaluating
from tests.gpu.subjects import SMALL

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def make(name):
    (model, clips, logits), selection = SMALL[name]()
    stts.attach(model, **selection)
    return model.eval(), clips, logits


class Casts(TorchDispatchMode):
    """Counts casts of tensors by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_to_copy" in str(function):
            self.shapes[args[0].shape] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def run(model, clips, logits, context):
    with context, Casts() as casts:
        return logits(model, clips), casts.shapes


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", ["MViTv2", "VideoSwin", "TimeSformer", "ViT", "timm-registers"])
def test_half_precision_is_autocast_with_weights_cast_once(name, precision):
    model, clips, logits = make(name)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    numbers = {key: tensor.clone() for key, tensor in before.items()}
    expected, often = run(model, clips, logits, torch.autocast("cpu", DTYPES[precision]))
    kept = {key: tensor.clone() for key, tensor in stts.selections(model).items()}
    found, rarely = run(model, clips, logits, evaluating(model, precision, ""))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(stts.selections(model)[key], tensor) for key, tensor in kept.items())
    linear, scorers = (
        {m.weight.shape for m in module.modules() if type(m) is nn.Linear}
        for module in (model, model.stts)
    )
    weights = linear - scorers
    assert sum(often[shape] for shape in weights) > 0
    assert not any(rarely[shape] for shape in weights)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[key] is tensor for key, tensor in before.items())
    assert all(torch.equal(after[key], tensor) for key, tensor in numbers.items())


def test_training_continues_after_an_evaluation_in_half_precision(tmp_path):
    """DDP's hooks are on the parameters' objects."""
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model, clips, logits = make("MViT")
        stts.set_progress(model, 1.0)
        twin = copy.deepcopy(model)
        for each, evaluates in ((twin, False), (model, True)):
            network = DistributedDataParallel(each.train())
            if evaluates:
                with evaluating(network.eval(), "bfloat16", ""), torch.no_grad():
                    logits(network, clips)
            torch.manual_seed(0)
            network.train()(clips).square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    pairs = zip(model.named_parameters(), twin.parameters())
    assert all(torch.equal(a.grad, b.grad) for (_, a), b in pairs)


def test_an_error_restores_the_weights():
    model = make("MViT")[0]
    weight = model.blocks[1].mlp[0].weight
    with contextlib.suppress(KeyError), evaluating(model, "bfloat16", ""):
        assert model.blocks[1].mlp[0].weight.dtype is torch.bfloat16
        raise KeyError
    assert model.blocks[1].mlp[0].weight is weight and not torch.is_autocast_enabled("cpu")


class Float32Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.body(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_a_layer_outside_autocast_is_refused_by_its_name():
    model = Float32Head()
    message = "PRECISION is 'bfloat16', but this Float32Head calls its layer head outside autocast"
    with pytest.raises(ValueError, match=message), evaluating(model, "bfloat16", ""):
        model(torch.ones(1, 4))
    assert model.head.weight.dtype is torch.float32
    with pytest.raises(RuntimeError, match="shapes"), evaluating(model, "bfloat16", ""):
        model(torch.ones(1, 5))


def test_float32_is_outside_autocast_and_tf32_lasts_as_long_as_the_job():
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16), evaluating(model, "float32", ""):
        assert model(torch.ones(1, 2)).dtype is torch.float32
    before = torch.get_float32_matmul_precision()
    with evaluation.matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    with evaluation.matmul_precision(""):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


@pytest.fixture
def graphs(monkeypatch):
    """Compiles for the backend "eager", and lists the graphs; inductor takes a minute."""
    made, real = [], torch.compile

    def backend(graph, inputs):
        made.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph

    def compile_eagerly(function, mode, dynamic):
        assert mode in ("default", "reduce-overhead") and dynamic is False
        return real(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    return made


@torch.no_grad()
def test_a_compiled_evaluation_gives_eager_numbers(graphs, precision="bfloat16"):
    model, clips, _ = make("MViT")
    clips = torch.cat([clips, clips.flip(0)])
    with evaluating(model, precision, ""):
        expected = model(clips), model(clips[:3])
    kept = stts.selections(model)["time_0"]
    for _ in range(2):  # two validations
        with evaluating(model, precision, "reduce-overhead"):
            torch.testing.assert_close(model(clips), expected[0], rtol=1e-4, atol=1e-4)
            made = len(graphs)
            assert made >= 1
            # The last batch is smaller.
            torch.testing.assert_close(model(clips[:3]), expected[1], rtol=1e-4, atol=1e-4)
            assert torch.equal(stts.selections(model)["time_0"], kept)
            model(clips)
            assert len(graphs) == made
    torch.testing.assert_close(model(clips[:3]), model(clips)[:3], rtol=1e-4, atol=1e-4)
    assert len(graphs) == made


@torch.no_grad()
def test_each_model_has_graphs_of_its_own(graphs):
    """PyTorch keeps 8 of one function."""
    for number in range(10):
        model = nn.Linear(2 + number, 2).eval()
        with evaluating(model, "float32", "default"):
            model(torch.ones(1, 2 + number))
    assert len(graphs) == 10


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    def fail(*args):
        raise OSError("no compiler")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, mode, dynamic: real(f, backend=fail))
    model = nn.Linear(2, 2).eval()
    message = "TEST.COMPILE is 'default', but this Linear cannot be compiled here: .*no compiler"
    refused, context = pytest.raises(ValueError, match="(?s)" + message), torch.no_grad()
    with refused, context, evaluating(model, "float32", "default"):
        model(torch.ones(1, 2))
