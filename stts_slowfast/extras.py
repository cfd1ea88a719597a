"""Packages that only some commands need: a missing one is a sentence with the line to type."""

import importlib
from types import ModuleType

# Package -> the extra of setup.cfg that brings it.
EXTRAS = {
    "lightning_fabric": "standalone",
    "tensorboard": "standalone",
    "rich": "tools",
    "matplotlib": "tools",
    "safetensors": "tools",
    "transformers": "hosts",
    "accelerate": "hosts",
    "timm": "hosts",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
}


class MissingPackageError(ValueError):
    """A package is not installed; the message has the pip line."""


def need(module: str) -> ModuleType:
    """Imports a module of an optional package, such as ``matplotlib.figure``.

    Raises:
        MissingPackageError: where the package is missing, with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise explain(error) or error from error


def explain(error: BaseException | None) -> MissingPackageError | None:
    """The sentence for an ``ImportError`` of a package in :data:`EXTRAS`; None for other errors."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return MissingPackageError(
        f"this needs {package}, which is not installed: "
        f"pip install 'stts-slowfast[{EXTRAS[package]}]'"
    )
