"""The noise level and the budgets of a model's selectors at a point of training."""

import logging
import random
from collections.abc import Iterable
from typing import Any

from torch import nn

from stts_slowfast.config import Settings
from stts_slowfast.frozen_gradients import turn_on
from stts_slowfast.hooks import all_selectors
from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.selectors import Selector
from stts_slowfast.topk import SMALLEST_SIGMA

logger = logging.getLogger(__name__)

# torch.compile makes a graph for each budget, and gives up after 8: five of training, and room for
# validation and for smaller last batches of both.
SHRINK_STEPS = 4


def sigma(initial: float, decay: str, fraction: float) -> float:
    """Noise level after a fraction of training.

    Args:
        initial: ``STTS.SIGMA``.
        decay: ``STTS.SIGMA_DECAY``: ``linear`` falls to 0, ``constant`` stays.
        fraction: 0 to 1 of training done.
    """
    return initial * (1.0 - fraction) if decay == "linear" else initial


def budget_widening(fraction: float, shrink: float, seed: int, intermediate: bool = True) -> float:
    """How far a budget is widened, 0 (``KEEP``) to 1 (all tokens), after a fraction of training.

    It is sampled uniformly below an upper bound that decays from 1 to 0. Narrow budgets
    teach the scorers what to keep; wide ones keep a backbone from unlearning the rest.

    Args:
        fraction: 0 to 1 of training done.
        shrink: ``STTS.SHRINK``.
        seed: of the run.
        intermediate: whether there are steps between 0 and 1. Without them it is 1 less and less
            often: for saliency, which teaches only if all tokens are kept.
    """
    if fraction >= shrink:
        return 0.0
    draw = random.Random(f"{seed} {fraction!r}")
    if not intermediate:
        return float(draw.random() < 1.0 - fraction / shrink)
    upper = round(SHRINK_STEPS * (1.0 - fraction / shrink))
    return draw.randint(0, upper) / SHRINK_STEPS


def update_schedule(model: nn.Module, fraction: float, seed: int = 0) -> float | None:
    """Sets sigma and budget of every selector for a point of training.

    Both depend only on the arguments, so that all processes have the same, and a resumed run the
    same as before. For a range, each selector samples its own budget uniformly; during
    budget annealing all selectors widen theirs by the same :func:`budget_widening`; if that keeps
    all tokens, saliency teaches (``STTS.TEACHER``). A budget between the two keeps only a part of
    the tokens, which has no whole saliency, so it is then never sampled.

    Args:
        model: with selectors, wrapped (DDP) or not; a model without is left as it is.
        fraction: 0 to 1 of training done.
        seed: of the run.

    Returns:
        Sigma; None if there is no selector.

    Raises:
        ValueError: for a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction!r}: give the share of training done, 0 to 1")
    noise = None
    selectors = all_selectors(model)
    intermediate = not any(selector.learns_from_saliency for selector in selectors)
    for selector in selectors:
        selector.sigma = noise = sigma(selector.initial_sigma, selector.sigma_decay, fraction)
        sample = random.Random(f"{seed} {fraction!r} {selector.key}").random()
        selector.set_budget(sample, budget_widening(fraction, selector.shrink, seed, intermediate))
        selector.scheduled = True
    return noise


def keep_all_for_saliency(model: nn.Module) -> None:
    """Widens the budgets of a model that saliency teaches to all tokens, until the next
    :func:`update_schedule`.
    """
    selectors = all_selectors(model)
    if any(selector.learns_from_saliency for selector in selectors):
        for selector in selectors:
            selector.keep_all()


def check_training(
    settings: Settings, selectors: Iterable[Selector], held_back: bool = True
) -> None:
    """Checks, as training begins, that learned scorers would get a gradient.

    Args:
        settings: of a model.
        selectors: of the model; those whose scorers do not learn are not checked.
        held_back: whether the backbone's weights are trained, so that it is frozen at first.

    Raises:
        ValueError: naming the key by which their gradient would be exactly 0.
    """
    learned = [s for s in selectors if any(p.requires_grad for p in s.parameters())]
    of_saliency = [selector for selector in learned if selector.teacher == "saliency"]
    if of_saliency and not (settings.shrink or (held_back and settings.freeze_backbone_epochs)):
        raise ValueError(
            f"saliency alone teaches {of_saliency[0].key} (STTS.TEACHER {settings.teacher}), in "
            "iterations that keep all tokens, and there would be none: set STTS.SHRINK above 0, or "
            "start from trained weights, in a loop with a Schedule, with "
            "STTS.FREEZE_BACKBONE_EPOCHS above 0"
        )
    if len(of_saliency) == len(learned):
        return
    if settings.sigma <= SMALLEST_SIGMA:
        raise ValueError(
            f"STTS.SIGMA is {settings.sigma:g}: in training the scorers would get no gradient and "
            f"learn nothing; give more than {SMALLEST_SIGMA:g}, or scorers that do not learn"
        )
    if (settings.operator, settings.gradient, settings.num_samples) == ("perturbed", "exact", 1):
        raise ValueError(
            "STTS.NUM_SAMPLES is 1: a single sample is its own baseline, so in training the "
            "scorers would get no gradient and learn nothing; give at least 2, or STTS.GRADIENT "
            "diagonal, or STTS.OPERATOR subset"
        )


def reset(model: nn.Module) -> None:
    """Gives every selector KEEP (of a range, its high end) at the initial sigma."""
    for selector in all_selectors(model):
        selector.reset()


def set_progress(model: nn.Module, fraction: float, seed: int = 0) -> float | None:
    """Sets sigma and budgets for a point of training, in loops without a :class:`Schedule`.

    For a range, each selector samples its own budget uniformly; during budget annealing
    (``STTS.SHRINK``) all widen theirs alike. The backbone's learning rate is left to the loop.

    Args:
        model: with selectors, wrapped (DDP) or not; a model without is left as it is.
        fraction: 0 to 1 of training done.
        seed: of the run; the same in all processes.

    Returns:
        Sigma; None if there is no selector.

    Raises:
        ValueError: for a fraction outside 0 to 1; if scorers would get no gradient; for a model
            whose ``freeze_backbone_epochs`` or ``backbone_lr`` only a :class:`Schedule` can apply.
            If they are the defaults, it warns.
    """
    _check_no_schedule_needed(model)
    turn_on(model)
    return update_schedule(model, fraction, seed)


def _check_no_schedule_needed(model: nn.Module) -> None:
    defaults = Settings.from_kwargs()
    for module in modules_with_selectors(model).values():
        stts: Any = module.stts
        settings = stts.settings
        if not any(True for _ in stts.parameters()):
            continue
        check_training(settings, stts.values(), held_back=False)
        asked = {
            "freeze_backbone_epochs": settings.freeze_backbone_epochs > 0,
            "backbone_lr": settings.backbone_lr < 1,
        }
        values = {name: getattr(settings, name) for name, has_effect in asked.items() if has_effect}
        text = ", ".join(f"{name}={value:g}" for name, value in values.items())
        if any(value != getattr(defaults, name) for name, value in values.items()):
            raise ValueError(
                f"{text} cannot be applied by set_progress, which knows no optimizer: make a "
                "stts_slowfast.Schedule(model, optimizer, ...) and call its step(epoch) instead, "
                "or attach with freeze_backbone_epochs=0, backbone_lr=1"
            )
        if values and not getattr(stts, "warned", False):
            stts.warned = True
            logger.warning(
                "STTS: %s, the default, needs a stts_slowfast.Schedule: without one a trained "
                "backbone learns from the first step (as with freeze_backbone_epochs=0)",
                text,
            )
