"""Optimizer groups: nothing is lost in any form, and what is new is not the backbone's."""

import pytest
import torch
from torch import nn

import stts_slowfast as stts
from stts_slowfast import backbones
from stts_slowfast.optimizer_groups import as_groups, tensors


@pytest.fixture
def model(tiny_cfg):
    return stts.attach(backbones.build(tiny_cfg), time={0: 0.5}, space={2: 0.6})


def named(model):
    return list(model.named_parameters())


FORMS = {
    "list": lambda model: list(model.parameters()),
    "generator": lambda model: model.parameters(),
    "names": lambda model: model.named_parameters(),
    "tuple": lambda model: tuple(model.parameters()),
    "group": lambda model: [{"params": list(model.parameters())}],
    "group of a generator": lambda model: [{"params": model.parameters()}],
    "group of names": lambda model: [{"params": model.named_parameters()}],
    "one group": lambda model: {"params": model.parameters()},
    "groups in a generator": lambda model: (
        {"params": part, "weight_decay": 0.1} for part in (named(model)[:40], named(model)[40:])
    ),
    "single tensors": lambda model: [{"params": p} for p in model.parameters()],
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_that_optimizers_take_is_split_alike(model, form):
    groups = stts.param_groups(FORMS[form](model), model)
    scorers = {id(p) for p in model.stts.parameters()}
    for group in groups:
        assert all((id(p) in scorers) != group["backbone"] for p in tensors(group))
    given = [id(p) for group in groups for p in tensors(group)]
    assert sorted(given) == sorted(id(p) for p in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))
    if "names" in form:
        own = dict(model.named_parameters())
        for group in optimizer.param_groups:
            assert all(own[n] is p for n, p in zip(group["param_names"], group["params"]))


def test_groups_of_a_living_optimizer_keep_their_names(model):
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    split = stts.param_groups(optimizer.param_groups, model)
    own = dict(model.named_parameters())
    assert [group["backbone"] for group in split] == [True, False]
    for group in split:
        assert all(own[n] is p for n, p in zip(group["param_names"], group["params"]))


@pytest.mark.parametrize(
    "params", [{"lr": 1.0}, [{"params": {torch.zeros(1)}}], ["a"], [torch.zeros(1), {"params": []}]]
)
def test_what_optimizers_do_not_take_is_refused(params):
    with pytest.raises(TypeError, match="give "):
        as_groups(params)


def test_without_the_scorers_there_are_no_groups(model):
    backbone = [p for name, p in model.named_parameters() if not name.startswith("stts.")]
    with pytest.raises(ValueError, match="none of the scorers' parameters is among these"):
        stts.param_groups(backbone, model)


def test_frozen_scorers_are_refused_as_sigma_0_is(model):
    model.stts["time_0"].requires_grad_(False)
    with pytest.raises(ValueError, match=r"10 parameters .*requires_grad False \(stts\.time_0\."):
        stts.param_groups(model.parameters(), model)


def test_a_head_that_is_named_new_learns_with_the_scorers(model):
    head = dict(model.named_parameters())["head.1.weight"]
    groups = stts.param_groups(nn.DataParallel(model).parameters(), model, new=["head"])
    assert [group["backbone"] for group in groups] == [True, False]
    assert any(p is head for p in groups[1]["params"])
    assert groups[1]["new"] == ["head.1.weight", "head.1.bias"] and "new" not in groups[0]
    with pytest.raises(ValueError, match="new names 'hed'"):
        stts.param_groups(model.parameters(), model, new=["hed"])


@pytest.fixture
def videomae(tmp_path):
    """A VideoMAE from a folder, with a head for other classes."""
    from tests.hosts.examples import videomae

    model = videomae().model
    model.save_pretrained(tmp_path)

    def load(**more):
        return type(model).from_pretrained(tmp_path, num_labels=7, **more)

    return load


def new_names(groups):
    return [name for group in groups for name in group.get("new", ())]


@pytest.mark.parametrize("wrap", [False, True])
def test_a_head_for_other_classes_than_the_folders_is_new(videomae, wrap):
    model = videomae(ignore_mismatched_sizes=True)
    stts.attach(model.videomae if wrap else model, time={0: 0.5})
    groups = stts.param_groups(model.parameters(), model)
    assert sorted(new_names(groups)) == ["classifier.bias", "classifier.weight"]
    # With all of it in the folder nothing is.
    model.save_pretrained(model.name_or_path)
    again = type(model).from_pretrained(model.name_or_path)
    stts.attach(again, time={0: 0.5})
    assert not new_names(stts.param_groups(again.parameters(), again))


def test_a_copy_of_a_model_warns_that_new_parameters_are_unknown(videomae, caplog):
    import copy

    model = copy.deepcopy(videomae(ignore_mismatched_sizes=True))
    stts.attach(model, time={0: 0.5})
    stts.param_groups(model.parameters(), model, new=["classifier"])
    assert "it is unknown which parameters" in caplog.text


def test_a_head_that_the_checkpoint_does_not_fill_is_new(tiny_cfg, model):
    state = {key: value for key, value in model.state_dict().items() if "stts." not in key}
    state["head.1.weight"] = state["head.1.weight"][:3]
    assert stts.load_weights(model, state, strict=False).mismatched
    assert new_names(stts.param_groups(model.parameters(), model)) == ["head.1.weight"]
