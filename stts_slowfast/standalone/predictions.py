"""The outputs of a model in validation and testing: float32 logits, which must be finite."""

import contextlib
from collections.abc import Sequence

from torch import Tensor, nn

from stts_slowfast.evaluation import uncompiled
from stts_slowfast.selectors import Selector


def predict(model: nn.Module, clips: Tensor, videos: Sequence, numbers: Tensor) -> Tensor:
    """Logits (B, classes) float32 of normalised clips (B, 3, T, H, W), inside ``evaluating``.

    Args:
        videos, numbers: the records of a list, and the index of each clip's video (B,).

    Raises:
        ValueError: if they are not finite, naming the video and the layer.
    """
    try:
        logits = model(clips.float()).float()
        if bool(logits.isfinite().all()):
            return logits
    except ValueError:  # a selector whose scores are not finite
        if not _explanation(model, clips):
            raise
    for number, clip in zip(numbers.tolist(), clips):
        if reason := _explanation(model, clip[None]):
            raise ValueError(
                f"the model's outputs for {videos[number].path} are not finite: {reason}"
            )
    first = videos[int(numbers[0])].path
    raise ValueError(
        f"the model's outputs for a batch with {first} are not finite, but those for each of its "
        "clips by itself are: check the device"
    )


def _explanation(model: nn.Module, clips: Tensor) -> str:
    """Which values are not finite first; empty if the outputs are finite."""
    layers: list[str] = []

    def check_output(name: str):
        def hook(module, args, output) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor) and x.is_floating_point()]
            if not all(bool(x.isfinite().all()) for x in tensors):
                layers.append(name)

        return hook

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(check_output(name)) for name, module in named]
    logits = None
    _clear_nan_flags(model)
    try:
        with contextlib.suppress(ValueError), uncompiled(model):
            logits = model(clips.float()).float()
    finally:
        _clear_nan_flags(model)
        for handle in handles:
            handle.remove()
    if logits is not None and bool(logits.isfinite().all()):
        return ""
    if not bool(clips.isfinite().all()):
        return "its clip has values that are not finite"
    if broken := [n for n, p in model.named_parameters() if not bool(p.isfinite().all())]:
        more = f" and {len(broken) - 1} others" if len(broken) > 1 else ""
        return f"the weights {broken[0]}{more} have values that are not finite"
    return f"the first such layer is {layers[0] if layers else 'after the last one'}"


def _clear_nan_flags(model: nn.Module) -> None:
    """Clears the flags of NaN scores, for which the next forward pass would raise."""
    for module in model.modules():
        if isinstance(module, Selector):
            with contextlib.suppress(ValueError):
                module.raise_on_nan()
