"""What SlowFast imports and does not find: packages of Meta's, of the checkout, of the past."""

import importlib.machinery
import importlib.util
import os
import sys
import traceback
import types

from stts_slowfast.pyslowfast.compat import GUIDE, REMEDIES, patch


def checkout_root(slowfast: types.ModuleType) -> str:
    """The folder that the package ``slowfast`` is in: of a checkout, its root."""
    return os.path.dirname(os.path.dirname(os.path.abspath(slowfast.__file__)))


class CheckoutFinder:
    """Finds packages that only a checkout of SlowFast has, if nothing else does: it stands last in
    ``sys.meta_path``.

    Args:
        folders: where the modules of each package are.
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
    """``from vision.fair.slowfast.tools.train_net import train`` (``tools/run_net.py``), which
    exists inside Meta alone."""
    root = checkout_root(slowfast)
    if not _mentions(os.path.join(root, "tools", "run_net.py"), "vision.fair.slowfast"):
        return False
    return _find({"vision": [], "vision.fair": [], "vision.fair.slowfast": [root]})


@patch("ava_evaluation")
def patch_ava_evaluation(slowfast) -> bool:
    """``from ava_evaluation import ...``, which only a checkout's root on the path satisfies."""
    root = checkout_root(slowfast)
    helper = os.path.join(root, "slowfast", "utils", "ava_eval_helper.py")
    if not _mentions(helper, "from ava_evaluation") or _is_there("ava_evaluation"):
        return False
    folder = os.path.join(root, "ava_evaluation")
    return os.path.isdir(folder) and _find({"ava_evaluation": [folder]})


def _find(folders: dict[str, list[str]]) -> bool:
    """Adds a finder, once; returns whether it did."""
    finders = [one for one in sys.meta_path if isinstance(one, CheckoutFinder)]
    if any(finder.folders.keys() == folders.keys() for finder in finders):
        return False
    sys.meta_path.append(CheckoutFinder(folders))
    return True


class PkgResourcesFinder:
    """Finds ``pkg_resources`` for detectron2's model zoo, while that is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "pkg_resources" or not _is_half_imported("detectron2.model_zoo"):
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        module = types.ModuleType(spec.name, "The one function that detectron2 uses.")
        module.resource_filename = _resource_filename
        return module

    def exec_module(self, module) -> None:
        """It is whole."""


@patch("pkg_resources")
def patch_pkg_resources(detectron2) -> bool:
    """``import pkg_resources`` in ``detectron2.model_zoo``, gone from setuptools 81 on."""
    if "slowfast" not in sys.modules or _is_there("pkg_resources"):
        return False
    sys.meta_path.append(PkgResourcesFinder())
    return True


@patch("pkg_resources")
def patch_pkg_resources_ends(model_zoo) -> bool:
    """Nobody else is to find it."""
    found = sys.modules.get("pkg_resources")
    if isinstance(getattr(found, "__loader__", None), PkgResourcesFinder):
        del sys.modules["pkg_resources"]
    sys.meta_path[:] = [one for one in sys.meta_path if not isinstance(one, PkgResourcesFinder)]
    return False


def _resource_filename(package: str, resource: str) -> str:
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return os.path.join(folder, resource)


@patch("missing_packages")
def patch_missing_packages(slowfast) -> bool:
    """Adds the remedy to the traceback of an import error that no patch can prevent."""
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
    return False  # nothing is patched before it happens


def _inside(folder: str):
    return lambda path: os.path.abspath(path).startswith(folder + os.sep)


def missing_package_remedy(error: BaseException) -> str | None:
    """What to do about an import error of SlowFast's; None if we do not know."""
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


def _is_there(package: str) -> bool:
    if package in sys.modules:
        return True
    return importlib.util.find_spec(package) is not None


def _is_half_imported(module: str) -> bool:
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))
