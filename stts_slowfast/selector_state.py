"""What a selector remembers between forward passes: its noise level, and scores that overflowed."""

import torch
from torch import Tensor, nn

from stts_slowfast.topk import NOT_FINITE, is_cpu, is_exporting


class SelectorState(nn.Module):
    """The state of a selector, in static 0-dim tensors that are changed in place.

    Compiled and captured graphs read and write them wherever they are replayed. They are no
    buffers: DDP would send those in every forward pass, ``to_empty`` would leave them
    uninitialised.

    Args:
        sigma: the noise level before the first step of a schedule.

    Attributes:
        sigma: the present noise level; set it to change the tensor.
    """

    key: str

    def __init__(self, sigma: float):
        super().__init__()
        self.initial_sigma = self._sigma = float(sigma)
        self._make_state(torch.device("cpu"))

    def _make_state(self, device: torch.device) -> None:
        """Makes what outlives a forward pass, where scores will be."""
        with torch.inference_mode(False):  # whose tensors could not be changed outside of it
            self._sigma_tensor = torch.full((), self._sigma, dtype=torch.float32, device=device)
            self._nonfinite = torch.zeros((), dtype=torch.bool, device=device)
            # The same, as it arrives on the host.
            pinned = device.type == "cuda"
            self._nonfinite_host = torch.zeros((), dtype=torch.bool, pin_memory=pinned)
        if device.type == "cuda":
            for tensor in (self._sigma_tensor, self._nonfinite):
                torch._dynamo.mark_static_address(tensor)  # for torch.compile's CUDA graphs

    def _state_to(self, device: torch.device) -> None:
        # Scores may be on a device to which nobody has moved the module: FSDP2, accelerate and
        # DataParallel move parameters alone. A graph under construction makes no state.
        if self._sigma_tensor.device != device and not torch.compiler.is_compiling():
            self._make_state(device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = fn(torch.empty_like(self._sigma_tensor)).device
        if device.type != "meta":
            self._state_to(device)
        return self

    def __getstate__(self) -> dict:
        state = ("_sigma_tensor", "_nonfinite", "_nonfinite_host")
        return {key: value for key, value in self.__dict__.items() if key not in state}

    def __setstate__(self, state: dict) -> None:
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

    def raise_on_nan(self, wait: bool = True) -> None:
        """Raises if scores of a forward pass since the last call were not finite.

        Args:
            wait: for a device. If not, a call raises for what the device had done by the call
                before.

        Raises:
            ValueError: naming the selector.
        """
        if not wait and not is_cpu(self._nonfinite):
            known = bool(self._nonfinite_host)
            self._nonfinite_host.copy_(self._nonfinite, non_blocking=True)
            if not known:
                return
        if self._nonfinite:
            self._nonfinite.zero_()
            self._nonfinite_host.zero_()
            raise ValueError(f"STTS {self.key}: {NOT_FINITE}")

    def check_finite(self, scores: Tensor) -> None:
        """Raises for scores that are NaN or infinite: at once on a CPU, elsewhere without ever
        waiting for the device.

        There they are noted, and the first forward pass that finds the note on the host raises;
        :meth:`raise_on_nan` is for who waits for the device anyway.

        Args:
            scores: normalised, which makes a NaN of an infinite one.
        """
        if scores.is_meta or torch.jit.is_tracing() or is_exporting():
            return
        found = scores.detach().isnan().any()
        self._state_to(scores.device)
        if self._nonfinite.device != scores.device:  # a graph whose selector was never moved
            self._nonfinite = found
            return
        self._nonfinite.logical_or_(found)
        if torch.compiler.is_compiling():
            return
        if is_cpu(scores) or self._nonfinite_host:
            self.raise_on_nan()
        else:
            self._nonfinite_host.copy_(self._nonfinite, non_blocking=True)
