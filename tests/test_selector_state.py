"""What a selector remembers between forward passes survives what models go through."""

import copy
import pickle

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.annealing import update_schedule
from stts_slowfast.selectors import TemporalSelector


@pytest.fixture
def model(tiny_cfg):
    return stts.attach(backbones.build(tiny_cfg), time={0: 0.5}, space={2: 0.6}, shrink=0.0)


def sigmas(model):
    return [float(s._sigma_tensor) for s in model.stts.values()]


def test_selectors_bring_no_buffers(tiny_cfg, model):
    """DDP sends buffers in each forward pass, and stock MViT has none: a rank that evaluates alone
    would wait for ever."""
    assert list(model.buffers()) == list(backbones.build(tiny_cfg).buffers()) == []
    assert set(model.stts.state_dict()) == {name for name, _ in model.stts.named_parameters()}


def test_sigma_survives_a_start_on_meta(tiny_cfg, model):
    """As FSDP2 is started: meta, attach, to_empty, load."""
    with torch.device("meta"):
        empty = stts.attach(backbones.build(tiny_cfg), time={0: 0.5}, space={2: 0.6}, shrink=0.0)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert sigmas(empty) == pytest.approx([0.2, 0.2])
    update_schedule(empty, 0.5)
    empty.to("meta").to_empty(device="cpu").load_state_dict(model.state_dict())
    assert sigmas(empty) == pytest.approx([0.1, 0.1])
    empty(torch.randn(1, 3, 8, 32, 32)).square().sum().backward()
    assert empty.stts["time_0"].scorer.network.score[4].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "bf16"])
def test_sigma_survives_copies_and_dtypes(model, how):
    update_schedule(model, 0.5)
    other = model.bfloat16() if how == "bf16" else how(model)
    assert sigmas(other) == pytest.approx([0.1, 0.1])
    update_schedule(other, 0.75)
    assert sigmas(other) == pytest.approx([0.05, 0.05])
    assert sigmas(model) == pytest.approx([0.05, 0.05] if how == "bf16" else [0.1, 0.1])


def test_state_on_another_device_follows_the_scores():
    """FSDP2 and accelerate move parameters alone."""
    selector = TemporalSelector(4, 0, 0.5, sigma=0.3).train()
    update_schedule(selector, 0.0)
    selector._make_state(torch.device("meta"))
    selector(torch.randn(1, 4, 2, 2, 4))
    assert selector._sigma_tensor.device.type == "cpu"
    assert float(selector._sigma_tensor) == pytest.approx(0.3)


def test_a_change_of_sigma_compiles_nothing_anew():
    selector = TemporalSelector(4, 0, 0.5, sigma=0.3).train()
    grid = torch.randn(1, 4, 2, 2, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(selector, fullgraph=True, backend="eager")
    outputs = []
    for number in range(4):
        update_schedule(selector, number / 4)
        outputs.append(compiled(grid))
        torch.testing.assert_close(outputs[-1], selector(grid))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(outputs[0], outputs[3])


@pytest.fixture
def device(monkeypatch):
    """Makes this machine's memory pass for a device's, which is not looked at."""
    for module in ("selector_state", "topk"):
        monkeypatch.setattr(f"stts_slowfast.{module}.is_cpu", lambda tensor: False)


def test_state_stays_where_it_is(device):
    """A captured CUDA graph reads and writes the addresses that it has seen."""
    selector = TemporalSelector(4, 0, 0.5).train()
    grid = torch.randn(1, 4, 2, 2, 4)
    with torch.inference_mode():
        selector(grid)
    state = (selector._sigma_tensor, selector._nan_flag, selector._nan_flag_host)
    addresses = [tensor.data_ptr() for tensor in state]
    update_schedule(selector, 0.5)
    selector(grid)
    selector(grid * torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity"):
        selector.raise_on_nan()
    selector(grid)
    selector.to("cpu").float()
    now = (selector._sigma_tensor, selector._nan_flag, selector._nan_flag_host)
    assert [tensor.data_ptr() for tensor in now] == addresses
    assert not state[1] and not state[2]


class Scores(torch.nn.Module):
    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, *_):
        return self.scores


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_are_one_case_on_a_cpu(value):
    selector = TemporalSelector(4, 0, 0.5)
    selector.scorer = Scores(torch.tensor([[0.1, value, 0.3, 0.2]]))
    for mode in (True, False):
        with pytest.raises(ValueError, match="STTS time_0: scores hold NaN or infinity"):
            selector.train(mode)(torch.randn(1, 4, 2, 2, 4))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_scores_that_are_not_finite_are_one_case_on_a_device(device, value):
    selector = TemporalSelector(4, 0, 0.5)
    selector.scorer = Scores(torch.tensor([[0.1, value, 0.3, 0.2]]))
    selector(torch.randn(1, 4, 2, 2, 4))
    with pytest.raises(ValueError, match="STTS time_0: scores hold NaN or infinity"):
        selector.raise_on_nan()


def test_a_schedule_raises_for_a_device_without_waiting_for_it(device):
    """By the second call at the latest: the first sends for the flag. A compiled forward pass does
    not, and NaN of it is found all the same."""
    selector = TemporalSelector(4, 0, 0.5)
    model = torch.nn.ModuleList([selector])
    stts.hooks.raise_on_nan(model, wait=False)
    selector._nan_flag.fill_(True)
    stts.hooks.raise_on_nan(model, wait=False)
    with pytest.raises(ValueError, match="STTS time_0: scores hold NaN or infinity"):
        stts.hooks.raise_on_nan(model, wait=False)
    stts.hooks.raise_on_nan(model, wait=False)
    stts.hooks.raise_on_nan(model)
