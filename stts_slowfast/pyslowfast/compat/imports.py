"""What SlowFast imports and does not find: packages of Meta's, of the checkout, of the past."""

import importlib.machinery
import importlib.util
import os
import sys
import types

from stts_slowfast.pyslowfast.compat import GUIDE, REMEDIES, mend


def checkout_root(slowfast: types.ModuleType) -> str:
    """The folder in which the package ``slowfast`` lies: of a checkout, its root."""
    return os.path.dirname(os.path.dirname(os.path.abspath(slowfast.__file__)))


class VisionFinder:
    """Finds ``vision.fair.slowfast``, which exists inside Meta alone, in a checkout of SlowFast.

    Stands last in ``sys.meta_path``, so that a real package of that name comes first.
    """

    def __init__(self, root: str):
        self.folders = {"vision": [], "vision.fair": [], "vision.fair.slowfast": [root]}

    def find_spec(self, name, path=None, target=None):
        if name not in self.folders:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = self.folders[name]
        return spec


@mend
def mend_vision_imports(slowfast) -> bool:
    """``from vision.fair.slowfast.tools.train_net import train`` (``tools/run_net.py``)."""
    if any(isinstance(finder, VisionFinder) for finder in sys.meta_path):
        return False
    root = checkout_root(slowfast)
    if not _mentions(os.path.join(root, "tools", "run_net.py"), "vision.fair.slowfast"):
        return False
    sys.meta_path.append(VisionFinder(root))
    return True


@mend
def mend_ava_evaluation(slowfast) -> bool:
    """``from ava_evaluation import ...``, which only a checkout's root on the path satisfies."""
    root = checkout_root(slowfast)
    helper = os.path.join(root, "slowfast", "utils", "ava_eval_helper.py")
    if not _mentions(helper, "from ava_evaluation") or _is_there("ava_evaluation"):
        return False
    if not os.path.isdir(os.path.join(root, "ava_evaluation")):
        return False
    sys.path.append(root)
    return True


@mend
def mend_pkg_resources(detectron2) -> bool:
    """``import pkg_resources`` in ``detectron2.model_zoo``, gone from setuptools 81 on."""
    if "slowfast" not in sys.modules or _is_there("pkg_resources"):
        return False
    module = types.ModuleType("pkg_resources", "The one function that detectron2 uses.")
    module.resource_filename = _resource_filename
    sys.modules["pkg_resources"] = module
    return True


def _resource_filename(package: str, resource: str) -> str:
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    return os.path.join(folder, resource)


def explain_missing_packages(slowfast) -> None:
    """Adds the remedy to the traceback of an import error that no mend can prevent."""
    previous = sys.excepthook
    if getattr(previous, "explains_missing_packages", False):
        return

    def explain(kind, error, traceback):
        previous(kind, error, traceback)
        remedy = missing_package_remedy(error)
        if remedy:
            print(f"stts_slowfast: {remedy}", file=sys.stderr)

    explain.explains_missing_packages = True
    sys.excepthook = explain


def missing_package_remedy(error: BaseException) -> str | None:
    """What to do about an import error of SlowFast's; None where we do not know."""
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
