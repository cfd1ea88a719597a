"""What a selector remembers between forward passes: noise level, budget, overflowed scores."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stts_slowfast.budgets import Share, keep_range
from stts_slowfast.topk import NOT_FINITE, is_cpu, is_exporting

# Shares are kept in billionths: torch.compile takes a module's whole numbers for constants, but its
# floats for variables as soon as two selectors differ, and no shape can depend on those.
KEEP_SCALE = 10**9

UNSCHEDULED = (
    "selectors train without a schedule: sigma keeps its first value, and KEEP is used from the "
    "start, of a range or with budget annealing too; before each iteration call step(epoch) of "
    "stts_slowfast.Schedule(model, optimizer, ...), or stts_slowfast.set_progress(model, fraction)"
)


class SelectorState(nn.Module):
    """The state of a selector, in static 0-dim tensors that are changed in place.

    Compiled and captured graphs read and write them wherever they are replayed. They are not
    buffers: DDP would send those in every forward pass, ``to_empty`` would leave them
    uninitialised.

    Args:
        block: the block that the selector precedes.
        keep: share of what arrives that is kept, or a range of shares.
        sigma: the noise level before the first step of a schedule.
        sigma_decay, shrink, teacher: as in the node (``STTS.SIGMA_DECAY`` and so on).

    Attributes:
        sigma: the present noise level; set it to change the tensor.
        share: low and high end of the share that is kept.
        sample: position in the range of sizes, in billionths; None if a range was never sampled.
        widening: how far the budget is from there to all that arrives, in billionths.
        scheduled: whether progress was set (``annealing.set_progress``), or its lack warned about.
    """

    dimension: str  # one of budgets.DIMENSIONS
    per_frame = False  # whether single tokens are selected frame by frame

    def __init__(
        self,
        block: int,
        keep: Share,
        sigma: float = 0.2,
        sigma_decay: str = "linear",
        shrink: float = 0.0,
        teacher: str = "mixture",
    ):
        super().__init__()
        self.block = block
        self.initial_sigma = self._sigma = float(sigma)
        self.sigma_decay, self.shrink, self.teacher = sigma_decay, shrink, teacher
        self.set_share(keep)
        self.widening = 0
        self.scheduled = False
        self._make_state(torch.device("cpu"))

    @property
    def key(self) -> str:
        """Its name in ``model.stts``: ``time_0``, ``space_4``, ``tokens_4``."""
        return f"{self.dimension.lower()}_{self.block}"

    @property
    def learns_from_saliency(self) -> bool:
        """Whether iterations that keep all tokens teach its scorer."""
        return self.teacher != "mixture" and any(True for _ in self.parameters())

    @property
    def share_text(self) -> str:
        """The share in words."""
        return " to ".join(f"{share:g}" for share in dict.fromkeys(self.share))

    # --- budget -----------------------------------------------------------------------------------

    def set_share(self, keep: Share) -> None:
        """Sets the share that is kept, or a range of which nothing was sampled yet."""
        self.share = keep_range(keep)
        self.low, self.high = (round(share * KEEP_SCALE) for share in self.share)
        self.sample: int | None = 0 if self.low == self.high else None

    def set_budget(self, sample: float, widening: float = 0.0) -> None:
        """Sets what is kept in training until the next call; evaluation keeps the high end.

        Args:
            sample: position in the range of sizes, 0..1; ignored for a single share.
            widening: how far the budget is from there to all that arrives, 0..1.
        """
        if self.low != self.high:
            self.sample = round(sample * KEEP_SCALE)
        self.widening = round(widening * KEEP_SCALE)

    def keep_all(self) -> None:
        """Widens the budget to all that arrives, until the next :meth:`set_budget`."""
        self.widening = KEEP_SCALE

    def reset(self) -> None:
        """Sets KEEP (of a range, its high end) and the initial sigma, as before a schedule."""
        self.sigma = self.initial_sigma
        self.set_budget(1.0)

    def check_schedule(self) -> None:
        """Warns once if a selector trains and its progress was never set.

        Raises:
            ValueError: if only saliency teaches, which it does at budgets that a schedule sets.
        """
        if self.scheduled or not self.training or not torch.is_grad_enabled():
            return
        if self.teacher == "saliency" and self.learns_from_saliency:
            raise ValueError(
                f"saliency alone teaches {self.key} (STTS.TEACHER saliency, or both for single "
                "tokens), in iterations that keep all tokens, but no budget was set: before each "
                "iteration call step(epoch) of "
                "stts_slowfast.Schedule(model, optimizer, ...), or "
                "stts_slowfast.set_progress(model, fraction)"
            )
        self.scheduled = True
        if self.sample is None:
            self.set_budget(1.0)
        if self.sigma_decay == "constant" and not self.shrink and self.low == self.high:
            return
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime  # runs as the graph is made

            comptime(lambda _: warnings.warn(UNSCHEDULED, stacklevel=1))
        elif not torch.jit.is_tracing():
            warnings.warn(UNSCHEDULED, stacklevel=1)

    # --- tensors ----------------------------------------------------------------------------------

    def _make_state(self, device: torch.device) -> None:
        """Makes the tensors on the device of the scores."""
        with torch.inference_mode(False):  # whose tensors could not be changed outside of it
            self._sigma_tensor = torch.full((), self._sigma, dtype=torch.float32, device=device)
            self._nan_flag = torch.zeros((), dtype=torch.bool, device=device)
            # The same flag, copied to the host.
            pinned = device.type == "cuda"
            self._nan_flag_host = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        if device.type == "cuda":
            for tensor in (self._sigma_tensor, self._nan_flag):
                torch._dynamo.mark_static_address(tensor)  # for torch.compile's CUDA graphs

    def _state_to(self, device: torch.device) -> None:
        # Scores may be on another device than the module was moved to: FSDP2, accelerate and
        # DataParallel move only parameters. A graph under construction makes no state.
        if self._sigma_tensor.device != device and not torch.compiler.is_compiling():
            self._make_state(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SelectorState":
        super()._apply(fn, recurse)
        device = fn(torch.empty_like(self._sigma_tensor)).device
        if device.type != "meta":
            self._state_to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = ("_sigma_tensor", "_nan_flag", "_nan_flag_host")
        return {key: value for key, value in self.__dict__.items() if key not in state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        device = next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))
        self._make_state(device)

    @property
    def sigma(self) -> float:
        return self._sigma

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._sigma = float(value)
        self._sigma_tensor.fill_(self._sigma)

    # --- scores that are not finite ---------------------------------------------------------------

    @property
    def nan_flag(self) -> Tensor:
        """Whether any score was non-finite since the last :meth:`raise_on_nan`: 0-dim, on the
        scores' device."""
        return self._nan_flag

    def raise_on_nan(self, wait: bool = True) -> None:
        """Raises if any score was non-finite since the last call.

        Args:
            wait: for a device. If False, raises only for what had finished by the previous
                call.

        Raises:
            ValueError: naming the selector.
        """
        if not wait and not is_cpu(self._nan_flag):
            known = bool(self._nan_flag_host)
            self._nan_flag_host.copy_(self._nan_flag, non_blocking=True)
            if not known:
                return
        if self._nan_flag:
            self._nan_flag.zero_()
            self._nan_flag_host.zero_()
            raise ValueError(f"STTS {self.key}: {NOT_FINITE}")

    def check_finite(self, scores: Tensor) -> None:
        """Raises for scores that are NaN or infinite, without ever waiting for a device.

        On a CPU it raises at once. On a device a flag is set and copied to the host, and the first
        forward pass that finds it there raises; :meth:`raise_on_nan` reads it from the device.

        Args:
            scores: normalised, which turns infinity into NaN.
        """
        if scores.is_meta or torch.jit.is_tracing() or is_exporting():
            return
        is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if not torch.compiler.is_compiling() and is_wrapped(scores):
            return  # under torch.func no state can be changed
        found = scores.detach().isnan().any()
        self._state_to(scores.device)
        if self._nan_flag.device != scores.device:  # a graph whose selector was never moved
            self._nan_flag = found
            return
        self._nan_flag.logical_or_(found)
        if torch.compiler.is_compiling():
            return
        if is_cpu(scores) or self._nan_flag_host:
            self.raise_on_nan()
        else:
            self._nan_flag_host.copy_(self._nan_flag, non_blocking=True)
