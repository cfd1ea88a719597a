"""Selection in transformers' ``Trainer``: a callback for sigma and the backbone's learning rate.

.. code-block:: python

    selection = SelectionCallback(model)          # after attach
    Trainer(model, args, train_dataset=clips, callbacks=[selection],
            optimizer_cls_and_kwargs=selection.optimizer(args)).train()
"""

import math

from fvcore.common.config import CfgNode
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from stts_slowfast import schedule


class SelectionCallback(TrainerCallback):
    """Sets before each step what the paper's recipe sets, from what ``attach`` was given.

    It logs ``sigma`` and ``backbone_lr`` beside the trainer's values. A resumed run is what it was.
    The learning rate must follow from the number of steps alone, as all but
    ``reduce_lr_on_plateau`` do.

    Args:
        model: with selectors.
        trained: whether its backbone is trained, so that it is frozen at first
            (``freeze_backbone_epochs``) and then learns at a capped rate (``backbone_lr``); None
            for whether the model comes from ``from_pretrained``.

    Raises:
        ValueError: where the model has no selectors.
    """

    def __init__(self, model: nn.Module, trained: bool | None = None):
        if not isinstance(getattr(model, "stts", None), nn.ModuleDict):
            raise ValueError(f"this {type(model).__name__} has no selectors: call attach first")
        self.model = model
        self.trained = bool(getattr(model, "name_or_path", "")) if trained is None else trained
        self.cfg = CfgNode({"SOLVER": {}})
        self.steps_per_epoch = 0
        self.now: dict[str, float] = {}

    def optimizer(self, args: TrainingArguments) -> tuple[type, dict]:
        """``Trainer``'s own optimizer for these arguments, with groups of its own for scorers."""
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, self.model)
        split = self._split

        class Optimizer(kind):
            def __init__(self, params, **settings):
                super().__init__(split(params), **settings)

        Optimizer.__name__ = kind.__name__
        return Optimizer, settings

    def _split(self, groups: list[dict]) -> list[dict]:
        return schedule.param_groups(groups, self.model)

    def on_train_begin(self, args, state, control, **what) -> None:
        """Decides whether the backbone is held back.

        Raises:
            ValueError: where the optimizer does not know scorers from the backbone, or the length
                of an epoch is not known though the backbone is to be frozen for some.
        """
        groups = what["optimizer"].param_groups
        apart = all("backbone" in group for group in groups)
        if not apart and self._split(groups) is not groups:
            raise ValueError(
                "the optimizer's groups hold scorers and backbone together: give Trainer "
                "optimizer_cls_and_kwargs=callback.optimizer(args)"
            )
        try:
            batches = len(what["train_dataloader"])
        except TypeError:
            if self.trained and self.model.stts.settings.freeze_backbone_epochs:
                raise ValueError(
                    "this data has no length, so freeze_backbone_epochs cannot be counted: "
                    "attach with freeze_backbone_epochs=0"
                ) from None
            batches = state.max_steps * args.gradient_accumulation_steps
        self.steps_per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
        self.cfg.SOLVER.MAX_EPOCH = state.max_steps / self.steps_per_epoch
        self.cfg.SOLVER.BASE_LR, self.cfg.RNG_SEED = args.learning_rate, args.seed
        schedule.begin(groups, self.trained, self.model, self.cfg.SOLVER.MAX_EPOCH)

    def on_step_begin(self, args, state, control, **what) -> None:
        groups = what["optimizer"].param_groups
        lr = next((group["lr"] for group in groups if not group.get("backbone")), groups[0]["lr"])
        epoch = state.global_step / self.steps_per_epoch
        self.now = schedule.step(self.model, groups, lr, epoch, self.cfg)

    def on_log(self, args, state, control, logs=None, **what) -> None:
        for log in (logs, state.log_history[-1] if state.log_history else None):
            if log is not None and "loss" in log:
                log.update(self.now)
