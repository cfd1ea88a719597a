"""Selection beside an adapter of peft: what learns, what is saved with it, what comes back."""

import copy

import pytest
import torch

import stts_slowfast as stts
from tests.hosts.examples import videomae

peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

from stts_slowfast.integrations.transformers_trainer import SelectionCallback  # noqa: E402

SELECTION = {"time": {0: 0.5}, "space": {2: 0.6}, "fused_attention": False, "shrink": 0}


@pytest.fixture(params=["model", "inside"])
def make(request):
    """Attached models with the same backbone, and scorers of their own."""
    stock = videomae().model

    def make():
        model = copy.deepcopy(stock)
        stts.attach(model.videomae if request.param == "inside" else model, **SELECTION)
        return model

    return make


def adapted(model, saved=("stts",)):
    config = peft.LoraConfig(target_modules=["query", "value"], modules_to_save=list(saved))
    return peft.get_peft_model(model, config)


def test_adapters_and_scorers_learn_from_the_first_step(make):
    model = adapted(make(), ("stts", "classifier")).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = stts.Schedule(model, optimizer, max_epochs=8, pretrained=True)  # 3 are frozen
    backbone = [p for g in optimizer.param_groups if g["backbone"] for p in g["params"]]
    assert backbone and not any(p.requires_grad for p in backbone)
    learn = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(2):  # lora_B starts at 0, and lora_A then gets no gradient
        schedule.step(number / 2)
        optimizer.zero_grad()
        model(torch.randn(2, 8, 3, 32, 32)).logits.square().sum().backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= learn
    for part in ("lora_A", "lora_B", "classifier.modules_to_save", "time_0.", "space_2."):
        assert any(part in name for name in moved), part


def test_scorers_that_peft_has_frozen_are_refused(make):
    model = adapted(make(), ())
    with pytest.raises(ValueError, match=r"requires_grad False.*modules_to_save=\['stts'\]"):
        stts.param_groups(model.parameters(), model)
    with pytest.raises(ValueError, match="requires_grad False"):
        stts.Schedule(model, torch.optim.SGD(model.parameters(), lr=1.0), max_epochs=1,
                      pretrained=True)  # fmt: skip


@torch.no_grad()
def test_scorers_are_saved_with_the_adapter_and_come_back(make, tmp_path):
    model = adapted(make()).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.normal_()
    model.save_pretrained(tmp_path)
    clips = torch.randn(2, 8, 3, 32, 32)
    logits, kept = model(clips).logits, stts.selections(model)
    assert SelectionCallback(model).model is model
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(clips).logits, logits)
    for other in (make().eval(), adapted(make()).eval()):  # lora_B is 0: the adapter does nothing
        assert "only its selectors were loaded" in str(stts.load_weights(other, tmp_path))
        assert torch.equal(other(clips).logits, logits)
        assert all(torch.equal(kept[key], value) for key, value in stts.selections(other).items())
