"""How functions of SlowFast are replaced, and methods of one of its objects."""

import contextlib
import functools
import sys


def wrap(module, name: str, wrapper, everywhere: bool = True) -> None:
    """Replaces ``module.name`` by a function that calls ``wrapper(stock, ...)``.

    A second call with the same wrapper does nothing. Of several wrappers of one function the last
    is called first. The new function has the replaced one as ``stock``.

    Args:
        module: or class.
        everywhere: launchers import functions by name (``from slowfast.utils.misc import
            launch_job``), possibly before this call, so all modules that hold the stock function
            get the new one; False for what SlowFast imports from another library.
    """
    stock = getattr(module, name)
    if is_wrapped(stock, wrapper):
        return

    attributes = () if isinstance(stock, type) else functools.WRAPPER_UPDATES

    @functools.wraps(stock, updated=attributes)
    def wrapped(*args, **kwargs):
        return wrapper(stock, *args, **kwargs)

    wrapped.stock, wrapped.wrapper = stock, wrapper
    setattr(module, name, wrapped)
    for other in list(sys.modules.values()) if everywhere else ():
        if getattr(other, "__dict__", {}).get(name) is stock:
            setattr(other, name, wrapped)


def is_wrapped(function, wrapper=None) -> bool:
    """Whether a function was replaced: by this wrapper, or by any."""
    while hasattr(function, "stock"):
        if wrapper in (None, function.wrapper):
            return True
        function = function.stock
    return False


@contextlib.contextmanager
def replaced_methods(instance, methods):
    """In this context ``instance.name(...)`` is ``methods[name](stock method, instance, ...)``."""
    for name, method in methods.items():
        setattr(instance, name, functools.partial(method, getattr(instance, name), instance))
    try:
        yield
    finally:
        for name in methods:
            vars(instance).pop(name, None)
