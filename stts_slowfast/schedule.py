"""What changes while training runs: the noise of the selectors and the backbone's learning rate.

A training loop calls `param_groups` when it makes its optimizer, `begin` when its weights are
loaded, and `step` before every iteration.
"""

import logging
import math
import random
from collections.abc import Iterator

from torch import nn

from stts_slowfast.config import Settings, check_training
from stts_slowfast.hooks import raise_on_nan, settings_of
from stts_slowfast.selectors import WHOLE, Selector

logger = logging.getLogger(__name__)

# torch.compile makes a graph for each budget, and gives up after 8.
SHRINK_STEPS = 6


def sigma(initial: float, decay: str, fraction: float) -> float:
    """Noise level after a fraction of training.

    Args:
        initial: ``STTS.SIGMA``.
        decay: ``STTS.SIGMA_DECAY``: ``linear`` goes to 0, ``constant`` stays.
        fraction: 0 to 1 of training done.
    """
    return initial * (1.0 - fraction) if decay == "linear" else initial


def width(fraction: float, shrink: float, seed: int, between: bool = True) -> float:
    """How far a budget is from what it shrinks to, 0 to 1, after a fraction of training.

    Drawn, all steps as likely, up to a widest that shrinks from 1 to 0. The narrow ones tell the
    scorers what to choose, the wide ones keep the backbone from unlearning what it cannot see yet.

    Args:
        fraction: 0 to 1 of training done.
        shrink: ``STTS.SHRINK``.
        seed: of the draw, the run's.
        between: whether there are steps between 0 and 1. Without, it is 1 the more rarely: for
            saliency, which teaches only when all tokens pass.
    """
    if fraction >= shrink:
        return 0.0
    draw = random.Random(f"{seed} {fraction!r}")
    if not between:
        return float(draw.random() < 1.0 - fraction / shrink)
    widest = round(SHRINK_STEPS * (1.0 - fraction / shrink))
    return draw.randint(0, widest) / SHRINK_STEPS


def set_progress(model: nn.Module, fraction: float, seed: int = 0) -> float | None:
    """Sets every selector's sigma, and its budget, at this point of training.

    Both depend on nothing but the arguments: all processes have the same, and a resumed run is
    where it was. Of a range each selector draws its own budget, all sizes of it as likely; while
    budgets shrink, all go on by as much more than that as :func:`width` says; if all tokens pass,
    saliency teaches (``STTS.TEACHER``).

    Args:
        model: with selectors, wrapped (DDP) or not; a model without is left as it is.
        fraction: 0 to 1 of training done.
        seed: of the budgets, the run's.

    Returns:
        That sigma; None where there is no selector.

    Raises:
        ValueError: for a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction!r}: the share of training done lies in 0 to 1")
    noise = None
    for module in model.modules():
        if isinstance(module, Selector):
            noise = sigma(module.initial_sigma, module.sigma_decay, fraction)
            module.sigma.fill_(noise)
            draw = random.Random(f"{seed} {fraction!r} {module.key}").random()
            between = module.teacher == "mixture"
            module.set_budget(draw, width(fraction, module.shrink, seed, between))
    return noise


def let_all_pass(model: nn.Module) -> None:
    """Widens the budget of selectors that saliency teaches to all that arrives, until the next
    :func:`set_progress`: while only they learn there is nothing else for an iteration to do.
    """
    for module in model.modules():
        if isinstance(module, Selector) and module.teacher != "mixture":
            module.wide = WHOLE


def backbone_lr(lr: float, epoch: float, settings: Settings, base_lr: float) -> float:
    """The rate of a backbone that is held back, where the scorers' is ``lr`` (paper section 4.1).

    Args:
        lr: what SlowFast's schedule gives for this epoch.
        epoch: exact epoch, a fraction of it included.
        settings: ``model.stts.settings``.
        base_lr: ``SOLVER.BASE_LR``.
    """
    if epoch < settings.freeze_backbone_epochs:
        return 0.0
    return min(lr, settings.backbone_lr * base_lr)


def param_groups(optimizer_groups: list[dict], model: nn.Module) -> list[dict]:
    """Splits each optimizer group into the backbone's part and the scorers' part.

    Args:
        optimizer_groups: groups as optimizers take them, ``params`` a list of parameters.
        model: with selectors or without.

    Returns:
        Groups with the keys they had, and ``backbone``: whether they hold the backbone's
        parameters. Empty parts are left out. Where no scorer learns (``uniform``, ``random``, no
        selector at all), there is nothing to hold the backbone back for: the groups are returned
        as they are.

    Raises:
        ValueError: for settings by which the scorers would get no gradient, however it begins.
    """
    scorers = {id(parameter) for parameter in _scorer_parameters(model)}
    if not scorers:
        return optimizer_groups
    check_training(settings_of(model))
    groups = []
    for group in optimizer_groups:
        for backbone in (True, False):
            params = [p for p in group["params"] if (id(p) not in scorers) == backbone]
            if params:
                groups.append({**group, "params": params, "backbone": backbone})
    return groups


def begin(groups: list[dict], trained: bool, model: nn.Module, epochs: float) -> None:
    """Decides, once a run, whether the backbone is held back, and says so on one line; on another
    that budgets shrink, where they do.

    It is where the backbone is trained and the scorers are not: the paper's recipe is one of
    fine-tuning. From random weights everything learns at the schedule's rate. The decision is
    stored in the groups as ``held_back``, so that the optimizer's state has it; groups that have it
    already, which is a resumed run, stay what they are.

    Args:
        groups: of :func:`param_groups`, after a resumed optimizer state was loaded.
        trained: whether the run starts from trained weights.
        model: with selectors, where groups say so.
        epochs: of the whole training.

    Raises:
        ValueError: for settings by which the scorers would get no gradient.
    """
    shrink = max((m.shrink for m in model.modules() if isinstance(m, Selector)), default=0.0)
    if shrink:
        logger.info(
            "STTS: in the first %g of training budgets are drawn, from KEEP to a widest that "
            "shrinks from all tokens to it (STTS.SHRINK; 0 for KEEP alone, its memory and speed)",
            shrink,
        )
    if not any("backbone" in group for group in groups):
        return
    settings = settings_of(model)
    resumed = all("held_back" in group for group in groups)
    held_back = any(group["held_back"] for group in groups) if resumed else bool(trained)
    check_training(settings, held_back)
    for group in groups:
        group["held_back"] = held_back
    origin = (
        "as this run began" if resumed else f"from {'trained' if trained else 'random'} weights"
    )
    if not held_back:
        logger.info(
            "STTS, %s: everything learns at the schedule's rate; STTS.FREEZE_BACKBONE_EPOCHS and "
            "STTS.BACKBONE_LR are for fine-tuning (TRAIN.CHECKPOINT_FILE_PATH)",
            origin,
        )
        return
    logger.info(
        "STTS, %s: the backbone's rate is 0 for %g epochs (STTS.FREEZE_BACKBONE_EPOCHS), then at "
        "most %g of SOLVER.BASE_LR (STTS.BACKBONE_LR); the scorers' is the schedule's",
        origin,
        settings.freeze_backbone_epochs,
        settings.backbone_lr,
    )
    if settings.freeze_backbone_epochs >= epochs:
        logger.warning(
            "STTS.FREEZE_BACKBONE_EPOCHS is %g and SOLVER.MAX_EPOCH %g: only scorers will learn",
            settings.freeze_backbone_epochs,
            epochs,
        )


def step(model: nn.Module, groups: list[dict], lr: float, epoch: float, cfg) -> dict[str, float]:
    """Sets what belongs to this iteration: every selector's sigma and every group's rate.

    Args:
        model: with selectors, wrapped (DDP) or not.
        groups: ``optimizer.param_groups``, from :func:`param_groups` and :func:`begin`; each rate
            is multiplied by the group's ``layer_decay``, as SlowFast does.
        lr: the schedule's rate.
        epoch: exact epoch, a fraction of it included.
        cfg: with ``SOLVER.BASE_LR``, ``SOLVER.MAX_EPOCH`` and ``RNG_SEED``; what the node or the
            plain arguments said is in the model (``model.stts.settings``).

    Returns:
        What to log: ``sigma`` and ``backbone_lr``; nothing where the model has no scorer that
        learns.

    Raises:
        ValueError: where ``lr`` is not finite, a selector had NaN scores in the iteration before,
            or :func:`begin` has not been called.
    """
    raise_on_nan(model)  # the loss of that iteration was read: the device has nothing left to do
    if not math.isfinite(lr):
        raise ValueError(f"the learning rate is {lr} at epoch {epoch:.3f}: look at SOLVER.*")
    undecided = [group for group in groups if "backbone" in group and "held_back" not in group]
    if undecided:
        raise ValueError(
            "nobody has said whether this run starts from trained weights: call "
            "schedule.begin(groups, trained, model, epochs) before the first iteration"
        )
    held_back = any(group.get("held_back") for group in groups)
    backbone = lr
    if held_back:
        backbone = backbone_lr(lr, epoch, settings_of(model), cfg.SOLVER.BASE_LR)
    for group in groups:
        rate = backbone if group.get("backbone") else lr
        group["lr"] = rate * group.get("layer_decay", 1.0)
    noise = set_progress(model, min(epoch / cfg.SOLVER.MAX_EPOCH, 1.0), cfg.RNG_SEED)
    if held_back and not backbone:
        let_all_pass(model)
    learns = any(True for _ in _scorer_parameters(model))
    return {"sigma": noise, "backbone_lr": backbone} if learns else {}


def _scorer_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Selector):
            yield from module.parameters()
