"""How a function of SlowFast is replaced: once, and wherever it has been imported by name."""

import functools
import sys


def wrap(module, name: str, wrapper) -> None:
    """Replaces ``module.name`` by ``wrapper(stock, ...)``, once; the stock one is its ``stock``.

    Launchers import functions by name (``from slowfast.utils.misc import launch_job``), possibly
    before a hook of ours can run, so modules that hold the stock function get the new one too.
    Several wrappers of one function call each other, the last one first.
    """
    stock = getattr(module, name)
    if is_wrapped(stock, wrapper):
        return

    @functools.wraps(stock)
    def guest(*args, **kwargs):
        return wrapper(stock, *args, **kwargs)

    guest.stock, guest.wrapper = stock, wrapper
    setattr(module, name, guest)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is stock:
            setattr(other, name, guest)


def is_wrapped(function, wrapper=None) -> bool:
    """Whether a function is replaced: by this wrapper, or by any."""
    while hasattr(function, "stock"):
        if wrapper in (None, function.wrapper):
            return True
        function = function.stock
    return False
