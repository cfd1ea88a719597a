"""The schedule and the parameter groups are SlowFast's; numbers below were computed by SlowFast."""

import copy

import pytest
import torch

from stts_slowfast.checkpoints import load_weights
from stts_slowfast.standalone import optim
from stts_slowfast.standalone.config import get_cfg
from stts_slowfast.standalone.model import build_model


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.COSINE_END_LR = 1e-4, 1e-6
    cfg.SOLVER.WARMUP_START_LR, cfg.SOLVER.WARMUP_EPOCHS = 1e-6, 3.0
    cfg.SOLVER.MAX_EPOCH = 20
    return cfg


@pytest.mark.parametrize(
    ("after_warmup", "epoch", "lr"),
    [
        (True, 0.0, 1e-06),
        (True, 0.25, 9.25e-06),
        (True, 2.99, 9.967e-05),
        (True, 3.0, 0.0001),
        (True, 3.01, 9.999991547659536e-05),
        (True, 10.125, 6.29430048082996e-05),
        (True, 19.9, 1.0084521023263909e-06),
        (False, 0.25, 8.800401912277018e-06),
        (False, 3.0, 9.460482294732421e-05),
        (False, 10.125, 4.9528132223198906e-05),
        (False, 19.9, 1.0061066921578009e-06),
    ],
)
def test_cosine_is_slowfasts(cfg, after_warmup, epoch, lr):
    cfg.SOLVER.COSINE_AFTER_WARMUP = after_warmup
    assert optim.lr_at(epoch, cfg) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.01), (1.0, 0.055), (3.99, 0.1), (4, 0.01), (7.5, 0.01), (9.9, 0.001)]
)
def test_steps_are_slowfasts(cfg, epoch, lr):
    cfg.SOLVER.LR_POLICY, cfg.SOLVER.BASE_LR = "steps_with_relative_lrs", 0.1
    cfg.SOLVER.STEPS, cfg.SOLVER.LRS = [0, 4, 8], [1, 0.1, 0.01]
    cfg.SOLVER.WARMUP_EPOCHS, cfg.SOLVER.WARMUP_START_LR = 2.0, 0.01
    assert optim.lr_at(epoch, cfg) == pytest.approx(lr, rel=1e-12)


def test_rates_grow_with_the_number_of_machines(cfg):
    cfg.SOLVER.BASE_LR_SCALE_NUM_SHARDS, cfg.NUM_SHARDS = True, 4
    before = [optim.lr_at(epoch, cfg) for epoch in (0.5, 7.0)]
    optim.scale_lr_by_shards(cfg)
    after = [optim.lr_at(epoch, cfg) for epoch in (0.5, 7.0)]
    assert after == pytest.approx([4 * lr for lr in before])


def _names(model, groups):
    names = {id(parameter): name for name, parameter, _ in optim.slowfast_parameters(model)}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_parameters_come_in_slowfasts_order_and_shapes(golden, version):
    fixture = golden(f"slowfast_mvit_{version}")  # its weights lie in SlowFast's order
    listed = optim.slowfast_parameters(build_model(fixture.cfg()))
    found = [(name, shape) for name, _, shape in listed]
    assert found == [(name, value.shape) for name, value in fixture.weights.items()]


def test_biases_and_norms_do_not_decay_but_the_class_token_does(tiny_cfg):
    tiny_cfg.SOLVER.ZERO_WD_1D_PARAM, tiny_cfg.SOLVER.WEIGHT_DECAY = True, 0.05
    tiny_cfg.MVIT.ZERO_DECAY_POS_CLS = False
    model = build_model(tiny_cfg)
    groups = optim.groups(model, tiny_cfg)
    decay, zero = _names(model, groups)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert decay[:2] == ["cls_token", "pos_embed_spatial"]  # (1, 1, C) in SlowFast: not 1-D
    assert {"norm.weight", "norm.bias", "blocks.0.attn.qkv.bias"} <= set(zero)


def test_positions_do_not_decay_if_asked(tiny_cfg):
    tiny_cfg.MVIT.ZERO_DECAY_POS_CLS = True
    model = build_model(tiny_cfg)
    _, zero = _names(model, optim.groups(model, tiny_cfg))
    stem = [f"pos_embed_{x}" for x in ("spatial", "temporal", "class")]
    assert zero == ["cls_token", *stem]


def test_layers_learn_the_slower_the_earlier(tiny_cfg):
    tiny_cfg.SOLVER.LAYER_DECAY = 0.5
    tiny_cfg.MVIT.ZERO_DECAY_POS_CLS = False
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg)  # 4 blocks
    decay = {}
    for names, group in zip(
        _names(model, optim.groups(model, tiny_cfg)), optim.groups(model, tiny_cfg)
    ):
        decay.update(dict.fromkeys(names, group["layer_decay"]))
    assert decay["cls_token"] == decay["patch_embed.proj.weight"] == 0.5**5
    assert decay["blocks.0.norm1.weight"] == 0.5**4
    assert decay["blocks.3.mlp.fc1.bias"] == 0.5
    assert decay["head.projection.weight"] == 1.0
    assert {decay[name] for name in decay if name.startswith("stts.")} == {1.0}


def test_selectors_have_groups_of_their_own(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg)
    groups = optim.build_optimizer(model, tiny_cfg).param_groups
    for names, group in zip(_names(model, groups), groups):
        assert {name.startswith("stts.") for name in names} == {not group["backbone"]}


@pytest.mark.parametrize("method", ["sgd", "adam", "adamw", "mt_adamw"])
def test_optimizer_state_goes_to_slowfasts_shapes_and_back(tiny_cfg, method):
    tiny_cfg.SOLVER.OPTIMIZING_METHOD = method
    tiny_cfg.MVIT.ZERO_DECAY_POS_CLS = False
    model = build_model(tiny_cfg)
    optimizer = optim.build_optimizer(model, tiny_cfg)
    model(torch.randn(2, 3, 8, 32, 32)).square().sum().backward()
    optimizer.step()
    saved = copy.deepcopy(optim.optimizer_state(optimizer, model))
    tensors = [value for value in saved["state"][0].values() if torch.is_tensor(value)]
    assert tensors[-1].shape == (1, 1, 16)  # of the class token

    other = optim.build_optimizer(model, tiny_cfg)
    optim.load_optimizer_state(other, saved, "x.pyth")
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_state_of_another_optimizer_is_refused(tiny_cfg):
    optimizer = optim.build_optimizer(build_model(tiny_cfg), tiny_cfg)
    state = optimizer.state_dict()
    state["param_groups"] = state["param_groups"][:1]
    with pytest.raises(ValueError, match=r"x\.pyth holds the state .*CHECKPOINT_EPOCH_RESET"):
        optim.load_optimizer_state(optimizer, state, "x.pyth")


def test_state_of_another_kind_of_optimizer_is_refused(tiny_cfg):
    model = build_model(tiny_cfg)
    tiny_cfg.SOLVER.OPTIMIZING_METHOD = "adamw"
    state = optim.build_optimizer(model, tiny_cfg).state_dict()
    tiny_cfg.SOLVER.OPTIMIZING_METHOD = "sgd"
    with pytest.raises(ValueError, match=r"x\.pyth .*another optimizer than SGD"):
        optim.load_optimizer_state(optim.build_optimizer(model, tiny_cfg), state, "x.pyth")


def test_a_head_that_a_checkpoint_does_not_fill_is_new_also_after_a_resumption(tiny_cfg):
    """And an older state, which names nothing new, fits as it did."""
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.MODEL.NUM_CLASSES = 4
    pretrained = build_model(tiny_cfg).state_dict()
    tiny_cfg.MODEL.NUM_CLASSES = 7
    model = build_model(tiny_cfg)
    old = optim.build_optimizer(model, tiny_cfg).state_dict()
    load_weights(model, pretrained, strict=False)
    optimizer = optim.build_optimizer(model, tiny_cfg)
    new = [name for group in optimizer.param_groups for name in group.get("new", ())]
    assert sorted(new) == ["head.projection.bias", "head.projection.weight"]
    resumed = build_model(tiny_cfg)
    load_weights(resumed, model.state_dict())
    for state in (optimizer.state_dict(), old):
        other = optim.build_optimizer(resumed, tiny_cfg, state)
        optim.load_optimizer_state(other, state, "x.pyth")
        assert [len(g["params"]) for g in other.param_groups] == [
            len(g["params"]) for g in state["param_groups"]
        ]
