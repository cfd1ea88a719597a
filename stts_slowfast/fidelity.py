"""How closely a model with selection follows the same model on all tokens, without labels.

An :class:`OutputRecorder` records what a model computes for a list of clips, :func:`compare`
compares two such records.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_slowfast.budgets import interpolate_share
from stts_slowfast.call_context import first_tensor
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.hooks import all_selectors
from stts_slowfast.hosts import Host, base_model, resolve_host, unwrap
from stts_slowfast.scorers import SCORERS
from stts_slowfast.token_scorers import TOKEN_SCORERS

# Where outputs of transformers have features, in order.
_FEATURES = ("pooler_output", "image_embeds", "last_hidden_state")


@dataclass
class Outputs:
    """What a model computes for clips, one row per clip.

    Attributes:
        features: ``(N, C)`` float32: what the classifier reads; of a model without classes, its
            output. Tokens and frames of a clip are averaged.
        logits: ``(N, classes)`` float32; None for a model without classes.
    """

    features: Tensor
    logits: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Outputs":
        """Both tensors after a function, such as one that selects rows."""
        logits = None if self.logits is None else function(self.logits)
        return Outputs(function(self.features), logits)


def join(parts: Sequence[Outputs]) -> Outputs:
    """The rows of several outputs, one after the other.

    Raises:
        ValueError: if there are none.
    """
    if not parts:
        raise ValueError("there are no clips: give one at least, in a list or loader, no iterator")
    logits = [part.logits for part in parts if part.logits is not None]
    features = torch.cat([part.features for part in parts])
    return Outputs(features, torch.cat(logits) if logits else None)


class OutputRecorder:
    """Records features and logits of every call of a model while it is open.

    .. code-block:: python

        with OutputRecorder(model) as recorder:
            for batch in clips:
                model(batch)
        outputs = recorder.outputs()

    A model has classes if its output has ``logits``, or is the output of one of its linear layers
    outside the blocks, the classifier. Its features are the input of that layer (else they are the
    logits).

    Args:
        model: with or without selectors.
        classes: whether the model has classes; None to find it out as above.
    """

    def __init__(self, model: nn.Module, classes: bool | None = None):
        self.model, self.classes = model, classes
        host, self.blocks = _host(model)
        self.by_frame = bool(getattr(host, "by_frame", False))
        self.calls: list[Outputs] = []
        self._linear: list[tuple[Tensor, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> "OutputRecorder":
        parts = [*self.blocks, *all_selectors(self.model)]
        inside = {id(module) for part in parts for module in part.modules()}
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and id(module) not in inside:
                self._handles.append(module.register_forward_hook(self._after_linear))
        self._handles.append(self.model.register_forward_hook(self._after_call, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._linear = [], []

    def outputs(self) -> Outputs:
        """Those of all calls, detached and on the CPU."""
        return join(self.calls).map(lambda x: x.detach().cpu())

    def pop(self) -> Outputs:
        """Those of the last call, with their graph; they are recorded no longer."""
        return self.calls.pop()

    def _after_linear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._linear.append((args[0], output))

    def _after_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        linear, self._linear = self._linear, []
        clips = len(first_tensor(args, kwargs))
        if self.by_frame:
            clips //= getattr(base_model(unwrap(self.model)), "num_frames", 1)
        found, is_logits = _main_output(output)
        classifier = next((x for x, y in reversed(linear) if y.shape[-1] == found.shape[-1]), None)
        classes = self.classes
        if classes is None:
            classes = is_logits or any(y.data_ptr() == found.data_ptr() for _, y in linear)
        rows = per_clip(found, clips)
        if not classes:
            self.calls.append(Outputs(rows))
            return
        features = rows if classifier is None else per_clip(classifier, clips)
        self.calls.append(Outputs(features, rows))


def run(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a batch: a tensor, a mapping of keywords, or a sequence of arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@torch.no_grad()
def outputs(model: nn.Module, batches: Iterable[Any], classes: bool | None = None) -> Outputs:
    """What a model computes for clips in evaluation.

    Raises:
        ValueError: without clips, or if the outputs are not finite.
    """
    model.eval()
    with OutputRecorder(model, classes) as recorder:
        for batch in batches:
            run(model, batch)
    found = recorder.outputs()
    if not bool(found.features.isfinite().all()):
        raise ValueError(
            f"outputs of this {type(model).__name__} are not finite: look at weights and clips"
        )
    return found


@contextlib.contextmanager
def budget_at(model: nn.Module, position: float) -> Iterator[str]:
    """Sets one share in every selector while it is open, for evaluation.

    Args:
        model: with selectors.
        position: in the range of shares, 0 for its low end to 1 for its high end, geometrically.

    Yields:
        The shares in words: ``time_0 0.5, space_4 0.25``.
    """
    selectors = all_selectors(model)
    before = [(selector, selector.share, selector.sample) for selector in selectors]
    try:
        for selector in selectors:
            selector.set_share(interpolate_share(selector.share, position))
        yield ", ".join(f"{selector.key} {selector.share_text}" for selector in selectors)
    finally:
        for selector, share, sample in before:
            selector.set_share(share)
            selector.sample = sample


@contextlib.contextmanager
def replaced_scorers(model: nn.Module, name: str) -> Iterator[None]:
    """Puts another scorer into every selector while it is open.

    Args:
        model: with selectors.
        name: of ``scorers.SCORERS`` and, if it selects single tokens,
            ``token_scorers.TOKEN_SCORERS``.

    Raises:
        ValueError: for a name that one of the selectors does not know.
    """
    host, blocks = resolve_host(unwrap(model))
    before = [(selector, selector.scorer) for selector in all_selectors(model)]
    try:
        for selector, scorer in before:
            block = blocks[selector.block]
            registry = TOKEN_SCORERS if selector.dimension == "TOKENS" else SCORERS
            check_choice(f"the scorer of {selector.key}", name, [known for known, _ in registry])
            kind = () if selector.dimension == "TOKENS" else (selector.dimension,)
            other = registry.get(name)(*kind, host.channels(block))
            if hasattr(other, "bind"):
                other.bind(block)
            selector.scorer = other.to(next(block.parameters()).device).train(scorer.training)
        yield
    finally:
        for selector, scorer in before:
            selector.scorer = scorer


def per_clip(x: Tensor, clips: int) -> Tensor:
    """``(clips, C)`` float32: means over the frames and tokens of each clip.

    Args:
        x: ``(N, ..., C)``, ``N`` a multiple of ``clips``, clip after clip.
        clips: their number.

    Raises:
        ValueError: if the rows are no whole number per clip.
    """
    if not clips or len(x) % clips:
        raise ValueError(
            f"outputs of shape {tuple(x.shape)} are not of {clips} clips: of a model that reads "
            "frames, set model.num_frames to the frames of a clip"
        )
    return x.float().reshape(clips, -1, x.shape[-1]).mean(dim=1)


def compare(reference: Outputs, selected: Outputs) -> dict[str, float | None]:
    """How well a model with selection agrees with the model on all tokens.

    Args:
        reference: of all tokens.
        selected: of the same clips in the same order.

    Returns:
        ``top1_agreement``, the share of clips in percent for which both predict the same class;
        ``kl``, the mean Kullback-Leibler divergence in nats of the selected model's class
        probabilities from those of all tokens; ``features_cosine`` and ``logits_cosine``, means of
        the clips' cosines after the mean of all clips on all tokens was subtracted from both. What
        the model does not have, and cosines of a single clip, are None.

    Raises:
        ValueError: for other clips.
    """
    if len(reference.features) != len(selected.features):
        raise ValueError(
            f"outputs of {len(selected.features)} clips are compared with {len(reference.features)}"
        )
    found: dict[str, float | None] = dict.fromkeys(("top1_agreement", "kl", "logits_cosine"))
    found["features_cosine"] = centred_cosine(reference.features, selected.features)
    if reference.logits is not None and selected.logits is not None:
        same = reference.logits.argmax(dim=1) == selected.logits.argmax(dim=1)
        found["top1_agreement"] = round(100.0 * same.float().mean().item(), 3)
        found["kl"] = round(divergence(reference.logits, selected.logits).item(), 5)
        found["logits_cosine"] = centred_cosine(reference.logits, selected.logits)
    return found


def divergence(reference: Tensor, selected: Tensor) -> Tensor:
    """Mean KL divergence in nats of two ``(N, classes)`` logits, reference first."""
    log_p, log_q = reference.log_softmax(dim=1), selected.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def centred_cosine(reference: Tensor, selected: Tensor) -> float | None:
    """Mean cosine of ``(N, C)`` rows after the mean of ``reference`` was subtracted from both."""
    if len(reference) < 2:
        return None
    mean = reference.mean(dim=0)
    return round(F.cosine_similarity(reference - mean, selected - mean, dim=1).mean().item(), 5)


def _main_output(output: Any) -> tuple[Tensor, bool]:
    """The logits or features in a model's output, and whether they are named logits."""
    if isinstance(output, Tensor):
        return output, False
    if (logits := getattr(output, "logits", None)) is not None:
        return logits, True
    for name in _FEATURES:
        if (found := getattr(output, name, None)) is not None:
            return found, False
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0], False
    raise ValueError(
        f"the model returns a {type(output).__name__}: neither a tensor nor an output with logits, "
        f"{', '.join(_FEATURES)}"
    )


def _host(model: nn.Module) -> tuple[Host | None, list[nn.Module]]:
    """The host of a model and its blocks; a model that cannot have selectors has neither."""
    try:
        return resolve_host(unwrap(model))
    except ValueError:
        return None, []
