"""Selection in transformers' ``Trainer``: a callback for the schedule.

.. code-block:: python

    selection = SelectionCallback(model)          # after attach
    Trainer(model, args, train_dataset=clips, callbacks=[selection],
            optimizer_cls_and_kwargs=selection.optimizer(args)).train()
"""

import math
from collections.abc import Iterable

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from stts_slowfast.frozen_gradients import turn_on
from stts_slowfast.hooks import settings_of
from stts_slowfast.integrations.transformers_restore import Restoration
from stts_slowfast.optimizer_groups import param_groups
from stts_slowfast.schedule import Schedule


class SelectionCallback(TrainerCallback):
    """Sets sigma, budgets and the backbone's learning rate before each step.

    It logs ``sigma`` and ``backbone_lr`` beside the trainer's values. A resumed run continues as it
    began: it is checked that the trainer restores all tensors, of the best model too (see
    ``transformers_restore.py``).

    Args:
        model: with selectors; the one that is given to ``Trainer``.
        trained: whether its backbone is trained, so that it is frozen at first
            (``freeze_backbone_epochs``) and then learns at a capped rate (``backbone_lr``); by
            default whether the model comes from ``from_pretrained``.
        new: names of further new parameters or modules, which learn from the first step; a head
            for other classes and adapters are found without.

    Raises:
        ValueError: if the model has no selectors.
    """

    def __init__(self, model: nn.Module, trained: bool | None = None, new: Iterable[str] = ()):
        settings_of(model)
        self.model, self.new = model, tuple(new)
        names = (getattr(module, "name_or_path", "") for module in model.modules())
        self.trained = any(names) if trained is None else trained
        self.restoration = Restoration(model)
        self.schedule: Schedule | None = None
        self.steps_per_epoch = 0
        self.logged: dict[str, float] = {}

    def optimizer(self, args: TrainingArguments) -> tuple[type, dict]:
        """``Trainer``'s optimizer for these arguments, with separate groups for scorers."""
        turn_on(self.model)  # Trainer gives an optimizer only parameters that have gradients
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, self.model)

        def init(optimizer, params, **settings):
            kind.__init__(optimizer, self._split(params), **settings)

        return type(kind.__name__, (kind,), {"__init__": init}), settings

    def _split(self, groups: list[dict]) -> list[dict]:
        return param_groups(groups, self.model, self.new)

    def on_train_begin(self, args, state, control, **what) -> None:
        """Makes the schedule.

        Raises:
            ValueError: if the optimizer's groups do not separate scorers and backbone, if the
                backbone shall be frozen for epochs whose length is unknown, or if not all tensors
                of a resumed run were restored.
        """
        if missing := self.restoration.missing():
            raise ValueError(_unrestored("the checkpoint that is resumed", missing))
        try:
            batches = len(what["train_dataloader"])
        except TypeError:
            if self.trained and settings_of(self.model).freeze_backbone_epochs:
                raise ValueError(
                    "this data has no length, so freeze_backbone_epochs cannot be counted: "
                    "attach with freeze_backbone_epochs=0"
                ) from None
            batches = state.max_steps * args.gradient_accumulation_steps
        self.steps_per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        try:
            self.schedule = Schedule(
                self.model,
                what["optimizer"],
                max_epochs=state.max_steps / self.steps_per_epoch,
                pretrained=self.trained,
                base_lr=args.learning_rate,
                seed=args.seed,
            )
        except ValueError as error:
            raise ValueError(
                f"{error}. Give Trainer optimizer_cls_and_kwargs=callback.optimizer(args)"
            ) from error

    def on_step_begin(self, args, state, control, **what) -> None:
        self.logged = self.schedule.step(state.global_step / self.steps_per_epoch)

    def on_train_end(self, args, state, control, **what) -> None:
        """Raises ``ValueError`` if the best model's tensors were not all restored."""
        turn_on(self.model)  # the last step may have been skipped
        if missing := self.restoration.missing():
            raise ValueError(_unrestored(state.best_model_checkpoint, missing))

    def on_log(self, args, state, control, logs=None, **what) -> None:
        for log in (logs, state.log_history[-1] if state.log_history else None):
            if log is not None and "loss" in log:
                log.update(self.logged)


def _unrestored(source: str, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return (
        f"Trainer has not restored {len(names)} tensors of the model from {source} ({shown}): load "
        "it with from_pretrained, attach, and stts_slowfast.load_weights(model, folder)"
    )
