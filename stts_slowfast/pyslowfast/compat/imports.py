"""Imports of SlowFast that fail: packages of Meta, of the checkout, and of older setuptools."""

import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types

from stts_slowfast.pyslowfast.autoload import is_partly_imported
from stts_slowfast.pyslowfast.compat import GUIDE, REMEDIES, patch


def checkout_root(slowfast: types.ModuleType) -> str:
    """The folder that the package ``slowfast`` is in: of a checkout, its root."""
    return os.path.dirname(os.path.dirname(os.path.abspath(slowfast.__file__)))


class CheckoutFinder:
    """Finds packages that only a checkout of SlowFast has; last in ``sys.meta_path``, so that any
    other finder comes first.

    Args:
        folders: package name to the folders of its modules.
    """

    def __init__(self, folders: dict[str, list[str]]):
        self.folders = folders

    def find_spec(self, name, path=None, target=None):
        if name not in self.folders:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = self.folders[name]
        return spec


@patch("vision_imports")
def patch_vision_imports(slowfast) -> bool:
    """``tools/run_net.py`` imports ``vision.fair.slowfast``, which exists only inside Meta."""
    root = checkout_root(slowfast)
    if not _mentions(os.path.join(root, "tools", "run_net.py"), "vision.fair.slowfast"):
        return False
    return _add_finder({"vision": [], "vision.fair": [], "vision.fair.slowfast": [root]})


@patch("ava_evaluation")
def patch_ava_evaluation(slowfast) -> bool:
    """Older commits import ``ava_evaluation``, which is in the checkout's root."""
    root = checkout_root(slowfast)
    helper = os.path.join(root, "slowfast", "utils", "ava_eval_helper.py")
    if not _mentions(helper, "from ava_evaluation") or _exists("ava_evaluation"):
        return False
    folder = os.path.join(root, "ava_evaluation")
    return os.path.isdir(folder) and _add_finder({"ava_evaluation": [folder]})


def _add_finder(folders: dict[str, list[str]]) -> bool:
    """Adds a finder, once; returns whether it did."""
    finders = [f for f in sys.meta_path if isinstance(f, CheckoutFinder)]
    if any(finder.folders.keys() == folders.keys() for finder in finders):
        return False
    sys.meta_path.append(CheckoutFinder(folders))
    return True


class PkgResourcesFinder:
    """Finds ``pkg_resources`` while detectron2's model zoo is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "pkg_resources" or not is_partly_imported("detectron2.model_zoo"):
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        module = types.ModuleType(spec.name, "The one function that detectron2 uses.")
        module.resource_filename = _resource_filename
        return module

    def exec_module(self, module) -> None:
        """Does nothing: `create_module` has filled it."""


@patch("pkg_resources")
def patch_pkg_resources(detectron2) -> bool:
    """``detectron2.model_zoo`` imports ``pkg_resources``, which setuptools 81 removed."""
    if "slowfast" not in sys.modules or _exists("pkg_resources"):
        return False
    sys.meta_path.append(PkgResourcesFinder())
    return True


@patch("pkg_resources")
def patch_pkg_resources_ends(model_zoo) -> bool:
    """Removes it again, so that no other package finds it."""
    found = sys.modules.get("pkg_resources")
    if isinstance(getattr(found, "__loader__", None), PkgResourcesFinder):
        del sys.modules["pkg_resources"]
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not isinstance(finder, PkgResourcesFinder)
    ]
    return False


def _resource_filename(package: str, resource: str) -> str:
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return os.path.join(folder, resource)


@patch("missing_packages")
def patch_missing_packages(slowfast) -> bool:
    """Tracebacks of import errors that no patch can prevent end with the remedy."""
    previous, folder = sys.excepthook, os.path.dirname(os.path.abspath(slowfast.__file__))
    if getattr(previous, "explains_missing_packages", False):
        return False

    def explain(kind, error, trace):
        previous(kind, error, trace)
        files = [frame.filename for frame in traceback.extract_tb(trace)]
        if (remedy := missing_package_remedy(error)) and any(map(_inside(folder), files)):
            print(f"stts_slowfast: {remedy}", file=sys.stderr)

    explain.explains_missing_packages = True
    sys.excepthook = explain
    return False  # it has no effect unless an import fails


def _inside(folder: str):
    return lambda path: os.path.abspath(path).startswith(folder + os.sep)


def missing_package_remedy(error: BaseException) -> str | None:
    """How to fix an import error of SlowFast; None if unknown."""
    if not isinstance(error, ImportError):
        return None
    package = (error.name or "").split(".")[0]
    if package not in REMEDIES:
        return None
    return f"{REMEDIES[package]}; see {GUIDE}, and run `stts doctor`"


def _mentions(path: str, text: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            return text in file.read()
    except OSError:
        return False


def _exists(package: str) -> bool:
    if package in sys.modules:
        return True
    return importlib.util.find_spec(package) is not None
