"""The outputs of a model in validation and testing: float32 logits, which must be finite."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from stts_slowfast.evaluation import uncompiled
from stts_slowfast.selectors import Selector
from stts_slowfast.standalone.data import normalize_clips
from stts_slowfast.standalone.run_logger import HostCopy


class Predictions:
    """Outputs of a model for batch after batch. A device does not wait for the host: it has the
    next batch to do while the host reads the outputs of the one before.

    Args:
        model: in evaluation, inside ``evaluating``.
        cfg: of its input.
        videos: the records of the list, for messages.
        outputs: of logits (B, classes) and labels (B,) on their device, what the host reads.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg,
        videos: Sequence,
        outputs: Callable[[Tensor, Tensor], Tensor],
    ):
        self.model, self.cfg, self.videos, self.outputs = model, cfg, videos, outputs
        self.pending: deque[_Pending] = deque()

    def add(self, clips: Tensor, labels: Tensor, numbers: Tensor, *more: Tensor) -> None:
        """Launches the model on a batch.

        Args:
            clips: (B, 3, T, H, W) on the model's device, see ``normalize_clips``.
            labels: (B,) on any device.
            numbers: (B,) on the CPU, the index of each clip's video.
            more: what :meth:`read` returns besides.

        Raises:
            ValueError: if a selector's scores are not finite, as in :meth:`read`.
        """
        labels = labels.to(clips.device, non_blocking=True)
        try:
            logits = self.model(normalize_clips(clips, self.cfg).float()).float()
        except ValueError:  # of this batch or, on a device, of one before
            self.pending.append(_Pending(clips, numbers, more))
            for batch in self.pending:
                self._check_clips(batch)
            raise
        is_broken = logits.isfinite().logical_not().any()
        outputs = HostCopy(self.outputs(logits, labels), is_broken)
        self.pending.append(_Pending(clips, numbers, more, outputs))

    def read(self, is_last: bool = True) -> Iterator[tuple[Tensor, ...]]:
        """The outputs of each batch that is done, its ``numbers`` and ``more``, on the CPU.

        Args:
            is_last: wait for the last batch too; else a device does it meanwhile.

        Raises:
            ValueError: if logits are not finite, naming the video and the layer.
        """
        while self.pending and (is_last or len(self.pending) > self.pending[-1].clips.is_cuda):
            batch = self.pending.popleft()
            outputs, is_broken = batch.outputs.read()
            if is_broken:
                self._check_clips(batch)
                first = self.videos[int(batch.numbers[0])].path
                raise ValueError(
                    f"the model's outputs for a batch with {first} are not finite, but those for "
                    "each of its clips by itself are: check the device"
                )
            yield outputs, batch.numbers, *batch.more

    def _check_clips(self, batch: "_Pending") -> None:
        """Raises if the outputs for a clip of the batch by itself are not finite."""
        for number, clip in zip(batch.numbers.tolist(), normalize_clips(batch.clips, self.cfg)):
            if reason := _explanation(self.model, clip[None]):
                raise ValueError(
                    f"the model's outputs for {self.videos[number].path} are not finite: {reason}"
                )


class _Pending(NamedTuple):
    """A batch that was launched."""

    clips: Tensor
    numbers: Tensor
    more: tuple[Tensor, ...]
    outputs: Any = None  # HostCopy, of what is read and whether logits are not finite


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
