"""The optimizer, the schedule and the log of SlowFast's training loop, on stand-ins."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stts_slowfast.pyslowfast import checkpoint_loading, run_state, training


@pytest.fixture
def optim():
    """SlowFast's optimizer module, in short."""

    def construct_optimizer(model, cfg):
        params = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD([{"params": params, "layer_decay": 0.5}], lr=cfg.SOLVER.BASE_LR)

    def set_lr(optimizer, new_lr):
        for group in optimizer.param_groups:
            group["lr"] = new_lr * group["layer_decay"]

    run_state.set_training(None)
    module = SimpleNamespace(
        construct_optimizer=construct_optimizer,
        get_epoch_lr=lambda cur_epoch, cfg: cfg.SOLVER.BASE_LR,
        set_lr=set_lr,
    )
    training.wrap_optimizer(module)
    training.wrap_optimizer(module)
    return module


def step(optim, optimizer, epoch, cfg):
    """One iteration; the rates of the groups in the optimizer's step."""
    optim.set_lr(optimizer, optim.get_epoch_lr(epoch, cfg))
    rates = []
    hook = optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.extend(group["lr"] for group in optimizer.param_groups)
    )
    optimizer.step()
    hook.remove()
    return rates


def test_configs_without_the_node_build_stock_models(registry, cfg, optim):
    del cfg["STTS"]
    model = registry.get("Transformer")(cfg)
    assert not hasattr(model, "stts")
    assert "backbone" not in optim.construct_optimizer(model, cfg).param_groups[0]


def test_scorers_and_backbone_have_their_own_rates_and_sigma_decays(registry, cfg, optim):
    cfg.merge_from_list(["SOLVER.MAX_EPOCH", 10, "SOLVER.BASE_LR", 0.8])
    model = registry.get("Transformer")(cfg)
    checkpoint_loading.mark_pretrained(model)
    optimizer = optim.construct_optimizer(model, cfg)
    assert [group["backbone"] for group in optimizer.param_groups] == [True, False]
    assert step(optim, optimizer, 1.5, cfg) == pytest.approx([0.0, 0.4])
    assert model.stts["time_0"].sigma == pytest.approx(0.085)
    assert step(optim, optimizer, 5.0, cfg) == pytest.approx([0.04, 0.4])
    assert model.stts["space_1"].sigma == pytest.approx(0.05)


def test_sigma_reaches_the_model_inside_ddp(registry, cfg, optim):
    wrapped = nn.DataParallel(registry.get("Transformer")(cfg))
    optimizer = optim.construct_optimizer(wrapped, cfg)
    step(optim, optimizer, cfg.SOLVER.MAX_EPOCH / 2, cfg)
    assert wrapped.module.stts["time_0"].sigma == pytest.approx(0.05)


def test_a_model_without_its_selectors_gets_no_optimizer(registry, cfg, optim):
    stock = registry.get("Transformer").__wrapped__(cfg)
    with pytest.raises(RuntimeError, match="has none: build it with this config"):
        optim.construct_optimizer(stock, cfg)


def test_disabled_optimizers_are_stock(registry, cfg, optim):
    cfg.STTS.ENABLE = False
    optimizer = optim.construct_optimizer(registry.get("Transformer")(cfg), cfg)
    step(optim, optimizer, 0.0, cfg)
    (group,) = optimizer.param_groups
    assert "backbone" not in group
    assert group["lr"] == cfg.SOLVER.BASE_LR * 0.5


@pytest.mark.parametrize("trained", [True, False])
def test_a_resumed_run_is_frozen_and_capped_as_before(registry, cfg, optim, trained):
    model = registry.get("Transformer")(cfg)
    if trained:
        checkpoint_loading.mark_pretrained(model)
    first = optim.construct_optimizer(model, cfg)
    step(optim, first, 0.0, cfg)
    state = first.state_dict()
    model = registry.get("Transformer")(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    optimizer.load_state_dict(state)
    checkpoint_loading.mark_pretrained(model)
    assert (step(optim, optimizer, 0.0, cfg)[0] == 0.0) == trained
    assert set(state) == {"state", "param_groups"}


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_is_trained_once_a_checkpoint_was_loaded_into_it(wrapped):
    checkpoint = SimpleNamespace(
        load_checkpoint=lambda path, model, data_parallel=True: 7,
        normal_to_sub_bn=lambda *states: states,
    )
    checkpoint_loading.wrap_load_checkpoint(checkpoint)
    model = nn.Linear(1, 1)
    outer = nn.DataParallel(model) if wrapped else model
    assert not checkpoint_loading.is_pretrained(outer)
    assert checkpoint.load_checkpoint("x.pyth", outer, wrapped) == 7
    assert checkpoint_loading.is_pretrained(outer) and checkpoint_loading.is_pretrained(model)


def test_the_start_of_a_run_is_logged_once(registry, cfg, optim, caplog):
    caplog.set_level("INFO")
    optimizer = optim.construct_optimizer(model := registry.get("Transformer")(cfg), cfg)
    for epoch in (0.0, 0.5):
        step(optim, optimizer, epoch, cfg)
    assert caplog.text.count("from random weights: everything learns") == 1
    del model


def test_training_lines_gain_sigma_and_the_backbone_rate(registry, cfg, optim):
    lines = []
    log = SimpleNamespace(log_json_stats=lambda stats, output_dir=None: lines.append(stats))
    training.wrap_log(log)
    log.log_json_stats({"_type": "train_iter_"})
    model = registry.get("Transformer")(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    epoch = cfg.SOLVER.MAX_EPOCH / 2
    step(optim, optimizer, epoch, cfg)
    stats = {"_type": "train_epoch"}
    log.log_json_stats(stats, output_dir="x")
    log.log_json_stats({"_type": "val_epoch"})
    assert stats == {"_type": "train_epoch"}
    assert lines[0] == {"_type": "train_iter_"}
    assert float(lines[1]["sigma"]) == pytest.approx(0.05)
    assert float(lines[1]["backbone_lr"]) == pytest.approx(cfg.SOLVER.BASE_LR)
    assert lines[2] == {"_type": "val_epoch"}


def test_a_loss_is_not_looked_at_before_the_scores(registry, cfg, optim):
    """SlowFast says that the loss is NaN; the selector is what a user can look for."""

    def check_nan_losses(loss):
        raise RuntimeError("NaN losses")

    misc = SimpleNamespace(check_nan_losses=check_nan_losses)
    training.wrap_losses(misc)
    with pytest.raises(RuntimeError, match="NaN losses"):
        misc.check_nan_losses(torch.tensor(torch.nan))
    model = registry.get("Transformer")(cfg)
    optimizer = optim.construct_optimizer(model, cfg)
    step(optim, optimizer, 1.0, cfg)
    with pytest.raises(RuntimeError, match="NaN losses"):
        misc.check_nan_losses(torch.tensor(torch.nan))
    model.stts["space_1"]._nan_flag.fill_(True)
    with pytest.raises(ValueError, match="STTS space_1: scores hold NaN"):
        misc.check_nan_losses(torch.tensor(torch.nan))


def test_a_head_that_the_checkpoint_did_not_fill_is_new_also_in_a_resumed_run(registry, cfg, optim):
    """SlowFast makes the optimizer before it loads."""

    def load_checkpoint(
        path_to_checkpoint,
        model,
        data_parallel=True,
        optimizer=None,
        inflation=True,
        convert_from_caffe2=False,
        epoch_reset=False,
        clear_name_pattern=(),
    ):
        resumes = path_to_checkpoint == "resume"
        state = checkpoint["model"] if resumes else pretrained
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        state = {key: value for key, value in state.items() if value.shape == shapes[key]}
        model.load_state_dict(state, strict=False)
        if resumes:
            optimizer.load_state_dict(checkpoint["optimizer"])

    module = SimpleNamespace(load_checkpoint=load_checkpoint, normal_to_sub_bn=lambda a, b: a)
    checkpoint_loading.wrap_load_checkpoint(module)
    cfg.TRAIN.CHECKPOINT_FILE_PATH = "fine-tune"

    def begin(path):
        model = registry.get("Transformer")(cfg)
        model.head = nn.Linear(8, 3)
        optimizer = optim.construct_optimizer(model, cfg)
        module.load_checkpoint(path, model, True, optimizer)
        return model, optimizer

    pretrained = registry.get("Transformer")(cfg).state_dict()
    pretrained = {key: value for key, value in pretrained.items() if "stts." not in key}
    pretrained["head.weight"] = torch.zeros(5, 8)
    model, optimizer = begin("fine-tune")
    rates = step(optim, optimizer, 0.0, cfg)
    assert rates == pytest.approx([0.0, cfg.SOLVER.BASE_LR * 0.5])
    assert optimizer.param_groups[1]["new"] == ["head.weight", "head.bias"]
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    _, resumed = begin("resume")
    assert step(optim, resumed, 1.0, cfg) == rates
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
