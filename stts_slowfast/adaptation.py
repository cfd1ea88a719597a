"""Adapts a trained model with selectors to unlabelled clips: :func:`adapt`.

The model itself is the teacher. In a pass that keeps all tokens, the gradient of its own prediction
teaches the scorers (``saliency.py``): for a model with classes the loss is the negative log
probability of the predicted class; for a model that computes features, the negative projection of
the clip's feature on its own direction, seen from the mean of the clips. In a second pass, with
selection as in a test, the backbone learns the logits and features of all tokens.
"""

import contextlib
import copy
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast import annealing
from stts_slowfast.fidelity import (
    OutputRecorder,
    Outputs,
    budget_at,
    compare,
    divergence,
    outputs,
    replaced_scorers,
    run,
)
from stts_slowfast.hooks import all_selectors, detach, raise_on_nan

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
# Positions in the range of shares at which a model of ranges is compared.
POSITIONS = (0.0, 0.5, 1.0)


@dataclass
class Adaptation:
    """What :func:`adapt` did.

    Attributes:
        steps: how many batches were learned from.
        seconds: of the adaptation without the comparisons.
        seconds_total: with them.
        rows: of each comparison ``when`` (``before``, ``after``, or the name of a scorer that was
            put in for comparison before), ``budget`` (``time_0 0.5``), and what
            ``fidelity.compare`` returns; empty without ``test_clips``.
    """

    steps: int = 0
    seconds: float = 0.0
    seconds_total: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def adapt(
    model: nn.Module,
    clips: Iterable[Any],
    test_clips: Iterable[Any] | None = None,
    *,
    backbone: bool = False,
    steps: int = 300,
    minutes: float = 20.0,
    lr: float = 1e-3,
    backbone_lr: float = 5e-6,
    classes: bool | None = None,
    baselines: Sequence[str] = ("uniform", "random"),
    seed: int = 0,
) -> Adaptation:
    """Teaches the scorers of a trained model, and if asked its backbone, without labels.

    .. code-block:: python

        stts.attach(model, time={0: (0.25, 0.75)}, fused_attention=False)
        found = stts.adapt(model, batches, test_batches, backbone=True)

    It returns after ``steps`` batches or ``minutes``, whichever is first; learning rates fall to 0
    by then. The model is in evaluation afterwards. Dropout and batch norm are as in evaluation
    throughout. A range of shares is sampled, and compared at its low end, middle (geometric) and
    high end.

    Args:
        model: with selectors, on its device, changed in place. It must be trained.
        clips: batches as the model takes them: tensors, tuples or lists of arguments (without
            labels), or mappings of keywords; iterated as often as needed. Of image models each has
            the frames of whole clips, ``(B*T, 3, H, W)``, and ``model.num_frames`` is set.
        test_clips: batches of other videos, for the comparisons before and after; iterated for
            each of them.
        backbone: whether all parameters that require gradients learn. Else only scorers do.
        steps: batches to learn from.
        minutes: limit of the adaptation, without the comparisons.
        lr: peak learning rate of the scorers.
        backbone_lr: peak learning rate of the backbone; small models take more (2e-4).
        classes: whether the model has classes; None finds it out, see ``fidelity.OutputRecorder``.
        baselines: scorers without weights that are compared, before the adaptation.
        seed: of the budgets.

    Returns:
        Steps, seconds, and the agreement with all tokens before and after.

    Raises:
        ValueError: if the model has no selectors or nothing would learn, if there are no clips, or
            if outputs are not finite.
    """
    start = time.perf_counter()
    for name, batches in (("clips", clips), ("test_clips", test_clips)):
        if isinstance(batches, (Tensor, Mapping, Iterator)):
            raise ValueError(
                f"{name} is a {type(batches).__name__}: give a list of batches or a loader, which "
                "can be iterated again"
            )
    if steps < 1 or not minutes > 0:
        raise ValueError(f"steps is {steps} and minutes {minutes}: both must be above 0")
    adapter = _Adapter(model, backbone, lr, backbone_lr, classes, seed)
    for name in baselines if test_clips is not None else ():
        with replaced_scorers(model, name):
            pass  # raises for an unknown one
    found = Adaptation()
    if test_clips is not None:
        reference = adapter.reference(test_clips)
        found.rows += adapter.compare("before", reference, test_clips)
        for name in baselines:
            with replaced_scorers(model, name):
                found.rows += adapter.compare(name, reference, test_clips)
    begin = time.perf_counter()
    found.steps = adapter.learn(clips, steps, 60.0 * minutes)
    found.seconds = time.perf_counter() - begin
    if test_clips is not None:
        found.rows += adapter.compare("after", reference, test_clips)
    found.seconds_total = time.perf_counter() - start
    logger.info("STTS: adapted for %d steps, %.1f s", found.steps, found.seconds)
    return found


class _Adapter:
    """The adaptation of one model.

    Attributes:
        teacher: the model on all tokens; a frozen copy if the backbone learns.
        mean: of the teacher's features, over all clips so far.
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: bool,
        lr: float,
        backbone_lr: float,
        classes: bool | None,
        seed: int,
    ):
        self.model, self.classes, self.seed = model, classes, seed
        self.selectors = all_selectors(model)
        if not self.selectors:
            raise ValueError(
                f"this {type(model).__name__} has no selectors: call attach(model, ...) first"
            )
        every = [p for selector in self.selectors for p in selector.parameters()]
        known = {id(parameter) for parameter in every}
        self.scorers = [parameter for parameter in every if parameter.requires_grad]
        others = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
        self.backbone = others if backbone else []
        self.frozen = [] if backbone else others
        groups = [{"params": self.scorers, "lr": lr, "peak": lr, "warmup": 0.05}]
        # It adapts to what the scorers have learned to keep.
        more = {"warmup": 0.3 if self.scorers else 0.05}
        groups += [{"params": self.backbone, "lr": backbone_lr, "peak": backbone_lr, **more}]
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ValueError(
                "nothing would learn: no scorer of this model has weights that require gradients, "
                "nor does its backbone, or backbone is False"
            )
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self.teacher = _without_selectors(model)
        self.mean: Tensor | None = None
        self.seen = 0

    # --- comparison -------------------------------------------------------------------------------

    def reference(self, batches: Iterable[Any]) -> Outputs:
        """The teacher's outputs."""
        return outputs(self.teacher, batches, self.classes)

    def compare(
        self, when: str, reference: Outputs, batches: Iterable[Any]
    ) -> list[dict[str, Any]]:
        """A row for each budget."""
        rows = []
        for position in POSITIONS if any(s.low != s.high for s in self.selectors) else (1.0,):
            with budget_at(self.model, position) as text:
                found = compare(reference, outputs(self.model, batches, self.classes))
            rows.append({"when": when, "budget": text, **found})
            logger.info("STTS: %s", rows[-1])
        return rows

    # --- learning ---------------------------------------------------------------------------------

    @torch.enable_grad()
    def learn(self, clips: Iterable[Any], steps: int, seconds: float) -> int:
        """Learns from at most ``steps`` batches, for at most ``seconds``; returns their number."""
        states = [(selector, selector.teacher, selector.scheduled) for selector in self.selectors]
        self.model.eval()
        start = logged = time.perf_counter()
        done = 0
        try:
            for selector in self.selectors:
                selector.train()
                selector.teacher, selector.scheduled = "saliency", True
            for batch in _repeated(clips, steps):
                elapsed = time.perf_counter() - start
                if elapsed >= seconds:
                    break
                self._set_rates(max(done / steps, elapsed / seconds))
                losses = self._step(done, batch)
                done += 1
                if time.perf_counter() - logged > LOG_SECONDS:
                    logged = time.perf_counter()
                    text = ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
                    logger.info("STTS: step %d, %.0f s, %s", done, logged - start, text)
        finally:
            for selector, teacher, scheduled in states:
                selector.teacher, selector.scheduled = teacher, scheduled
            self.optimizer.zero_grad(set_to_none=True)
            annealing.reset(self.model)
            self.model.eval()
        raise_on_nan(self.model)
        return done

    def _set_rates(self, progress: float) -> None:
        """Warms up linearly, the backbone more slowly; rates fall to 0 along a cosine."""
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            warmup = min((progress + 0.001) / group["warmup"], 1.0)
            group["lr"] = group["peak"] * warmup * decay

    def _step(self, number: int, batch: Any) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, Tensor] = {}
        target = None
        if self.backbone:  # else the pass that teaches the scorers computes the same
            with torch.no_grad():
                target = self._call(self.teacher, batch)
        samples = random.Random(f"{self.seed} {number}")
        for selector in self.selectors:
            selector.set_budget(samples.random())
        if self.scorers:
            losses["saliency"] = self._teach_scorers(target, batch)
        if target is not None:
            losses["distance"] = self._teach_backbone(target, batch)
        # One number is read, after both passes: the host waits for the device once a step.
        if not math.isfinite(torch.stack([*losses.values()]).sum().item()):
            bad = next(name for name, loss in losses.items() if not bool(loss.isfinite()))
            raise ValueError(
                f"the loss ({bad}) is not finite in step {number + 1}: are the model's weights "
                "and the clips finite? Else lower lr and backbone_lr"
            )
        nn.utils.clip_grad_norm_([*self.scorers, *self.backbone], 1.0)
        self.optimizer.step()
        return losses

    def _teach_scorers(self, target: Outputs | None, batch: Any) -> Tensor:
        """A pass that keeps all tokens, whose gradient reaches the scorers only."""
        for selector in self.selectors:
            selector.keep_all()
        with _frozen([*self.backbone, *self.frozen]):
            found = self._call(self.model, batch)
            target = target or found.map(Tensor.detach)
            self._add_to_mean(target.features)
            if target.logits is not None and found.logits is not None:
                loss = F.cross_entropy(found.logits, target.logits.argmax(dim=1))
            else:
                direction = F.normalize(self._centred(target.features), dim=1)
                loss = -(found.features * direction).sum(dim=1).mean()
            loss.backward()
        for selector in self.selectors:
            selector.widening = 0
        return loss.detach()

    def _teach_backbone(self, target: Outputs, batch: Any) -> Tensor:
        """A pass with selection, whose logits and features shall be those of all tokens."""
        found = self._call(self.model, batch)
        if not self.scorers:
            self._add_to_mean(target.features)
        spread = self._centred(target.features).square().sum(dim=1).mean().clamp_min(1e-12)
        loss = (found.features - target.features).square().sum(dim=1).mean() / spread
        if target.logits is not None and found.logits is not None:
            loss = loss + divergence(target.logits, found.logits)
        loss.backward()
        return loss.detach()

    def _add_to_mean(self, features: Tensor) -> None:
        self.seen += len(features)
        if self.mean is None:
            self.mean = features.mean(dim=0)
        else:
            self.mean = self.mean + (features - self.mean).sum(dim=0) / self.seen

    def _centred(self, features: Tensor) -> Tensor:
        assert self.mean is not None
        return features - self.mean

    def _call(self, model: nn.Module, batch: Any) -> Outputs:
        with OutputRecorder(model, self.classes) as recorder:
            run(model, batch)
        return recorder.pop()


def _without_selectors(model: nn.Module) -> nn.Module:
    """A frozen copy of a model that keeps all tokens."""
    teacher = copy.deepcopy(model)
    detach(teacher)
    return teacher.requires_grad_(False).eval()


@contextlib.contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _repeated(clips: Iterable[Any], count: int) -> Iterator[Any]:
    """``count`` batches, from the first again after the last.

    Raises:
        ValueError: if there is none.
    """
    done = 0
    while done < count:
        before = done
        for batch in clips:
            if done == count:
                return
            yield batch
            done += 1
        if done == before:
            raise ValueError("there are no clips to adapt to")
