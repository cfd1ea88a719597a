"""The schedule of a training with selection: sigma, budgets, and the backbone's learning rate.

A training loop makes a :class:`Schedule` beside its optimizer, and calls ``step`` before every
iteration.
"""

import logging
import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stts_slowfast.annealing import check_training, keep_all_for_saliency, update_schedule
from stts_slowfast.frozen_gradients import FrozenGradients
from stts_slowfast.hooks import all_selectors, raise_on_nan, settings_of
from stts_slowfast.optimizer_groups import (
    Group,
    check_scorers,
    missing_scorers,
    param_groups,
    scorer_parameters,
    tensors,
    with_hooks,
)

logger = logging.getLogger(__name__)

# So many steps may have gradients of other parameters alone, as of batches without videos.
STEPS_WITHOUT_GRADIENT = 10


class Schedule:
    """The whole schedule of a training with selection, in plain numbers, for any loop.

    .. code-block:: python

        optimizer = torch.optim.AdamW(stts.param_groups(model.parameters(), model), lr=1e-4)
        schedule = stts.Schedule(model, optimizer, max_epochs=20, pretrained=True)
        for epoch in range(20):
            for i, (clips, labels) in enumerate(loader):
                schedule.step(epoch + i / len(loader))  # then forward, backward, optimizer.step()

    The loop, or a learning rate scheduler of PyTorch, sets each group's ``lr``. During
    ``optimizer.step()`` the groups of a frozen or capped backbone have a lower one; before and
    after it, groups show the loop's rates. From :meth:`step` to ``optimizer.step()`` a frozen
    backbone's parameters have ``requires_grad`` False, so their gradients are neither computed nor
    reduced by DDP.

    Freeze and cap are for fine-tuning: they apply to trained weights; from random weights
    everything learns at its group's rate. The first :meth:`step` decides it and stores it in the
    groups as ``held_back``, so that it is part of the optimizer's state, and a resumed run, whose
    state was loaded by then, continues as it began.

    Args:
        model: with selectors, wrapped (DDP) or not; for a model without, nothing is scheduled.
        optimizer: of its parameters. Groups that :func:`param_groups` has not split are split here,
            in place; so make the schedule before a learning rate scheduler.
        max_epochs: length of training.
        pretrained: whether the backbone's weights are trained.
        base_lr: peak learning rate; ``backbone_lr`` is a fraction of it. By default the
            optimizer's ``lr``.
        seed: of the budgets; the same in all processes.

    Raises:
        TypeError: for an optimizer without hooks on its step, or with one rate for all parameters.
        ValueError: if the scorers could not learn, or if not all of them are in the optimizer, in
            groups apart from the backbone.
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
        self.epoch: float | None = None
        # During optimizer.step(): each group, the loop's rate, and the rate of the step.
        self._rates: list[tuple[dict[str, Any], float | Tensor, float]] = []
        self._unseen = STEPS_WITHOUT_GRADIENT if self.learns else 0
        self._gradients = FrozenGradients(model)
        self._gradients.turn_on()  # those that a loop before left, which ended with an error
        inner: Any = with_hooks(optimizer)
        self.base_lr = 0.0 if base_lr is None else base_lr
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
        """Removes its hooks from the optimizer; a frozen backbone has gradients again."""
        for hook in self._hooks:
            hook.remove()
        self._gradients.turn_off([])

    def step(self, epoch: float) -> dict[str, float]:
        """Sets sigma, budgets and the backbone's learning rate for the iteration that begins.

        Args:
            epoch: exact epoch, from 0, with its fraction.

        Returns:
            Values to log: ``sigma`` and ``backbone_lr``; nothing if no scorer learns.

        Raises:
            ValueError: if a rate is not finite, ``epoch`` is negative or beyond ``max_epochs``, a
                selector had NaN scores in an iteration before, the optimizer's state was saved
                without a schedule, or model or optimizer have changed since.
        """
        raise_on_nan(self.model, wait=False)
        if not epoch >= 0:
            raise ValueError(f"epoch is {epoch!r}: count from 0, with the fraction that is done")
        if epoch > self.max_epochs * (1 + 1e-6):
            raise ValueError(
                f"epoch is {epoch!r}, but training has {self.max_epochs:g}: count epochs, with the "
                "fraction that is done, not iterations"
            )
        self._check_unchanged()
        self._restore_rates()
        groups = self.optimizer.param_groups
        for group in groups:
            if not math.isfinite(group["lr"]):
                raise ValueError(
                    f"the learning rate is {group['lr']} at epoch {epoch:.3f}: look at what sets "
                    "it (SOLVER.*)"
                )
        if self.epoch is None:
            self._resolve_backbone_freeze()
        self.epoch = epoch
        noise = update_schedule(self.model, min(epoch / self.max_epochs, 1.0), self.seed)
        if not self.learns:
            return {}
        if self._is_in_freeze() and any(group.get("held_back") for group in groups):
            keep_all_for_saliency(self.model)
        if any("backbone" not in group or "held_back" not in group for group in groups):
            raise ValueError(
                "not all groups of the optimizer are marked as backbone or scorers: one was added "
                "after the schedule was made (add it before), or its state was saved without "
                "stts_slowfast.param_groups (load only weights)"
            )
        self._gradients.turn_off(p for g in groups if self._is_group_frozen(g) for p in tensors(g))
        rates = [self._rate(g) / g.get("layer_decay", 1.0) for g in groups if g["backbone"]]
        return {"sigma": noise or 0.0, "backbone_lr": max(rates, default=0.0)}

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
                "the optimizer's groups mix scorers and backbone, and a learning rate scheduler "
                "has them already: make the optimizer with "
                "stts_slowfast.param_groups(model.parameters(), model), or create the Schedule "
                "before that scheduler"
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

    def _check_unchanged(self) -> None:
        """Raises if the optimizer has a new schedule, or the model new selectors."""
        if getattr(with_hooks(self.optimizer), "stts_schedule", None) is not self:
            raise ValueError(
                "this Schedule is not the optimizer's: another was made for it since, or it is a "
                "copy; make one Schedule(model, optimizer, ...) for each optimizer"
            )
        if self.learns and settings_of(self.model) is not self._settings:
            raise ValueError(
                "the model's selectors were attached again after this Schedule was made: make "
                "optimizer and Schedule after attach"
            )

    def _resolve_backbone_freeze(self) -> None:
        """Decides once per run whether to freeze and cap the backbone, and logs it."""
        selectors = all_selectors(self.model)
        shrink = max((selector.shrink for selector in selectors), default=0.0)
        if shrink and any(selector.learns_from_saliency for selector in selectors):
            logger.info(
                "STTS: budget annealing in the first %g of training: iterations keep all tokens, "
                "less and less often, or KEEP (STTS.SHRINK; 0 for KEEP only)",
                shrink,
            )
        elif shrink:
            logger.info(
                "STTS: budget annealing in the first %g of training: each iteration samples a "
                "budget between KEEP and an upper bound that decays from all tokens to KEEP "
                "(STTS.SHRINK; 0 for KEEP only)",
                shrink,
            )
        if not self.learns:
            return
        groups = self.optimizer.param_groups
        resumed = all("held_back" in group for group in groups)
        held_back = any(g["held_back"] for g in groups) if resumed else self.pretrained
        check_training(settings_of(self.model), selectors, held_back)
        for group in groups:
            group["held_back"] = held_back
        origin = f"from {'trained' if held_back else 'random'} weights"
        self._log_freeze("resumed" if resumed else origin, held_back)

    def _log_freeze(self, origin: str, held_back: bool) -> None:
        if not held_back:
            logger.info(
                "STTS, %s: everything learns at the scheduled learning rate; "
                "STTS.FREEZE_BACKBONE_EPOCHS and STTS.BACKBONE_LR are for fine-tuning "
                "(TRAIN.CHECKPOINT_FILE_PATH)",
                origin,
            )
            return
        settings = settings_of(self.model)
        logger.info(
            "STTS, %s: the backbone is frozen for %g epochs (STTS.FREEZE_BACKBONE_EPOCHS), then "
            "its learning rate is at most %g of SOLVER.BASE_LR (STTS.BACKBONE_LR); scorers learn "
            "at the scheduled learning rate",
            origin,
            settings.freeze_backbone_epochs,
            settings.backbone_lr,
        )
        new = [name for group in self.optimizer.param_groups for name in group.get("new", ())]
        if new:
            shown = ", ".join(new[:4]) + (", ..." if len(new) > 4 else "")
            logger.info("STTS: %d parameters are new and learn with them: %s", len(new), shown)
        if settings.freeze_backbone_epochs >= self.max_epochs:
            logger.warning(
                "STTS.FREEZE_BACKBONE_EPOCHS is %g and SOLVER.MAX_EPOCH %g: only scorers learn",
                settings.freeze_backbone_epochs,
                self.max_epochs,
            )

    def _is_in_freeze(self) -> bool:
        """Whether this is an epoch of STTS.FREEZE_BACKBONE_EPOCHS."""
        return (self.epoch or 0.0) < settings_of(self.model).freeze_backbone_epochs

    def _is_group_frozen(self, group: Group) -> bool:
        """Whether a group does not learn, whatever the loop's rate is."""
        if not (group["backbone"] and group["held_back"]):
            return False
        return self._is_in_freeze() or settings_of(self.model).backbone_lr == 0

    def _rate(self, group: Group) -> float:
        """A group's learning rate in ``optimizer.step()``."""
        lr = float(group["lr"])
        if not (group.get("backbone") and group.get("held_back")):
            return lr
        settings = settings_of(self.model)
        return backbone_lr(
            lr,
            self.epoch or 0.0,
            base_lr=self.base_lr * group.get("layer_decay", 1.0),
            freeze_epochs=settings.freeze_backbone_epochs,
            cap=settings.backbone_lr,
        )

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.epoch is None:
            raise ValueError(
                "optimizer.step() without a step of the schedule: call schedule.step(epoch) before "
                "each iteration"
            )
        self._restore_rates()
        groups = self.optimizer.param_groups
        self._check_gradients()
        self._rates = [(group, group["lr"], self._rate(group)) for group in groups]
        for group, lr, rate in self._rates:
            if rate != float(lr):
                group["lr"] = lr.new_tensor(rate) if isinstance(lr, Tensor) else rate

    def _check_gradients(self) -> None:
        """Raises if other parameters have had gradients in several steps, and no scorer in any."""
        if self._unseen == 0:
            return
        groups = self.optimizer.param_groups
        if any(p.grad is not None for _, p in scorer_parameters(self.model)):
            self._unseen = 0
        elif missing_scorers(groups, self.model):
            pass  # copies of parameters have the gradients
        elif any(p.grad is not None for group in groups for p in tensors(group)):
            self._unseen -= 1
            if self._unseen == 0:
                self._unseen = STEPS_WITHOUT_GRADIENT
                raise ValueError(
                    f"no scorer had a gradient in {STEPS_WITHOUT_GRADIENT} steps, so none learns: "
                    "is the model in evaluation (model.eval(); to keep only BatchNorm or dropout "
                    "in evaluation, call model.stts.train() after it), its backbone frozen and "
                    "checkpointed with use_reentrant=True, or run under torch.no_grad()?"
                )

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._gradients.turn_on()
        for group, lr, _rate in self._rates:
            group["lr"] = lr
        self._rates = []

    def _restore_rates(self) -> None:
        """Sets the loop's rates after a step that raised, except those that were set since."""
        for group, lr, rate in self._rates:
            if float(group["lr"]) == rate:
                group["lr"] = lr
        self._rates = []


def backbone_lr(
    lr: float, epoch: float, *, base_lr: float, freeze_epochs: float, cap: float
) -> float:
    """The learning rate of a trained backbone, frozen and then capped (paper section 4.1).

    Args:
        lr: the rate of the scorers in this epoch.
        epoch: exact epoch, with its fraction.
        base_lr: peak learning rate, ``SOLVER.BASE_LR``.
        freeze_epochs: epochs in which the rate is 0, ``STTS.FREEZE_BACKBONE_EPOCHS``.
        cap: upper bound as a share of ``base_lr``, ``STTS.BACKBONE_LR``.
    """
    return 0.0 if epoch < freeze_epochs else min(lr, cap * base_lr)
