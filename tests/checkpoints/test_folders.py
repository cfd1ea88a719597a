"""Selectors go through save_pretrained and from_pretrained, and none is lost on the way."""

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast.checkpoints.folders import read_selectors
from tests.hosts.examples import EXAMPLES

SELECTION = {"time": {0: 0.5}, "space": {2: 0.6}, "fused_attention": False}


@pytest.fixture
def saved(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")

    def save(name, **how):
        example = EXAMPLES[name]()
        stts.attach(example.model, **SELECTION)
        for parameter in example.model.stts.parameters():
            parameter.data.normal_()
        example.model.save_pretrained(tmp_path, **how)
        return example, tmp_path

    return save


@torch.no_grad()
@pytest.mark.parametrize("name", ["videomae", "vivit", "vjepa2", "timesformer-divided"])
def test_a_model_comes_back_with_its_selectors(saved, name):
    example, folder = saved(name)
    model = type(example.model).from_pretrained(folder).eval()
    stts.attach(model, **SELECTION)
    assert "the selectors were loaded" in str(stts.load_weights(model, folder))
    assert torch.equal(example.logits(model, example.clips), example.logits(*example[:2]))


def test_selectors_in_several_shards(saved):
    example, folder = saved("videomae", max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    own = example.model.stts.state_dict(prefix="stts.")
    state = read_selectors(folder)
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize(
    "selection, message",
    [
        ({"time": {1: 0.5}}, "has the selectors space_2, time_0 and this .* has time_1"),
        ({"time": {0: 0.5}}, "has the selectors space_2, time_0 and this .* has time_0"),
    ],
)
def test_other_selectors_than_the_saved_are_refused(saved, selection, message):
    example, folder = saved("videomae")
    model = type(example.model).from_pretrained(folder)
    stts.attach(model, **selection)
    with pytest.raises(ValueError, match=message):
        stts.load_weights(model, folder)


def test_a_folder_without_weights_is_named(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        stts.load_weights(torch.nn.Linear(1, 1), tmp_path)
