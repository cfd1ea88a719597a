"""Names of hosts before 0.2, for hosts in other packages; they are removed in 0.4."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from stts_slowfast.grid import Grid

METHODS = {
    "read": "unpack",
    "write": "pack",
    "arrived": "incoming_grid",
    "hand_on": "set_block_grid",
}


class OldTokens(NamedTuple):
    """``Tokens`` as ``write`` took them."""

    grid: Tensor
    thw: Grid
    clip: Tensor | None
    frames: Tensor | None


def adopt_old_methods(host: type) -> None:
    """Gives a host whose methods have old names those of today, and warns."""
    old = [name for name in METHODS if name in vars(host)]
    if not old:
        return
    pairs = ", ".join(f"{name} to {METHODS[name]}" for name in old)
    warnings.warn(
        f"the host {host.__name__} has methods with old names: rename {pairs} (and in Tokens clip "
        "to cls, frames to frame_cls); old names are removed in stts-slowfast 0.4",
        FutureWarning,
        stacklevel=3,
    )
    adapters = {"read": _unpack, "write": _pack}
    for name in old:
        method = vars(host)[name]
        setattr(host, METHODS[name], adapters.get(name, lambda method: method)(method))


def _unpack(read: Callable[..., Any]) -> Callable[..., Any]:
    def renamed(tokens: Any) -> Any:
        return tokens._replace(
            cls=tokens.cls if tokens.clip is None else tokens.clip,
            frame_cls=tokens.frame_cls if tokens.frames is None else tokens.frames,
        )

    @functools.wraps(read)
    def unpack(*args: Any, **kwargs: Any) -> Any:
        tokens = read(*args, **kwargs)
        return [renamed(each) for each in tokens] if isinstance(tokens, list) else renamed(tokens)

    return unpack


def _pack(write: Callable[..., Any]) -> Callable[..., Any]:
    def renamed(tokens: Any) -> OldTokens:
        return OldTokens(tokens.grid, tokens.thw, tokens.cls, tokens.frame_cls)

    @functools.wraps(write)
    def pack(self: Any, tokens: Any, *args: Any) -> Any:
        packed = isinstance(tokens, list)
        return write(self, [renamed(x) for x in tokens] if packed else renamed(tokens), *args)

    return pack
