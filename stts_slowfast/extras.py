"""Packages that only some commands need: a missing one is a sentence with the line to type."""

import importlib
from types import ModuleType


class MissingPackageError(ValueError):
    """A package is not installed; the message has the pip line."""


def need(module: str, extra: str) -> ModuleType:
    """Imports a module of a package that is optional.

    Args:
        module: full name, such as ``matplotlib.figure``.
        extra: the extra of ``setup.cfg`` that brings it.

    Raises:
        MissingPackageError: where the package is missing, with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).partition(".")[0]
        if package != module.partition(".")[0]:
            raise  # the package is there and broken
        raise MissingPackageError(
            f"this needs {package}, which is not installed: pip install 'stts-slowfast[{extra}]'"
        ) from error
