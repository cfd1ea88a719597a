"""How a function of SlowFast is replaced: once, and wherever it has been imported by name."""

import functools
import sys


def wrap(module, name: str, wrapper) -> None:
    """Replaces ``module.name`` by ``wrapper(stock, ...)``, once; the stock one is its ``stock``.

    Launchers import functions by name (``from slowfast.utils.misc import launch_job``), possibly
    before a hook of ours can run, so modules that hold the stock function get the new one too.
    """
    stock = getattr(module, name)
    if hasattr(stock, "stock"):
        return

    @functools.wraps(stock)
    def guest(*args, **kwargs):
        return wrapper(stock, *args, **kwargs)

    replace(module, name, guest)


def replace(module, name: str, guest) -> None:
    """Puts ``guest`` in the place of ``module.name``, which becomes ``guest.stock``."""
    guest.stock = stock = getattr(module, name)
    setattr(module, name, guest)
    for other in list(sys.modules.values()):
        if getattr(other, "__dict__", {}).get(name) is stock:
            setattr(other, name, guest)
