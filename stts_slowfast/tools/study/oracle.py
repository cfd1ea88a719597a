"""The upper row of a study: selection by the gradient of the loss, with the labels known."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.hooks import all_selectors
from stts_slowfast.standalone.data import UNREADABLE


class _GivenScores(nn.Module):
    """A scorer that returns given scores or, without, zeros that record their gradient."""

    def __init__(self, scorer: nn.Module):
        super().__init__()
        self.shaped = scorer  # only for the shape of its scores
        self.scores: Tensor | None = None
        self.zeros: Tensor | None = None

    def forward(self, *args: Any) -> Tensor:
        if self.scores is not None:
            return self.scores
        self.zeros = torch.zeros_like(self.shaped(*args)).requires_grad_()
        return self.zeros


class Oracle:
    """Makes a model select what the loss depends on: what saliency would teach its scorers.

    Before each forward pass, each selector in turn gets scores: minus the gradient that scores of
    zero have if saliency teaches, with all that arrives kept, and earlier selectors as they are.
    So the scores rank candidates by their share of the saliency of the clip's own loss. It is the
    best that a scorer trained by saliency could learn, not the best selection that there is.

    Args:
        model: in evaluation, with selectors, whose scorers are replaced.

    Attributes:
        labels: (B,) classes of the next batch.
    """

    def __init__(self, model: nn.Module):
        self.selectors = all_selectors(model)
        self.labels: Tensor | None = None
        for selector in self.selectors:
            selector.scorer = _GivenScores(selector.scorer)
            selector.teacher, selector.scheduled = "saliency", True
            selector.keep_all()  # in training mode only
        self.looking = False
        model.register_forward_pre_hook(self._look, prepend=True, with_kwargs=True)

    def _look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.looking or self.labels is None:  # such as to count operations
            return
        self.looking = True
        try:
            for selector in self.selectors:
                selector.scorer.scores = None
                selector.train()
            for selector in self.selectors:
                self._give_scores(selector.scorer, model, args, kwargs)
                selector.eval()
        finally:
            self.looking, self.labels = False, None

    @torch.enable_grad()
    def _give_scores(
        self, scorer: Any, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        assert self.labels is not None
        logits = model(*args, **kwargs)
        labels = self.labels.to(logits.device)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=UNREADABLE, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, scorer.zeros)
        scorer.scores = -gradient
