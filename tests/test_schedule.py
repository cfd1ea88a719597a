import copy
import random
import warnings

import pytest
import torch

from stts_slowfast import backbones
from stts_slowfast.annealing import set_progress, sigma, update_schedule
from stts_slowfast.backbones import timesformer
from stts_slowfast.hooks import attach, detach, selections
from stts_slowfast.optimizer_groups import param_groups
from stts_slowfast.schedule import Schedule, backbone_lr
from stts_slowfast.selectors import TemporalSelector
from stts_slowfast.standalone.model import build_model


@pytest.fixture
def model(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    return build_model(tiny_cfg)


def scheduled(model, pretrained=True, lr=1e-3, max_epochs=20, base_lr=1e-3):
    """A schedule beside an optimizer of all parameters."""
    optimizer = torch.optim.SGD(param_groups(model.parameters(), model), lr=lr)
    return Schedule(model, optimizer, max_epochs=max_epochs, pretrained=pretrained, base_lr=base_lr)


def rates(schedule):
    """The rate of each group in ``optimizer.step()``."""
    seen = []
    hook = schedule.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.extend(group["lr"] for group in optimizer.param_groups)
    )
    schedule.optimizer.step()
    hook.remove()
    return seen


def test_sigma_falls_to_zero_or_stays():
    assert [sigma(0.1, "linear", f) for f in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.05, 0.0])
    assert sigma(0.1, "constant", 1.0) == 0.1


def test_progress_reaches_every_selector_and_needs_no_history(model):
    update_schedule(model, 0.75)
    assert [float(s.sigma) for s in model.stts.values()] == pytest.approx([0.025, 0.025])
    update_schedule(model, 0.25)
    assert [float(s.sigma) for s in model.stts.values()] == pytest.approx([0.075, 0.075])


def budgets(model, steps=80, seed=0):
    """Frames and side of the window at each step of a training."""
    grid, found = torch.empty(1, 8, 14, 14, 1), []
    for number in range(steps):
        update_schedule(model, number / steps, seed)
        found.append([module.output_size(grid)[0] for module in model.stts.values()])
    return found


@pytest.fixture
def ranged(tiny_cfg):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = [[0.25, 0.9]], [[0.25, 0.9]]
    return build_model(tiny_cfg)


def test_each_iteration_samples_a_budget_and_reaches_both_ends(ranged):
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


def test_selectors_sample_their_budgets_independently(ranged):
    pairs = {(a - 2, b - 7) for a, b in budgets(ranged)}
    assert len({a - b for a, b in pairs}) > 2


def test_a_range_is_not_tested_before_it_was_sampled_and_then_at_its_high_end(ranged):
    clips = torch.randn(1, 3, 8, 32, 32)
    with pytest.raises(ValueError, match=r'is .*0.25 to 0.9: .*KEEP "\[0.9\]".*set_prog'):
        ranged.eval()(clips)
    update_schedule(ranged, 0.3)
    ranged.eval()(clips)
    assert {key: kept.shape for key, kept in selections(ranged).items()} == {
        "time_0": (1, 3), "space_2": (3, 4)
    }  # fmt: skip
    assert (selections(ranged)["space_2"][:, 2:] == 3).all()


@pytest.mark.parametrize("keep", [0.25, [0.25, 0.9]])
def test_budgets_are_sampled_below_an_upper_bound_that_shrinks_to_keep(tiny_cfg, keep):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.TIME.KEEP, tiny_cfg.STTS.SPACE.KEEP = True, [keep], [keep]
    tiny_cfg.STTS.TEACHER = "mixture"
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
        assert len(set(map(tuple, drawn))) == 5  # what torch.compile has graphs for
    update_schedule(model, 0.0)
    model.eval()  # keeps what a test would
    assert [s.output_size(torch.empty(1, 8, 14, 14, 1))[0] for s in model.stts.values()] == (
        [2, 7] if keep == 0.25 else [7, 13]
    )


def test_windows_shrink_by_their_stride(tiny_cfg):
    tiny_cfg.STTS.ENABLE, tiny_cfg.STTS.SHRINK = True, 0.5
    tiny_cfg.STTS.SPACE.KEEP, tiny_cfg.STTS.SPACE.STRIDE = [0.25], 3
    assert {side for _, side in budgets(build_model(tiny_cfg))} == {14, 7}  # saliency needs all
    tiny_cfg.STTS.TEACHER = "mixture"
    assert {side for _, side in budgets(build_model(tiny_cfg))} == {13, 10, 7}


def test_a_run_logs_that_its_budgets_shrink(tiny_cfg, caplog):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = "uniform"  # learned or not
    for shrink, lines in ((0.25, 1), (0.0, 0)):
        tiny_cfg.STTS.SHRINK = shrink
        caplog.clear()
        with caplog.at_level("INFO"):
            scheduled(build_model(tiny_cfg)).step(0)
        logged = "budget annealing in the first 0.25 of training"
        assert sum(logged in text for text in caplog.messages) == lines


@pytest.mark.parametrize("teacher, budgets", [("mixture", 5), ("both", 2)])
def test_a_compiled_training_has_a_graph_for_each_budget(teacher, budgets):
    stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, num_classes=5)
    model = attach(stock, time={0: 0.25}, space={1: 0.25}, shrink=0.5, teacher=teacher)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # With fullgraph, more graphs than `recompile_limit`, 8, are an error.
    compiled = torch.compile(model.train(), fullgraph=True, backend="eager")
    for number in range(64):
        update_schedule(model, number / 64)
        compiled(torch.randn(2, 3, 8, 32, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == budgets
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
    update_schedule(model, 1.0)
    assert not torch.allclose(model(clips), logits)
    torch.testing.assert_close(detach(model)(clips), logits)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_progress_outside_of_training_is_refused(model, fraction):
    with pytest.raises(ValueError, match="0 to 1"):
        update_schedule(model, fraction)


def test_backbone_is_frozen_then_capped(tiny_cfg):
    node = tiny_cfg.STTS
    limits = {"freeze_epochs": node.FREEZE_BACKBONE_EPOCHS, "cap": node.BACKBONE_LR}
    rates = [
        backbone_lr(lr, epoch, base_lr=1e-3, **limits)
        for lr, epoch in [(1e-3, 2.9), (1e-3, 3.0), (1e-5, 9.0)]
    ]
    assert rates == pytest.approx([0.0, 1e-4, 1e-5])


def test_groups_split_into_backbone_and_scorers(model):
    params = list(model.parameters())
    decayed = [p for p in params if p.dim() > 1]
    rest = [p for p in params if p.dim() <= 1]
    groups = param_groups(
        [
            {"params": decayed, "weight_decay": 0.05, "layer_decay": 0.5, "lr": 5e-4},
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
    optimizer = torch.optim.SGD(groups, lr=1e-3)
    schedule = Schedule(model, optimizer, max_epochs=20, pretrained=True)
    schedule.step(0.0)
    assert rates(schedule) == pytest.approx([0.0, 5e-4, 0.0, 1e-3])
    schedule.step(5.0)  # at most 0.1 of the optimizer's rate, times the layer's decay
    assert rates(schedule) == pytest.approx([5e-5, 5e-4, 1e-4, 1e-3])
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 5e-4, 1e-3, 1e-3]


def test_from_random_weights_everything_learns_at_the_schedules_rate(model, caplog):
    caplog.set_level("INFO")
    schedule = scheduled(model, pretrained=False)
    assert schedule.step(0.0)["backbone_lr"] == 1e-3
    assert rates(schedule) == [1e-3, 1e-3]
    (record,) = caplog.records
    assert "from random weights: everything learns at the scheduled learning rate" in record.message


def test_from_trained_weights_the_papers_recipe_holds_and_is_logged(tiny_cfg, model, caplog):
    caplog.set_level("INFO")
    schedule = scheduled(model, lr=1.0, base_lr=1e-3)
    rate = tiny_cfg.STTS.BACKBONE_LR * 1e-3
    assert schedule.step(10.0) == pytest.approx({"sigma": 0.05, "backbone_lr": rate})
    (record,) = caplog.records
    assert "from trained weights: the backbone is frozen for 3 epochs" in record.message
    assert rates(schedule) == pytest.approx([rate, 1.0])
    assert model.stts["time_0"].sigma == pytest.approx(0.05)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_resumed_run_is_what_it_was(model, pretrained, before):
    """Whether the state is loaded before or after the schedule is made."""
    first = scheduled(model, pretrained)
    first.step(0.0)
    if before:
        optimizer = torch.optim.SGD(param_groups(model.parameters(), model), lr=1.0)
        optimizer.load_state_dict(first.optimizer.state_dict())
        # it resumes from trained weights either way
        second = Schedule(model, optimizer, max_epochs=20, pretrained=True)
    else:
        second = scheduled(model, True, lr=1.0)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step(0.0)
    assert rates(second) == [0.0 if pretrained else 1e-3, 1e-3]


def test_an_optimizer_that_steps_before_its_schedule_is_refused(model):
    schedule = scheduled(model)
    with pytest.raises(ValueError, match=r"call schedule\.step\(epoch\) before each iteration"):
        schedule.optimizer.step()


def test_settings_of_attach_hold_inside_a_wrapper(tiny_cfg):
    more = {"freeze_backbone_epochs": 1.5, "backbone_lr": 0.25}
    wrapped = torch.nn.Module()
    wrapped.module = attach(backbones.build(tiny_cfg), time={0: 0.5}, **more)
    schedule = scheduled(wrapped, lr=1.0, base_lr=0.1)
    assert [schedule.step(epoch)["backbone_lr"] for epoch in (1.4, 1.5)] == [0.0, 0.025]


def test_frozen_backbone_does_not_move(model):
    groups = param_groups(model.parameters(), model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.05)
    Schedule(model, optimizer, max_epochs=20, pretrained=True).step(0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(2, 3, 8, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("stts.") for name in moved)


def test_without_selection_groups_are_not_split(model):
    groups = [{"params": list(model.parameters())}]
    assert param_groups(groups, detach(model)) == groups


@pytest.mark.parametrize("scorer", ["uniform", "random"])
def test_without_a_scorer_that_learns_the_backbone_is_not_frozen(tiny_cfg, scorer):
    tiny_cfg.STTS.ENABLE = True
    tiny_cfg.STTS.TIME.SCORER = tiny_cfg.STTS.SPACE.SCORER = scorer
    schedule = scheduled(build_model(tiny_cfg))
    assert schedule.step(0.0) == {}
    assert rates(schedule) == [1e-3]


def test_a_backbone_that_is_frozen_to_the_end_is_logged(model, caplog):
    for epochs, pretrained in ((4, True), (3, False), (3, True)):
        assert not caplog.records
        scheduled(model, pretrained, max_epochs=epochs).step(0.0)
    assert "FREEZE_BACKBONE_EPOCHS is 3 and SOLVER.MAX_EPOCH 3" in caplog.text


def test_a_learning_rate_that_is_no_number_is_refused(model):
    schedule = scheduled(model)
    schedule.optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match=r"learning rate is nan at epoch 1.5"):
        schedule.step(1.5)


def test_a_model_without_selectors_has_no_progress(tiny_cfg):
    model = build_model(tiny_cfg)
    set_progress(model, 0.5)
    attach(model, tiny_cfg.STTS)
    assert model.stts["time_0"].sigma == pytest.approx(tiny_cfg.STTS.SIGMA)


def test_what_cannot_learn_does_not_begin(tiny_cfg):
    model = attach(backbones.build(tiny_cfg), time={0: 0.5}, sigma=0)
    with pytest.raises(ValueError, match=r"STTS\.SIGMA is 0"):
        param_groups(model.parameters(), model)


def test_a_step_names_a_selector_whose_scores_were_nan(model):
    model.stts["time_0"]._nan_flag.fill_(True)
    with pytest.raises(ValueError, match="STTS time_0: scores hold NaN"):
        scheduled(model).step(1.0)


class Loop:
    """A loop as people write it, on a model whose forward pass is short."""

    def __init__(self, model, optimizer, steps=8):
        self.model, self.optimizer, self.steps = model, optimizer, steps
        self.clips = torch.randn(2, 3, 8, 32, 32)

    def run(self, before=lambda epoch: None, after=lambda: None):
        """Which parameters moved in each step."""
        moved = []
        for number in range(self.steps):
            was = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            before(number / 4)  # four steps an epoch
            self.optimizer.zero_grad()
            self.model(self.clips).square().sum().backward()
            self.optimizer.step()
            after()
            moved.append(
                {n for n, p in self.model.named_parameters() if not torch.equal(p, was[n])}
            )
        return moved


@pytest.mark.parametrize("split", [True, False])
def test_a_scheduler_of_pytorchs_sets_the_rates_and_the_recipe_lowers_them(tiny_cfg, split):
    """Also one that computes its next rate from the last: it never sees ours."""
    model = attach(
        backbones.build(tiny_cfg), time={0: 0.5}, freeze_backbone_epochs=1, backbone_lr=0.25
    )
    params = param_groups(model.named_parameters(), model) if split else model.parameters()
    optimizer = torch.optim.SGD(params, lr=0.01)
    schedule = Schedule(model, optimizer, max_epochs=2, pretrained=True)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    theirs = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    alone = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 8)
    used, wanted = [], []
    optimizer.register_step_pre_hook(
        lambda optimizer, *_: used.append([group["lr"] for group in optimizer.param_groups])
    )

    def both():
        wanted.append(theirs.param_groups[0]["lr"])
        theirs.step()
        cosine.step()
        alone.step()

    moved = Loop(model, optimizer).run(schedule.step, both)
    assert [scorers for _, scorers in used] == pytest.approx(wanted)
    caps = [0.0] * 4 + [min(lr, 0.0025) for lr in wanted[4:]]
    assert [backbone for backbone, _ in used] == pytest.approx(caps)
    kinds = [{name.startswith("stts.") for name in names} for names in moved]
    assert kinds[:4] == [{True}] * 4 and kinds[5] == {True, False}


def test_an_optimizer_with_a_scheduler_is_not_split(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    with pytest.raises(ValueError, match=r"make the optimizer with stts_slowfast\.param_groups"):
        Schedule(model, optimizer, max_epochs=2, pretrained=True)


def test_an_optimizer_without_all_scorers_is_refused(model):
    names = {"stts.time_0.scorer.network.score.4.weight"}
    params = [p for name, p in model.named_parameters() if name not in names]
    with pytest.raises(ValueError, match=r"1 parameters of the scorers .*score\.4\.weight"):
        Schedule(model, torch.optim.SGD(params, lr=1.0), max_epochs=2, pretrained=True)


def test_two_schedules_of_an_optimizer_are_the_last_one(model):
    first = scheduled(model)
    second = Schedule(model, first.optimizer, max_epochs=20, pretrained=True, base_lr=1e-3)
    second.step(5.0)
    assert rates(second) == pytest.approx([1e-4, 1e-3])
    assert [group["lr"] for group in first.optimizer.param_groups] == [1e-3, 1e-3]


def test_a_schedule_that_is_not_its_optimizers_is_refused(model):
    first = scheduled(model)
    second = Schedule(model, first.optimizer, max_epochs=20, pretrained=True)
    second.step(0.0)
    with pytest.raises(ValueError, match="not the optimizer's: another was made"):
        first.step(5.0)
    _, _, copied = copy.deepcopy((model, second.optimizer, second))
    with pytest.raises(ValueError, match="or it is a copy"):
        copied.step(5.0)
    attach(detach(model), time={0: 0.5})
    with pytest.raises(ValueError, match="attached again after"):
        second.step(5.0)


def test_scorers_among_another_models_backbone_are_refused(tiny_cfg, model):
    other = build_model(tiny_cfg)
    optimizer = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=1.0)
    Schedule(model, optimizer, max_epochs=2, pretrained=True)
    with pytest.raises(ValueError, match="split by another model's scorers"):
        Schedule(other, optimizer, max_epochs=2, pretrained=True)


def test_an_optimizer_of_one_rate_is_refused(model):
    with pytest.raises(TypeError, match="LBFGS has one rate for all"):
        Schedule(model, torch.optim.LBFGS(model.parameters()), max_epochs=2, pretrained=True)


def test_rates_are_the_loops_again_after_a_failed_step(model):
    schedule = scheduled(model)
    schedule.step(0.0)
    with pytest.raises(ZeroDivisionError):
        schedule.optimizer.step(lambda: 1 / 0)
    schedule.step(5.0)
    assert rates(schedule) == pytest.approx([1e-4, 1e-3])
    assert [group["lr"] for group in schedule.optimizer.param_groups] == [1e-3, 1e-3]


def test_iterations_are_not_taken_for_epochs(model):
    schedule = scheduled(model, max_epochs=2)
    schedule.step(2.0)
    with pytest.raises(ValueError, match="epoch is 3, but training has 2: count epochs"):
        schedule.step(3)


@pytest.mark.parametrize(
    "more, message",
    [({"max_epochs": 0}, "max_epochs is 0"), ({"max_epochs": float("nan")}, "max_epochs is nan")],
)
def test_a_length_that_is_none_is_refused(model, more, message):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=message):
        Schedule(model, optimizer, pretrained=True, **more)


@pytest.mark.parametrize("epoch", [-1.0, float("nan")])
def test_an_epoch_that_is_none_is_refused(model, epoch):
    with pytest.raises(ValueError, match=r"epoch is .*count from 0"):
        scheduled(model).step(epoch)


def test_progress_alone_does_not_pretend_to_freeze(tiny_cfg, caplog):
    def attached(**more):
        return attach(backbones.build(tiny_cfg), time={0: 0.5}, **more)

    model = attached(freeze_backbone_epochs=1000, backbone_lr=0.0)
    with pytest.raises(ValueError, match=r"freeze_backbone_epochs=1000, backbone_lr=0 cannot be"):
        set_progress(model, 0.5)
    with pytest.raises(ValueError, match="cannot be applied"):
        set_progress(model.eval(), 0.5)  # as from_pretrained leaves it, before model.train()
    model = attached()
    for _ in range(2):
        set_progress(model, 0.5)
    assert (
        caplog.text.count("freeze_backbone_epochs=3, the default, needs a stts_slowfast.Schedule")
        == 1
    )
    caplog.clear()
    set_progress(attached(freeze_backbone_epochs=0), 0.5)
    set_progress(attached(time_scorer="uniform"), 0.5)
    assert not caplog.records


def warned(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run()
    messages = [str(each.message) for each in caught if "stts" in str(each.message)]
    assert all("call step(epoch) of stts_slowfast.Schedule" in text for text in messages)
    return len(messages)


def test_a_loop_without_a_schedule_keeps_what_is_asked_for_and_is_warned_once():
    stock = timesformer.TimeSformer(32, 8, 8, 16, 2, 2, num_classes=5)
    model = attach(stock, time={0: (0.25, 0.5)}, space={1: 0.25}, shrink=0.5)

    def run():
        for _ in range(2):
            model(torch.randn(1, 3, 8, 32, 32))
            assert selections(model)["time_0"].shape == (1, 4)
            assert [s.sigma for s in model.stts.values()] == [0.2, 0.2]

    assert warned(run) == 1
    model.eval()(torch.randn(1, 3, 8, 32, 32))
    assert selections(model)["time_0"].shape == (1, 4)


def test_a_compiled_loop_without_a_schedule_is_warned_as_well():
    selector = TemporalSelector(4, 0, (0.25, 0.5)).train()
    torch._dynamo.reset()
    compiled = torch.compile(selector, backend="eager", fullgraph=True)
    grid = torch.randn(1, 8, 2, 2, 4)
    assert warned(lambda: [compiled(grid), compiled(grid)]) == 1
    assert selector.kept.shape == (1, 4)


def test_a_model_with_a_schedule_is_not_warned(model):
    schedule = scheduled(model)
    schedule.step(0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(1, 3, 8, 32, 32))
    model.stts["time_0"].scheduled = False
    with warnings.catch_warnings(), torch.no_grad():  # nothing is trained
        warnings.simplefilter("error")
        model(torch.randn(1, 3, 8, 32, 32))
