"""Optional packages, and packages that register scorers, operators, hosts or families."""

import functools
import importlib
from importlib.metadata import entry_points
from types import ModuleType

GROUP = "stts_slowfast"  # of entry points
# Package -> the extra of setup.cfg that brings it.
EXTRAS = {
    "lightning_fabric": "standalone",
    "filelock": "standalone",
    "tensorboard": "standalone",
    "rich": "tools",
    "matplotlib": "tools",
    "safetensors": "tools",
    "jinja2": "tools",
    "pandas": "tools",
    "transformers": "hosts",
    "accelerate": "hosts",
    "timm": "hosts",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}


class MissingPackageError(ValueError):
    """A package is not installed; the message has the pip line."""


def require(module: str) -> ModuleType:
    """Imports a module of an optional package, such as ``matplotlib.figure``.

    Raises:
        MissingPackageError: if the package is not installed, with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing_dependency_error(error) or error from error


def missing_dependency_error(error: BaseException | None) -> MissingPackageError | None:
    """The error for an ``ImportError`` of a package in :data:`EXTRAS`; None for other errors."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingPackageError(
        f"this needs {package}, which is not installed: "
        f"pip install 'stts-slowfast[{EXTRAS[package]}]'"
    )


@functools.cache
def load_extensions() -> None:
    """Imports, once, the modules in the entry point group ``stts_slowfast`` of installed packages.

    On import they register in ``SCORERS``, ``OPERATORS``, ``HOSTS`` or ``FAMILIES``. Their errors
    are raised, since a config may name what they register.
    """
    for entry in entry_points(group=GROUP):
        entry.load()
