"""CUDA pretended on a CPU: fake tensors of the device "cuda", and a record of what runs on them.

Only for a process that was started with ``driver_stub.c`` preloaded (``worker.py``). Nothing is
computed: every operation gives a fake tensor with the shape, dtype and device of its result. What
PyTorch decides by asking the GPU is decided here instead: convolutions go to cuDNN, attention to
the flash kernel if its documented constraints are met, else to the memory-efficient one.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from stts_slowfast import constants
from stts_slowfast.fused import replacement

aten = torch.ops.aten

# Operations that launch no kernel: views, allocations, questions about a tensor.
NO_KERNEL = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "expand"),
    *("permute", "transpose", "t", "slice", "select", "alias", "detach", "as_strided", "unbind"),
    *("split", "split_with_sizes", "unflatten", "unfold", "diagonal", "view_as_real"),
    *("view_as_complex", "lift_fresh", "empty", "new_empty", "empty_like", "empty_strided"),
    *("new_empty_strided", "scalar_tensor", "device", "is_pinned", "_pin_memory", "set_"),
}
HOST_READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


class Event:
    """``torch.cuda.Event``, numbered.

    Attributes:
        recorded: how many there were.
        waited_for: the numbers of those that the host waited for.
    """

    recorded = 0
    waited_for: list[int] = []

    def __init__(self, enable_timing: bool = False):
        self.timing = enable_timing

    def record(self) -> None:
        self.number, Event.recorded = Event.recorded, Event.recorded + 1

    def synchronize(self) -> None:
        Event.waited_for.append(self.number)

    def elapsed_time(self, end: "Event") -> float:
        assert self.timing and end.timing and end.number > self.number
        return 1.0


class _Mode(FakeTensorMode):
    avoid_device_init = True  # though CUDA seems to be available


_mode: _Mode | None = None


def install() -> None:
    """Makes PyTorch believe in its GPU, and this package in fake tensors; once a process."""
    global _mode
    _mode = _Mode(allow_non_fake_inputs=True)
    torch.cuda.is_available = lambda: True
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.Event = Event
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn
    torch._C._conv_determine_backend_memory_format = lambda *_, **__: torch.contiguous_format
    # Fake parameters are plain ones, and what is made once for a size is so on a GPU, too.
    replacement.PLAIN = (*replacement.PLAIN, FakeTensor)
    constants._is_short_lived = lambda like: torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """While it is open, tensors are fake, and attention is routed as on a GPU.

    Models are made, and selectors attached, outside of it: fused modules are compared with the
    originals on real numbers.
    """
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _attention
    try:
        with _mode:
            yield
    finally:
        F.scaled_dot_product_attention = real


def to_cuda(model: nn.Module) -> nn.Module:
    """Moves a model, inside :func:`pretended`. ``nn.Module.to`` makes no fake parameters."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
        if hasattr(module, "_make_state"):  # what a selector keeps from one pass to the next
            module._make_state(torch.device("cuda"))
    return model


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))
    widths = {t.shape[-1] for t in (q, k, v)}
    half = q.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and half and len(widths) == 1 and max(widths) <= 256:
        padding = -max(widths) % 8
        if padding:  # as PyTorch does
            scale = scale or max(widths) ** -0.5
            q, k, v = (F.pad(t, (0, padding)) for t in (q, k, v))
        flash = aten._scaled_dot_product_flash_attention
        out = flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return out[..., : max(widths)]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    lse = torch.is_grad_enabled()
    return efficient(q, k, v, attn_mask, lse, dropout_p, is_causal, scale=scale)[0]


class Record(TorchDispatchMode):
    """What runs while it is open.

    Attributes:
        launches: by operation, how many kernels.
        waits: by operation, how often the host waits for the device.
        from_host: by operation, how often it takes a tensor of the CPU's memory.
        outside: tensors that were read or written, but not made while it was open.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.waits, self.from_host = Counter(), Counter(), Counter()
        self._made, self.outside = set(), {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name(function)
        given = _tensors((*args, *kwargs.values()))
        if name in HOST_READS:
            return self._read(name, given, function, args, kwargs)
        for tensor in given:
            if storage(tensor) not in self._made:
                self.outside.setdefault(storage(tensor), tensor)
        out = function(*args, **kwargs)
        made = _tensors(out if isinstance(out, (tuple, list)) else (out,))
        self._made.update(map(storage, made))
        on_device = [x.device.type == "cuda" for x in (*given, *made)]
        if name in ("copy_", "_to_copy"):
            self._copy(name, out, given, args, kwargs)
        elif name != "fill_" and any(on_device) and not all(on_device):
            self.from_host[name] += 1  # fill_ has a number, which goes along with the launch
        if name not in NO_KERNEL and any(on_device):
            self.launches[name] += 1
        return out

    def _read(self, name, given, function, args, kwargs):
        """A number that the host reads: 0 or False, for there is none."""
        if any(x.is_cuda for x in given):
            self.waits[name] += 1
        elif type(given[0]) is Tensor:
            return function(*args, **kwargs)
        if name == "nonzero":
            raise RuntimeError("the number of results of nonzero depends on the device's numbers")
        return False if name in ("is_nonzero", "equal") or given[0].dtype == torch.bool else 0

    def _copy(self, name, out, given, args, kwargs) -> None:
        source = given[-1]
        if source.device == out.device:
            return
        waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        if waits:
            self.waits[f"{name} from {source.device.type} to {out.device.type}"] += 1
        elif source.device.type == "cpu":
            self.from_host[name] += 1


@functools.cache
def _name(function) -> str:
    return function._schema.name.partition("::")[2]


def _tensors(values) -> list[Tensor]:
    """Those among arguments or results, lists of them included."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def storage(tensor: Tensor) -> int:
    """What tells the memory of one tensor from another's; views share it."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While it is open, PyTorch says that a CUDA graph is being captured."""
    real = torch.cuda.is_current_stream_capturing
    torch.cuda.is_current_stream_capturing = lambda: True
    try:
        yield
    finally:
        torch.cuda.is_current_stream_capturing = real
