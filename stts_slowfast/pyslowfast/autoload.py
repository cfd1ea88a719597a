"""Registers the functions of `hook_table.HOOKS` to run when modules of SlowFast are imported.

PyTorch calls `stts_slowfast_autoload.register` at the end of every ``import torch`` (entry point
``torch.backends``), also in spawned children, whether SlowFast will be used or not. So this file
needs the standard library and wrapt only, and takes microseconds once they are imported.
``STTS_AUTOLOAD=0`` switches it off.
"""

import importlib
import os
import sys
from functools import partial

from stts_slowfast.pyslowfast.hook_table import HOOKS

# The error of each function that was called, None if it succeeded.
results: dict[str, Exception | None] = {}

_registered = False
# Hooks of modules that were only partly imported when they were registered.
_deferred: dict[str, list[str]] = {}


def register() -> None:
    """Registers the post-import hooks, once, unless ``STTS_AUTOLOAD=0``."""
    if os.environ.get("STTS_AUTOLOAD") != "0":
        register_hooks()


def register_hooks() -> None:
    """Registers the post-import hooks, once; for modules that are imported already they run now.

    If a module of SlowFast is the first to import torch, it is only partly imported here. Its hooks
    run with the next hook, or in :func:`run_deferred_hooks`.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from wrapt import register_post_import_hook

    for module_name, functions in HOOKS.items():
        if is_partly_imported(module_name):
            _deferred[module_name] = functions
            continue
        for function in functions:
            register_post_import_hook(partial(_on_import, function), module_name)


def run_deferred_hooks() -> None:
    """Runs the hooks of modules that were partly imported and are complete now."""
    for module_name in [name for name in _deferred if not is_partly_imported(name)]:
        for function in _deferred.pop(module_name):
            if module_name in sys.modules:  # its import may have failed
                _run_hook(function, sys.modules[module_name])


def failed_hooks() -> list[str]:
    """Hooks without effect: ``plugin.add_config failed (KeyError: ...)``, ``... never ran``."""
    run_deferred_hooks()
    found = []
    for module_name, functions in HOOKS.items():
        if module_name not in sys.modules or is_partly_imported(module_name):
            continue
        for function in functions:
            if function not in results:
                found.append(f"{function} never ran")
            elif (error := results[function]) is not None:
                found.append(f"{function} failed ({type(error).__name__}: {error})")
    return found


def is_partly_imported(module_name: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    spec = getattr(sys.modules.get(module_name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _on_import(function: str, module) -> None:
    run_deferred_hooks()
    _run_hook(function, module)


def _run_hook(function: str, module) -> None:
    """Imports a function of this package and calls it; logs its error instead of raising it.

    SlowFast without selection must keep working, whatever fails here. If a config enables STTS,
    `preflight.require_hooks` stops the run.
    """
    file, _, name = function.rpartition(".")
    try:
        getattr(importlib.import_module(f"{__package__}.{file}"), name)(module)
        results[function] = None
    except Exception as error:
        reported = {str(earlier) for earlier in results.values()}
        results[function] = error
        if str(error) not in reported:  # a broken file of ours fails in every hook
            print(
                f"stts_slowfast: {function} failed on {module.__name__}: "
                f"{type(error).__name__}: {error}",
                file=sys.stderr,
            )
