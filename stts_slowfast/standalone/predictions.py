"""What a model says of a batch in validation and testing: float32 logits, finite or refused."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stts_slowfast.selectors import Selector


def predict(model: nn.Module, clips: Tensor, videos: Sequence, numbers: Tensor) -> Tensor:
    """Logits (B, classes) float32 of normalised clips (B, 3, T, H, W), outside autocast.

    Args:
        videos, numbers: a list's entries, and which of them each clip is from (B,).

    Raises:
        ValueError: naming the video, and the layer, by which they are not finite.
    """
    try:
        logits = float32_logits(model, clips)
        if bool(logits.isfinite().all()):
            return logits
    except ValueError:  # a selector whose scores are not finite
        if not _explanation(model, clips):
            raise
    for number, clip in zip(numbers.tolist(), clips):
        if reason := _explanation(model, clip[None]):
            raise ValueError(
                f"the model's outputs for {videos[number].path} are no numbers: {reason}"
            )
    first = videos[int(numbers[0])].path
    raise ValueError(
        f"the model's outputs for a batch with {first} are no numbers, but for each of its clips "
        "alone they are: is the device sound?"
    )


def float32_logits(model: nn.Module, clips: Tensor) -> Tensor:
    """Validation and testing leave autocast, as in SlowFast."""
    with torch.autocast(clips.device.type, enabled=False):
        return model(clips.float()).float()


def _explanation(model: nn.Module, clips: Tensor) -> str:
    """Where values that are not finite come up first; empty if the outputs are finite."""
    found: list[str] = []

    def look_at(name: str):
        def look(module, args, output) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
            if not all(bool(x.isfinite().all()) for x in tensors):
                found.append(name)

        return look

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look_at(name)) for name, module in named]
    logits = None
    _forget_notes(model)
    try:
        with contextlib.suppress(ValueError):
            logits = float32_logits(model, clips)
    finally:
        _forget_notes(model)
        for handle in handles:
            handle.remove()
    if logits is not None and bool(logits.isfinite().all()):
        return ""
    if not bool(clips.isfinite().all()):
        return "its clip holds values that are not finite"
    if broken := [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]:
        more = f" and {len(broken) - 1} others" if len(broken) > 1 else ""
        return f"the weights {broken[0]}{more} hold values that are not finite"
    return f"they first are none in the layer {found[0] if found else 'behind the last one'}"


def _forget_notes(model: nn.Module) -> None:
    """Of NaN scores on a device, which the next forward pass would raise for."""
    for module in model.modules():
        if isinstance(module, Selector):
            with contextlib.suppress(ValueError):
                module.raise_on_nan()
