"""Training in which scorers would learn nothing is refused; saliency teaches while it can."""

import pytest
import torch
from torch.nn import functional as F

from stts_slowfast.annealing import check_training, set_progress
from stts_slowfast.backbones.timesformer import TimeSformer
from stts_slowfast.hooks import all_selectors, attach, settings_of
from stts_slowfast.optimizer_groups import param_groups
from stts_slowfast.schedule import STEPS_WITHOUT_GRADIENT, Schedule

CLIPS, LABELS = torch.randn(2, 3, 4, 16, 16), torch.tensor([0, 1])
MIXTURE = {"teacher": "mixture", "operator": "perturbed"}
SALIENCY = {"teacher": "saliency", "shrink": 0.0}
TOKENS = {"time": None, "tokens": {1: 0.5}, "shrink": 0.0}
NO_ITERATION = "in iterations that keep all tokens, and there would be none"


def attached(**settings):
    torch.manual_seed(0)
    kind = "joint_space_time" if "tokens" in settings else "divided_space_time"
    stock = TimeSformer(16, 4, 4, 16, 2, 2, num_classes=3, attention_type=kind)
    return attach(stock, **{"time": {0: 0.5}, **settings}).train()


def is_taught(model):
    return any(bool(p.grad.any()) for p in model.stts.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({**MIXTURE, "sigma": 0.0}, "SIGMA is 0: in training the scorers would get no gradient"),
        ({**MIXTURE, "sigma": 1e-4}, "SIGMA is 0.0001"),
        ({**MIXTURE, "num_samples": 1}, "NUM_SAMPLES is 1: a single sample is its own baseline"),
        ({"teacher": "both", "sigma": 0.0}, "SIGMA is 0"),
        ({**SALIENCY, "freeze_backbone_epochs": 0.0}, NO_ITERATION),
        (
            {**TOKENS, "freeze_backbone_epochs": 0.0},
            rf"tokens_1 \(STTS.TEACHER both\), {NO_ITERATION}",
        ),
    ],
)
def test_training_in_which_nothing_would_learn_is_refused(settings, message):
    model = attached(**settings)
    with pytest.raises(ValueError, match=message):
        check_training(settings_of(model), all_selectors(model))
    model.eval()(CLIPS)  # which has no use for the key


@pytest.mark.parametrize(
    "settings",
    [
        {**MIXTURE, "num_samples": 1, "gradient": "diagonal"},
        {**MIXTURE, "num_samples": 1, "operator": "subset"},
        {"teacher": "saliency", "sigma": 0.0},
        {**TOKENS, "sigma": 0.0},  # saliency alone teaches single tokens
        {**TOKENS, "tokens_scorer": "norm", "time": {0: 0.5}, "freeze_backbone_epochs": 0.0},
        {**SALIENCY, "time_scorer": "uniform", "freeze_backbone_epochs": 0.0},
    ],
)
def test_settings_that_only_scorers_of_another_kind_need_are_not_asked_for(settings):
    model = attached(**settings)
    check_training(settings_of(model), all_selectors(model))


@pytest.mark.parametrize("settings", [SALIENCY, TOKENS])
def test_progress_without_a_freeze_is_refused_if_only_a_freeze_would_teach(settings):
    with pytest.raises(ValueError, match=NO_ITERATION):
        set_progress(attached(**settings), 0.0)


def trained(model, names, epochs, **more):
    """The model after a step in each of the epochs, and whether each taught the scorers."""
    parameters = [p for name, p in model.named_parameters() if name.startswith(names)]
    optimizer = torch.optim.AdamW(param_groups(parameters, model, **more), lr=1e-3)
    schedule = Schedule(model, optimizer, max_epochs=10, pretrained=True)
    found = []
    for epoch in epochs:
        schedule.step(epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(CLIPS), LABELS).backward()
        found.append((is_taught(model), all(s.taught for s in model.stts.values())))
        optimizer.step()
    return found


@pytest.mark.parametrize("names", [("stts.",), ("stts.", "head.")])
@pytest.mark.parametrize("settings", [SALIENCY, TOKENS])
def test_saliency_teaches_in_the_frozen_epochs_of_a_backbone_that_no_optimizer_has(settings, names):
    model = attached(**settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(names))
    assert trained(model, names, [0.0, 2.9, 3.0]) == [(True, True)] * 2 + [(False, False)]


def test_a_backbone_that_never_learns_sees_kept_tokens_after_the_freeze():
    model = attached(teacher="both", shrink=0.0, backbone_lr=0.0)
    assert trained(model, "", [0.0, 3.0], new=["head"]) == [(True, True), (True, False)]


# --- scorers without a gradient -------------------------------------------------------------------


def steps(schedule, count, before_scorers=0):
    for number in range(count):
        schedule.step(5.0)
        schedule.optimizer.zero_grad()
        # The head alone has a gradient, as of images that no block sees.
        features = schedule.model.head(torch.randn(2, 16))
        logits = schedule.model(CLIPS) if number >= before_scorers else features
        F.cross_entropy(logits, LABELS).backward()
        schedule.optimizer.step()


def scheduled(model):
    optimizer = torch.optim.SGD(param_groups(model.parameters(), model), lr=1e-3)
    return Schedule(model, optimizer, max_epochs=10, pretrained=True)


def test_scorers_in_evaluation_are_refused():
    schedule = scheduled(attached().eval())
    steps(schedule, STEPS_WITHOUT_GRADIENT - 1)
    with pytest.raises(ValueError, match=r"no scorer had a gradient in 10 steps.*model.eval\(\)"):
        steps(schedule, 1)


def test_some_steps_may_be_without_scorers():
    steps(scheduled(attached()), 2 * STEPS_WITHOUT_GRADIENT, STEPS_WITHOUT_GRADIENT - 1)
