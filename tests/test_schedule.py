import copy
import random

import pytest
import torch

from stts_slowfast import backbones
from stts_slowfast.backbones import timesformer
from stts_slowfast.config import Settings
from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.schedule import backbone_lr, begin, param_groups, set_progress, sigma, step
from stts_slowfast.standalone.model import build_model


@pytest.fixture
def model(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    return build_model(tiny_cfg)


def test_sigma_falls_to_zero_or_stays():
    assert [sigma(0.1, "linear", f) for f in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.05, 0.0])
    assert sigma(0.1, "constant", 1.0) == 0.1


def test_progress_reaches_every_selector_and_needs_no_history(model):
    set_progress(model, 0.75)
    assert [float(s.sigma) for s in model.stts.values()] == pytest.approx([0.025, 0.025])
    set_progress(model, 0.25)
    assert [float(s.sigma) for s in model.stts.values()] == pytest.approx([0.075, 0.075])


def budgets(model, steps=80, seed=0):
    """Frames and side of the window at each step of a training."""
    grid, found = torch.empty(1, 8, 14, 14, 1), []
    for number in range(steps):
        set_progress(model, number / steps, seed)
        found.append([module.goes_on(grid)[0] for module in model.stts.values()])
    return found


@pytest.fixture
def ranged(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = [[0.25, 0.9]], [[0.25, 0.9]]
    return build_model(tiny_cfg)


def test_each_iteration_draws_a_budget_and_reaches_both_ends(ranged):
    frames, sides = (set(drawn) for drawn in zip(*budgets(ranged)))
    assert frames == {2, 3, 4, 5, 6, 7} and sides == {7, 8, 9, 10, 11, 12, 13}


def test_budgets_follow_from_seed_and_progress_alone(ranged):
    drawn = budgets(ranged)
    torch.manual_seed(1)
    random.seed(1)
    torch.rand(3)
    assert budgets(copy.deepcopy(ranged)) == drawn
    assert budgets(ranged, seed=1) != drawn
    # the same in every process, of whatever hash seed, and in every version
    assert drawn[:4] == [[4, 13], [6, 13], [3, 9], [7, 7]]


def test_selectors_draw_their_budgets_apart(ranged):
    pairs = {(a - 2, b - 7) for a, b in budgets(ranged)}
    assert len({a - b for a, b in pairs}) > 2


def test_a_range_is_refused_before_anything_was_drawn_and_else_evaluated_at_its_high_end(ranged):
    clips = torch.randn(1, 3, 8, 32, 32)
    for training in (True, False):
        with pytest.raises(ValueError, match=r'is .*0.25 to 0.9: .*KEEP "\[0.9\]".*set_prog'):
            ranged.train(training)(clips)
    set_progress(ranged, 0.3)
    ranged.eval()(clips)
    assert {key: kept.shape for key, kept in selections(ranged).items()} == {
        "time_0": (1, 3), "space_2": (3, 4)
    }  # fmt: skip
    assert (selections(ranged)["space_2"][:, 2:] == 3).all()


@pytest.mark.parametrize("keep", [0.25, [0.25, 0.9]])
def test_budgets_are_drawn_up_to_a_widest_that_shrinks_to_what_is_kept(tiny_cfg, keep):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = True, [keep], [keep]
    at_once = budgets(build_model(tiny_cfg), 800)
    tiny_cfg.STTS.SHRINK = 0.5
    model = build_model(tiny_cfg)
    drawn = budgets(model, 800)
    assert drawn[400:] == at_once[400:] and drawn != budgets(model, 800, seed=1)
    assert all(a >= b for pair in zip(drawn, at_once) for a, b in zip(*pair))
    assert [8, 14] in drawn[:100] and max(drawn[300:400]) < [8, 14]
    if keep == 0.25:
        assert [2, 7] in drawn[:100]
        widest = [max(drawn[first : first + 67]) for first in range(0, 400, 67)]
        assert widest == sorted(widest, reverse=True) and len(set(map(tuple, widest))) == 4
        assert len(set(map(tuple, drawn))) == 7  # what torch.compile has graphs for
    set_progress(model, 0.0)
    model.eval()  # keeps what a test would
    assert [s.goes_on(torch.empty(1, 8, 14, 14, 1))[0] for s in model.stts.values()] == (
        [2, 7] if keep == 0.25 else [7, 13]
    )


def test_windows_shrink_by_their_stride(tiny_cfg):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.SHRINK = True, 0.5
    tiny_cfg.STTS.SPACE.KEEP, tiny_cfg.STTS.SPACE.STRIDE = [0.25], 3
    assert {side for _, side in budgets(build_model(tiny_cfg))} == {13, 10, 7}


def test_a_run_says_that_its_budgets_shrink(tiny_cfg, caplog):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = "uniform"  # learned or not
    for shrink, lines in ((0.25, 1), (0.0, 0)):
        tiny_cfg.STTS.SHRINK = shrink
        caplog.clear()
        with caplog.at_level("INFO"):
            begin([{}], True, build_model(tiny_cfg), 10)
        assert sum("first 0.25 of training budgets" in text for text in caplog.messages) == lines


def test_a_compiled_training_has_a_graph_for_each_budget():
    stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, num_classes=5)
    model = attach(stock, time={0: 0.25}, space={1: 0.25}, shrink=0.5)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # With fullgraph, what comes behind `recompile_limit`, 8, is an error.
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    for number in range(64):
        set_progress(model, number / 64)
        compiled(torch.randn(2, 3, 8, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    compiled(torch.randn(1, 3, 8, 32, 32))  # the last batch of an epoch
    model.eval()
    for batch in (4, 3, 2):
        compiled(torch.randn(batch, 3, 8, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 8


def test_the_widest_budget_is_the_model_without_selectors(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    model = build_model(tiny_cfg)
    clips = torch.randn(2, 3, 8, 32, 32)
    for selector in model.stts.values():
        selector.set_budget(0.0, 1.0)
    logits = model.train()(clips)
    loss = logits.square().sum()
    loss.backward()  # reaches every parameter, as DDP asks
    assert all(parameter.grad is not None for parameter in model.parameters())
    set_progress(model, 1.0)
    assert not torch.allclose(model(clips), logits)
    torch.testing.assert_close(detach(model)(clips), logits)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_progress_outside_of_training_is_refused(model, fraction):
    with pytest.raises(ValueError, match="lies in 0 to 1"):
        set_progress(model, fraction)


def test_backbone_is_frozen_then_capped(tiny_cfg):
    rates = [
        backbone_lr(lr, epoch, Settings.of_node(tiny_cfg.STTS), 1e-3)
        for lr, epoch in [(1e-3, 2.9), (1e-3, 3.0), (1e-5, 9.0)]
    ]
    assert rates == pytest.approx([0.0, 1e-4, 1e-5])


def test_groups_split_into_backbone_and_scorers(tiny_cfg, model):
    params = list(model.parameters())
    decayed = [p for p in params if p.dim() > 1]
    rest = [p for p in params if p.dim() <= 1]
    groups = param_groups(
        [
            {"params": decayed, "weight_decay": 0.05, "layer_decay": 0.5},
            {"params": rest, "weight_decay": 0.0},
        ],
        model,
    )
    assert [(g["backbone"], g["weight_decay"]) for g in groups] == [
        (True, 0.05), (False, 0.05), (True, 0.0), (False, 0.0)
    ]  # fmt: skip
    scorers = {id(p) for p in model.stts.parameters()}
    assert all((id(p) in scorers) != g["backbone"] for g in groups for p in g["params"])
    assert sum(len(g["params"]) for g in groups) == len(params)
    begin(groups, True, model, tiny_cfg.SOLVER.MAX_EPOCH)
    step(model, groups, 1e-3, 0.0, tiny_cfg)
    assert [g["lr"] for g in groups] == pytest.approx([0.0, 5e-4, 0.0, 1e-3])


def test_from_random_weights_everything_learns_at_the_schedules_rate(tiny_cfg, model, caplog):
    caplog.set_level("INFO")
    groups = param_groups([{"params": list(model.parameters())}], model)
    begin(groups, False, model, tiny_cfg.SOLVER.MAX_EPOCH)
    assert step(model, groups, 1e-3, 0.0, tiny_cfg)["backbone_lr"] == 1e-3
    assert [g["lr"] for g in groups] == [1e-3, 1e-3]
    (record,) = caplog.records
    assert "from random weights: everything learns at the schedule's rate" in record.message


def test_from_trained_weights_the_papers_recipe_holds_and_is_told(tiny_cfg, model, caplog):
    caplog.set_level("INFO")
    groups = param_groups([{"params": list(model.parameters())}], model)
    begin(groups, True, model, tiny_cfg.SOLVER.MAX_EPOCH)
    (record,) = caplog.records
    assert "from trained weights: the backbone's rate is 0 for 3 epochs" in record.message
    half = tiny_cfg.SOLVER.MAX_EPOCH / 2
    rate = tiny_cfg.STTS.BACKBONE_LR * tiny_cfg.SOLVER.BASE_LR
    assert step(model, groups, 1.0, half, tiny_cfg) == pytest.approx(
        {"sigma": 0.05, "backbone_lr": rate}
    )
    assert [g["lr"] for g in groups] == pytest.approx([rate, 1.0])
    assert float(model.stts["time_0"].sigma) == pytest.approx(0.05)


@pytest.mark.parametrize("trained", [True, False])
def test_a_resumed_run_is_what_it_was(tiny_cfg, model, trained):
    def optimizer():
        groups = param_groups([{"params": list(model.parameters())}], model)
        return torch.optim.AdamW(groups, lr=1.0)

    first = optimizer()
    begin(first.param_groups, trained, model, tiny_cfg.SOLVER.MAX_EPOCH)
    second = optimizer()
    second.load_state_dict(first.state_dict())
    begin(
        second.param_groups, True, model, tiny_cfg.SOLVER.MAX_EPOCH
    )  # it resumes from trained weights either way
    step(model, second.param_groups, 1e-3, 0.0, tiny_cfg)
    assert [g["lr"] for g in second.param_groups] == [0.0 if trained else 1e-3, 1e-3]


def test_a_run_that_has_not_begun_is_refused(tiny_cfg, model):
    groups = param_groups([{"params": list(model.parameters())}], model)
    with pytest.raises(ValueError, match=r"call schedule.begin\(groups, trained, model, epochs\)"):
        step(model, groups, 1e-3, 0.0, tiny_cfg)


def test_what_attach_was_given_holds_whatever_a_config_says(tiny_cfg):
    """Also behind a wrapper, as DDP is one."""
    more = {"freeze_backbone_epochs": 1.5, "backbone_lr": 0.25}
    model = attach(backbones.build(tiny_cfg), time={0: 0.5}, **more)
    groups = param_groups([{"params": list(model.parameters())}], model)
    begin(groups, True, model, 20)
    del tiny_cfg["STTS"]
    wrapped = torch.nn.Module()
    wrapped.module = model
    rates = [step(wrapped, groups, 1.0, epoch, tiny_cfg)["backbone_lr"] for epoch in (1.4, 1.5)]
    assert rates == [0.0, 0.25 * tiny_cfg.SOLVER.BASE_LR]


def test_frozen_backbone_does_not_move(tiny_cfg, model):
    groups = param_groups([{"params": list(model.parameters())}], model)
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.05)
    begin(optimizer.param_groups, True, model, tiny_cfg.SOLVER.MAX_EPOCH)
    step(model, optimizer.param_groups, 1e-2, 0.0, tiny_cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 3, 8, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("stts.") for name in moved)


def test_without_selection_groups_stay_as_they_are(tiny_cfg, model):
    groups = [{"params": list(model.parameters())}]
    assert param_groups(groups, detach(model)) is groups


@pytest.mark.parametrize("scorer", ["uniform", "random"])
def test_without_a_scorer_that_learns_the_backbone_is_not_held_back(tiny_cfg, scorer):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = scorer
    model = build_model(tiny_cfg)
    groups = param_groups([{"params": list(model.parameters())}], model)
    begin(groups, True, model, tiny_cfg.SOLVER.MAX_EPOCH)
    assert step(model, groups, 1e-3, 0.0, tiny_cfg) == {}
    assert [group["lr"] for group in groups] == [1e-3]


def test_a_backbone_that_is_frozen_to_the_end_is_told(tiny_cfg, model, caplog):
    for epochs, trained in ((4, True), (3, False), (3, True)):
        assert not caplog.records
        tiny_cfg.SOLVER.MAX_EPOCH = epochs
        groups = param_groups([{"params": list(model.parameters())}], model)
        begin(groups, trained, model, tiny_cfg.SOLVER.MAX_EPOCH)
    assert "FREEZE_BACKBONE_EPOCHS is 3 and SOLVER.MAX_EPOCH 3" in caplog.text


def test_a_learning_rate_that_is_no_number_is_refused(tiny_cfg, model):
    with pytest.raises(ValueError, match=r"learning rate is nan at epoch 1.5"):
        step(model, [], float("nan"), 1.5, tiny_cfg)


def test_a_model_without_selectors_has_no_progress(tiny_cfg):
    model = build_model(tiny_cfg)
    set_progress(model, 0.5)
    attach(model, tiny_cfg.STTS)
    assert float(model.stts["time_0"].sigma) == pytest.approx(tiny_cfg.STTS.SIGMA)


def test_what_cannot_learn_does_not_begin(tiny_cfg):
    model = attach(backbones.build(tiny_cfg), time={0: 0.5}, sigma=0)
    with pytest.raises(ValueError, match=r"STTS\.SIGMA is 0"):
        param_groups([{"params": list(model.parameters())}], model)


def test_a_step_names_a_selector_whose_scores_were_nan(tiny_cfg, model):
    model.stts["time_0"].nan_scores = torch.tensor(True)
    with pytest.raises(ValueError, match="STTS time_0: scores hold NaN"):
        step(model, [], 0.1, 1.0, tiny_cfg)
