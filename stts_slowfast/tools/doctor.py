"""``stts doctor``: what a run inside SlowFast needs: found, patched or missing."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stts_slowfast.pyslowfast import compat, launch

OK, PATCHED, OFF, MISSING = "OK", "patched", "off", "missing"
COLOURS = {OK: "green", PATCHED: "cyan", OFF: "yellow", MISSING: "red"}

# Names that SlowFast imports from two packages whose releases on PyPI lack them.
REQUIRED_NAMES = {
    "detectron2": ("detectron2.layers", "ROIAlign"),
    "pytorchvideo": ("pytorchvideo.layers.distributed", "cat_all_gather"),
}


class Check(NamedTuple):
    """A row of the table: the requirement, its status, what was found, and the fix."""

    name: str
    status: str
    found: str
    fix: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``stts doctor`` has no arguments."""


def main(args: argparse.Namespace) -> int:
    """Prints the table; returns 1 if a run inside SlowFast cannot start, else 0."""
    checks = examine()
    table = Table("", "status", "found", "what to do", title="stts doctor")
    for check in checks:
        colour = COLOURS[check.status]
        status = f"[{colour}]{check.status}[/]"
        table.add_row(check.name, status, escape(check.found), escape(check.fix))
    console = Console()
    console.print(table)
    missing = [check.name for check in checks if check.status == MISSING]
    if missing:
        console.print(f"SlowFast cannot start: missing {', '.join(missing)}. See {compat.GUIDE}.")
        return 1
    console.print("A SlowFast run can start.")
    return 0


def examine() -> list[Check]:
    """All checks, in the order of the table."""
    checks = [
        Check("Python", OK, platform.python_version()),
        *(version(package) for package in ("torch", "torchvision", "av")),
        cuda(),
        autoload(),
        *(required_name(package) for package in REQUIRED_NAMES),
    ]
    try:
        launcher = launch.find_launcher()
    except FileNotFoundError as error:
        return [*checks, Check("SlowFast", MISSING, "no launcher", str(error))]
    if launcher is None:
        fix = "clone https://github.com/facebookresearch/SlowFast and set SLOWFAST_ROOT to it"
        return [*checks, Check("SlowFast", MISSING, "no tools/run_net.py", fix)]
    root = os.path.dirname(os.path.dirname(launcher))
    return [*checks, Check("SlowFast", OK, f"{root} at {commit(root)}"), *start(launcher)]


def version(package: str) -> Check:
    """Whether a package is installed, and its version."""
    try:
        return Check(package, OK, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return Check(package, MISSING, "not installed", f"pip install {package}")


def cuda() -> Check:
    """The CUDA devices; without any, SlowFast runs with NUM_GPUS 0."""
    import torch

    if not torch.cuda.is_available():
        return Check("CUDA", OFF, "no device", "runs need NUM_GPUS 0")
    count = torch.cuda.device_count()
    return Check("CUDA", OK, f"{torch.version.cuda}, {count} x {torch.cuda.get_device_name(0)}")


def autoload() -> Check:
    """Whether ``import torch`` loads the plugin."""
    import torch

    instead = "start runs with `stts run`"
    for key in ("STTS_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        if os.environ.get(key) == "0":
            return Check("autoload", OFF, f"{key}=0", f"unset it, or {instead}")
    if not hasattr(torch, "_import_device_backends"):
        return Check("autoload", OFF, f"torch {torch.__version__} has none", instead)
    names = {point.name for point in importlib.metadata.entry_points(group="torch.backends")}
    if "stts_slowfast" not in names:
        fix = f"pip install stts-slowfast (PYTHONPATH is not enough), or {instead}"
        return Check("autoload", OFF, "entry point not installed", fix)
    return Check("autoload", OK, "plugin at `import torch`")


def required_name(package: str) -> Check:
    """Whether a package has the name that SlowFast imports from it."""
    module, name = REQUIRED_NAMES[package]
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # a build for another PyTorch raises errors of any kind
        return Check(package, MISSING, f"{type(error).__name__}: {error}", compat.REMEDIES[package])
    return version(package)


def commit(root: str) -> str:
    """Short hash and date of a checkout's commit."""
    command = ["git", "-C", root, "log", "-1", "--format=%h (%cs)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "an unknown commit"
    return done.stdout.strip() or "an unknown commit"


def start(launcher: str) -> list[Check]:
    """Imports the launcher in a process of its own: the patches it needs, and failed imports."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "launch.json")
        command = [sys.executable, "-m", "stts_slowfast.tools.doctor", launcher, path]
        # Patches that are switched off are on here, to know which are needed.
        env = {**launch.environment(launcher), "STTS_COMPAT": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        record = {"applied": [], "error": f"it ended with status {done.returncode}"}
        if os.path.exists(path):
            with open(path) as file:
                record = json.load(file)
    patches = [patch(name, record["applied"]) for name in compat.PATCHES]
    error = record["error"]
    if error is None:
        return [*patches, Check("tools/run_net.py", OK, "all its imports work")]
    fixes = [fix for package, fix in compat.REMEDIES.items() if package in error]
    return [*patches, Check("tools/run_net.py", MISSING, error, " ".join(fixes))]


def record_launch(launcher: str, path: str) -> None:
    """Runs the launcher with ``--help``; writes applied patches and its error as JSON."""
    error = None
    try:
        launch.main(launcher, ["--help"])
    except SystemExit:  # argparse ends --help so
        pass
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    with open(path, "w") as file:
        json.dump({"applied": compat.applied, "error": error}, file)


def patch(name: str, applied: Sequence[str]) -> Check:
    """Whether a patch is needed, and whether it is switched on."""
    about = f"{compat.PATCHES[name].obstacle}. Acts on: {compat.PATCHES[name].acts}"
    if name in compat.switched_off():
        fix = "unset STTS_COMPAT, or take the name out of it"
        return Check(f"patch {name}", MISSING if name in applied else OFF, about, fix)
    if name in applied:
        return Check(f"patch {name}", PATCHED, about)
    return Check(f"patch {name}", OK, f"not needed here. {about}")


if __name__ == "__main__":
    record_launch(*sys.argv[1:])
