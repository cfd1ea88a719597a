"""How functions of SlowFast are replaced, and methods of one of its objects."""

import contextlib
import functools
import sys


def wrap(module, name: str, wrapper, everywhere: bool = True) -> None:
    """Replaces ``module.name`` by a function that calls ``wrapper(original, ...)``.

    A second call with the same wrapper does nothing. Of several wrappers of one function the last
    is called first. The new function has the replaced one as ``original``.

    Args:
        module: or class.
        everywhere: launchers import functions by name (``from slowfast.utils.misc import
            launch_job``), possibly before this call, so all modules that hold the original function
            get the new one; False for what SlowFast imports from another library.
    """
    original = getattr(module, name)
    if is_wrapped(original, wrapper):
        return

    attributes = () if isinstance(original, type) else functools.WRAPPER_UPDATES

    @functools.wraps(original, updated=attributes)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)

    wrapped.original, wrapped.wrapper = original, wrapper
    setattr(module, name, wrapped)
    for other in list(sys.modules.values()) if everywhere else ():
        if getattr(other, "__dict__", {}).get(name) is original:
            setattr(other, name, wrapped)


def is_wrapped(function, wrapper=None) -> bool:
    """Whether a function was replaced: by this wrapper, or by any."""
    while hasattr(function, "original"):
        if wrapper in (None, function.wrapper):
            return True
        function = function.original
    return False


@contextlib.contextmanager
def replaced_methods(instance, methods):
    """Context manager: ``instance.name(...)`` is ``methods[name](original, instance, ...)``."""
    for name, method in methods.items():
        setattr(instance, name, functools.partial(method, getattr(instance, name), instance))
    try:
        yield
    finally:
        for name in methods:
            vars(instance).pop(name, None)
