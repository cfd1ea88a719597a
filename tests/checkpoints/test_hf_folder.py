"""Selectors go through save_pretrained and from_pretrained, and none is lost on the way."""

import pytest
import torch

import stts_slowfast as stts
from stts_slowfast.checkpoints.hf_folder import read_selectors
from tests.hosts.examples import EXAMPLES, timm_frames

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
    assert "only its selectors were loaded" in str(stts.load_weights(model, folder))
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


@torch.no_grad()
def test_selectors_inside_a_model_come_back(tmp_path):
    """Attached to the backbone, they are saved under its name; and also into the backbone alone."""
    example = EXAMPLES["videomae"]()
    stts.attach(example.model.videomae, **SELECTION)
    for parameter in example.model.videomae.stts.parameters():
        parameter.normal_()
    example.model.save_pretrained(tmp_path)
    logits = example.logits(*example[:2])
    model = type(example.model).from_pretrained(tmp_path).eval()
    stts.attach(model.videomae, **SELECTION)
    stts.load_weights(model, tmp_path)
    assert torch.equal(example.logits(model, example.clips), logits)
    alone = type(example.model.videomae).from_pretrained(tmp_path).eval()
    stts.attach(alone, **SELECTION)
    stts.load_weights(alone, tmp_path)
    own = example.model.videomae.stts.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in alone.stts.state_dict().items())


def test_loading_nothing_is_an_error(saved, tmp_path):
    example, folder = saved("videomae")
    with pytest.raises(ValueError, match=r"selectors space_2, time_0 and this .* has none"):
        stts.load_weights(type(example.model).from_pretrained(folder), folder)
    stts.detach(example.model).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="nothing was loaded"):
        stts.load_weights(example.model, tmp_path / "stock")
    stts.attach(example.model, **SELECTION)
    with pytest.raises(ValueError, match=r"selectors none and this .* has space_2, time_0"):
        stts.load_weights(example.model, tmp_path / "stock")
    uniform = stts.detach(example.model)
    stts.attach(uniform, time={0: 0.5}, time_scorer="uniform")
    assert "neither has selectors with weights" in str(stts.load_weights(uniform, folder / "stock"))


def test_selectors_of_which_tensors_are_missing_are_refused(saved):
    safetensors = pytest.importorskip("safetensors.torch")
    example, folder = saved("videomae")
    state = safetensors.load_file(folder / "model.safetensors")
    value = state.pop("stts.time_0.scorer.network.score.4.bias")
    state["stts.time_0.scorer.network.score.5.bias"] = value
    safetensors.save_file(state, folder / "model.safetensors")
    own = {key: value.clone() for key, value in example.model.state_dict().items()}
    message = r"1 tensors are missing \(stts\.time_0.*score\.4\.bias\); 1 tensors are unexpected"
    with pytest.raises(ValueError, match=message):
        stts.load_weights(example.model, folder)
    assert all(torch.equal(own[key], value) for key, value in example.model.state_dict().items())


def test_a_file_that_fills_a_model_in_part_is_refused(saved):
    """As transformers writes names that the model does not have."""
    example, folder = saved("vivit")
    with pytest.raises(ValueError, match=r"64 missing .*from_pretrained, and its selectors"):
        stts.load_weights(example.model, folder / "model.safetensors")
    loaded = stts.load_weights(example.model, folder / "model.safetensors", strict=False)
    assert len(loaded.missing) == len(loaded.unexpected) == 64


def test_selectors_of_another_part_of_a_model_are_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    towers = torch.nn.ModuleDict({"left": timm_frames().model, "right": timm_frames().model})
    stts.attach(towers["left"], **SELECTION)
    save_file(towers.state_dict(), tmp_path / "model.safetensors")
    stts.detach(towers)
    stts.attach(towers["right"], **SELECTION)
    with pytest.raises(ValueError, match=r"unexpected \(left\.stts\.space_2"):
        stts.load_weights(towers, tmp_path)
