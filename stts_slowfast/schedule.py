"""What changes while training runs: the noise and budgets of selectors, the backbone's rate.

A training loop makes a :class:`Schedule` beside its optimizer, and calls ``step`` before every
iteration.
"""

import logging
import math
import random
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from stts_slowfast.config import Settings, check_training
from stts_slowfast.hooks import raise_on_nan, settings_of
from stts_slowfast.hosts import modules_with_selectors
from stts_slowfast.optimizer_groups import (
    check_scorers,
    missing_scorers,
    param_groups,
    scorer_parameters,
)
from stts_slowfast.selectors import KEEP_SCALE, Selector

logger = logging.getLogger(__name__)

# torch.compile makes a graph for each budget, and gives up after 8: five of training, and room for
# validation and for smaller last batches of both.
SHRINK_STEPS = 4


class Schedule:
    """The whole schedule of a training with selection, in plain numbers, for any loop.

    .. code-block:: python

        optimizer = torch.optim.AdamW(stts.param_groups(model.parameters(), model), lr=1e-4)
        schedule = stts.Schedule(model, optimizer, max_epochs=20, pretrained=True)
        for epoch in range(20):
            for i, (clips, labels) in enumerate(loader):
                schedule.step(epoch + i / len(loader))  # then forward, backward, optimizer.step()

    Learning rates are the loop's: it, or a scheduler of PyTorch's, sets each group's ``lr``. In
    ``optimizer.step()`` a backbone that is frozen or capped has what the recipe leaves of it;
    before and after, groups show the loop's rates.

    Freeze and cap are for fine-tuning: they hold from trained weights, and from random ones
    everything learns at its group's rate. Which it is, is decided in the first :meth:`step` and
    stored in the groups as ``held_back``, so that the optimizer's state has it: a resumed run,
    whose state was loaded by then, is what it was.

    Args:
        model: with selectors, wrapped (DDP) or not; for a model without, nothing is scheduled.
        optimizer: of its parameters. Groups that :func:`param_groups` has not split are split here,
            in place; so make the schedule before a scheduler of learning rates.
        max_epochs: length of training.
        pretrained: whether the backbone's weights are trained.
        base_lr: peak learning rate, of which ``backbone_lr`` is a share; the optimizer's ``lr`` by
            default.
        seed: of the budgets; the same in all processes.

    Raises:
        TypeError: for an optimizer without hooks on its step, or with one rate for all.
        ValueError: if the scorers could not learn, or not all of them are in the optimizer, apart
            from the backbone.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        max_epochs: float,
        pretrained: bool,
        base_lr: float | None = None,
        seed: int = 0,
    ):
        if not max_epochs > 0:
            raise ValueError(f"max_epochs is {max_epochs!r}: it must be above 0")
        self.model, self.optimizer, self.max_epochs, self.seed = model, optimizer, max_epochs, seed
        self.pretrained = bool(pretrained)
        self.learns = any(True for _ in scorer_parameters(model))
        self.base_lr = base_lr
        self.epoch: float | None = None
        # Groups in a step: the loop's rate, and the one of the step.
        self._rates: list[tuple[dict[str, Any], float | Tensor, float]] = []
        inner = _with_hooks(optimizer)
        if self.learns:
            self._settings = settings_of(model)
            check_scorers(model)
            self._split()
            if base_lr is None:
                self.base_lr = float(inner.defaults["lr"])
        if earlier := getattr(inner, "stts_schedule", None):
            earlier.remove()
        inner.stts_schedule = self
        self._hooks = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Takes its hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()

    def step(self, epoch: float) -> dict[str, float]:
        """Sets what belongs to the iteration that begins: each selector's sigma and budget, and
        what ``optimizer.step()`` will make of the backbone's rate.

        Args:
            epoch: exact epoch, from 0, a fraction of it included.

        Returns:
            What to log: ``sigma`` and ``backbone_lr``; nothing if no scorer learns.

        Raises:
            ValueError: if a rate is not finite, ``epoch`` is not one of the training's, a selector
                had NaN scores in an iteration before, the optimizer's state is of one without a
                schedule, or model or optimizer are not those of the schedule any more.
        """
        raise_on_nan(self.model, wait=False)
        if not epoch >= 0:
            raise ValueError(f"epoch is {epoch!r}: count from 0, with the fraction that is done")
        if epoch > self.max_epochs * (1 + 1e-6):
            raise ValueError(
                f"epoch is {epoch!r}, but training has {self.max_epochs:g}: count epochs, with the "
                "fraction that is done, not iterations"
            )
        self._check_own()
        self._give_back()
        groups = self.optimizer.param_groups
        for group in groups:
            if not math.isfinite(group["lr"]):
                raise ValueError(
                    f"the learning rate is {group['lr']} at epoch {epoch:.3f}: look at what sets "
                    "it (SOLVER.*)"
                )
        if self.epoch is None:
            self._begin()
        self.epoch = epoch
        noise = update_schedule(self.model, min(epoch / self.max_epochs, 1.0), self.seed)
        if self._is_frozen():
            _widen_to_all(self.model)
        if not self.learns:
            return {}
        if any("backbone" not in group or "held_back" not in group for group in groups):
            raise ValueError(
                "the optimizer's groups do not say which are the backbone's: one was added behind "
                "the schedule (give it a Schedule of its own, or add it before), or its state was "
                "saved without stts_slowfast.param_groups (load weights alone)"
            )
        rates = [self._rate(g) / g.get("layer_decay", 1.0) for g in groups if g["backbone"]]
        return {"sigma": noise, "backbone_lr": max(rates, default=0.0)}

    def _split(self) -> None:
        groups = self.optimizer.param_groups
        if missing := missing_scorers(groups, self.model):
            raise ValueError(
                f"{len(missing)} parameters of the scorers are not in the optimizer "
                f"({missing[0]}, ...): they would never learn; give it those of the whole model"
            )
        if all("backbone" in group for group in groups):
            self._check_scorers_apart()
            return
        if any("initial_lr" in group for group in groups):
            raise ValueError(
                "the optimizer's groups hold scorers and backbone together, and a scheduler of "
                "learning rates knows them already: make the optimizer with "
                "stts_slowfast.param_groups(model.parameters(), model), or Schedule before it"
            )
        groups[:] = param_groups(groups, self.model)

    def _check_scorers_apart(self) -> None:
        groups = [group for group in self.optimizer.param_groups if not group["backbone"]]
        if wrong := missing_scorers(groups, self.model):
            raise ValueError(
                f"{len(wrong)} parameters of the scorers ({wrong[0]}, ...) are in groups of the "
                "backbone, which may be frozen: the groups were split by another model's scorers; "
                "make an optimizer for each model"
            )

    def _check_own(self) -> None:
        """Refuses an optimizer or selectors that would not obey."""
        if getattr(_with_hooks(self.optimizer), "stts_schedule", None) is not self:
            raise ValueError(
                "this Schedule is not the optimizer's: another was made for it since, or it is a "
                "copy; make one Schedule(model, optimizer, ...) for each optimizer"
            )
        if self.learns and settings_of(self.model) is not self._settings:
            raise ValueError(
                "the model's selectors were attached anew since this Schedule was made: make "
                "optimizer and Schedule behind attach"
            )

    def _begin(self) -> None:
        """Decides, once a run, whether the backbone is frozen and capped, and logs it."""
        shrink = max((s.shrink for s in _selectors(self.model)), default=0.0)
        if shrink:
            logger.info(
                "STTS: in the first %g of training each iteration draws its budget, from KEEP to "
                "an upper bound that shrinks from all tokens to it (STTS.SHRINK; 0 for KEEP alone)",
                shrink,
            )
        groups = self.optimizer.param_groups
        if not self.learns:
            return
        settings = settings_of(self.model)
        resumed = all("held_back" in group for group in groups)
        held_back = any(g["held_back"] for g in groups) if resumed else self.pretrained
        check_training(settings, held_back)
        for group in groups:
            group["held_back"] = held_back
        origin = "trained" if held_back else "random"
        origin = "as this run began" if resumed else f"from {origin} weights"
        if not held_back:
            logger.info(
                "STTS, %s: everything learns at the schedule's rate; STTS.FREEZE_BACKBONE_EPOCHS "
                "and STTS.BACKBONE_LR are for fine-tuning (TRAIN.CHECKPOINT_FILE_PATH)",
                origin,
            )
            return
        logger.info(
            "STTS, %s: the backbone is frozen for %g epochs (STTS.FREEZE_BACKBONE_EPOCHS), then "
            "its rate is at most %g of SOLVER.BASE_LR (STTS.BACKBONE_LR); scorers learn at the "
            "schedule's rate",
            origin,
            settings.freeze_backbone_epochs,
            settings.backbone_lr,
        )
        new = [name for group in groups for name in group.get("new", ())]
        if new:
            shown = ", ".join(new[:4]) + (", ..." if len(new) > 4 else "")
            logger.info("STTS: %d parameters are new and learn with them: %s", len(new), shown)
        if settings.freeze_backbone_epochs >= self.max_epochs:
            logger.warning(
                "STTS.FREEZE_BACKBONE_EPOCHS is %g and SOLVER.MAX_EPOCH %g: only scorers learn",
                settings.freeze_backbone_epochs,
                self.max_epochs,
            )

    def _is_frozen(self) -> bool:
        """Whether only scorers, and what else is new, learn in this iteration."""
        backbone = [g for g in self.optimizer.param_groups if g.get("backbone")]
        return any(g.get("held_back") for g in backbone) and not any(map(self._rate, backbone))

    def _rate(self, group: dict) -> float:
        """A group's rate in ``optimizer.step()``."""
        lr = float(group["lr"])
        if not (group.get("backbone") and group.get("held_back")):
            return lr
        decay = group.get("layer_decay", 1.0)
        return backbone_lr(lr, self.epoch, settings_of(self.model), self.base_lr * decay)

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        if self.epoch is None:
            raise ValueError(
                "optimizer.step() before the schedule's: call schedule.step(epoch) before each "
                "iteration"
            )
        self._give_back()
        groups = self.optimizer.param_groups
        self._rates = [(group, group["lr"], self._rate(group)) for group in groups]
        for group, lr, rate in self._rates:
            if rate != float(lr):
                group["lr"] = lr.new_tensor(rate) if isinstance(lr, Tensor) else rate

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr, _rate in self._rates:
            group["lr"] = lr
        self._rates = []

    def _give_back(self) -> None:
        """The loop's rates, behind a step that ended in an error; what was set since stays."""
        for group, lr, rate in self._rates:
            if float(group["lr"]) == rate:
                group["lr"] = lr
        self._rates = []


def _with_hooks(optimizer: Optimizer) -> Optimizer:
    """The optimizer of PyTorch's inside what accelerate or SlowFast (LARS) put around it."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        inner = getattr(inner, "optimizer", None) or getattr(inner, "optim", None)
        if inner is None:
            raise TypeError(
                f"{type(optimizer).__name__} has no hooks on its step: give a torch.optim.Optimizer"
            )
    if isinstance(inner, LBFGS):
        raise TypeError(
            "LBFGS has one rate for all parameters, so a backbone cannot be frozen or capped apart "
            "from the scorers: take another optimizer, or set_progress(model, fraction)"
        )
    return inner


def _selectors(model: nn.Module) -> list[Selector]:
    return [module for module in model.modules() if isinstance(module, Selector)]


# --- each part alone ----------------------------------------------------------------------------


def sigma(initial: float, decay: str, fraction: float) -> float:
    """Noise level after a fraction of training.

    Args:
        initial: ``STTS.SIGMA``.
        decay: ``STTS.SIGMA_DECAY``: ``linear`` goes to 0, ``constant`` stays.
        fraction: 0 to 1 of training done.
    """
    return initial * (1.0 - fraction) if decay == "linear" else initial


def budget_widening(fraction: float, shrink: float, seed: int, between: bool = True) -> float:
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


def backbone_lr(lr: float, epoch: float, settings: Settings, base_lr: float) -> float:
    """The rate of a trained backbone, frozen and then capped, if the scorers' is ``lr`` (paper
    section 4.1).

    Args:
        lr: what the loop's schedule gives for this epoch.
        epoch: exact epoch, a fraction of it included.
        settings: ``model.stts.settings``.
        base_lr: ``SOLVER.BASE_LR``.
    """
    if epoch < settings.freeze_backbone_epochs:
        return 0.0
    return min(lr, settings.backbone_lr * base_lr)


def update_schedule(model: nn.Module, fraction: float, seed: int = 0) -> float | None:
    """Sets every selector's sigma, and its budget, at this point of training.

    Both depend on nothing but the arguments: all processes have the same, and a resumed run is
    where it was. Of a range each selector draws its own budget, all sizes of it as likely; while
    budgets shrink, all keep by as much more than that as :func:`budget_widening` says; if all tokens pass,
    saliency teaches (``STTS.TEACHER``).

    Args:
        model: with selectors, wrapped (DDP) or not; a model without is left as it is.
        fraction: 0 to 1 of training done.
        seed: of the budgets, the run's.

    Returns:
        That sigma; None if there is no selector.

    Raises:
        ValueError: for a fraction outside 0 to 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction!r}: the share of training done lies in 0 to 1")
    noise = None
    for module in _selectors(model):
        module.sigma = noise = sigma(module.initial_sigma, module.sigma_decay, fraction)
        draw = random.Random(f"{seed} {fraction!r} {module.key}").random()
        between = module.teacher == "mixture"
        module.set_budget(draw, budget_widening(fraction, module.shrink, seed, between))
        module.scheduled = True
    return noise


def _widen_to_all(model: nn.Module) -> None:
    """Widens the budget of selectors that saliency teaches to all that arrives, until the next
    :func:`update_schedule`: while only they learn there is nothing else for an iteration to do.
    """
    for module in _selectors(model):
        if module.teacher != "mixture":
            module.widening = KEEP_SCALE


def reset(model: nn.Module) -> None:
    """Gives every selector KEEP (of a range, its high end) at the initial sigma."""
    for module in _selectors(model):
        module.reset()


def set_progress(model: nn.Module, fraction: float, seed: int = 0) -> float | None:
    """:func:`update_schedule` for loops without a :class:`Schedule`, which has the backbone's rate as well.

    Args:
        model, fraction, seed: see :func:`update_schedule`.

    Returns:
        That sigma; None if there is no selector.

    Raises:
        ValueError: for a fraction outside 0 to 1; for a model whose settings
            (``freeze_backbone_epochs``, ``backbone_lr``) only a :class:`Schedule` can obey. If
            they are the defaults, it warns.
    """
    _check_obeyed(model)
    return update_schedule(model, fraction, seed)


def _check_obeyed(model: nn.Module) -> None:
    defaults = Settings.from_kwargs()
    for module in modules_with_selectors(model).values():
        stts: Any = module.stts
        settings = stts.settings
        if not any(True for _ in stts.parameters()):
            continue
        asked = {
            "freeze_backbone_epochs": settings.freeze_backbone_epochs > 0,
            "backbone_lr": settings.backbone_lr < 1,
        }
        asked = {name: getattr(settings, name) for name, does in asked.items() if does}
        said = ", ".join(f"{name}={value:g}" for name, value in asked.items())
        if any(value != getattr(defaults, name) for name, value in asked.items()):
            raise ValueError(
                f"{said} cannot be obeyed by set_progress, which knows no optimizer: make a "
                "stts_slowfast.Schedule(model, optimizer, ...) and call its step(epoch) instead, "
                "or attach with freeze_backbone_epochs=0, backbone_lr=1"
            )
        if asked and not getattr(module.stts, "warned", False):
            module.stts.warned = True
            logger.warning(
                "STTS: %s, the default, is for loops with a stts_slowfast.Schedule: without one a "
                "trained backbone learns from the first step (as with freeze_backbone_epochs=0)",
                said,
            )
