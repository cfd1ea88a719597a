"""Waits until SlowFast is imported, then lets the plugin take hold: nothing else happens here.

PyTorch calls `stts_slowfast_autoload.register` at the end of every ``import torch`` (entry point
``torch.backends``), in spawned children too, whether SlowFast will be used or not. So this file
needs the standard library and wrapt alone, and takes microseconds once they are imported; what it
raises is caught there. ``STTS_AUTOLOAD=0`` switches it off.
"""

import importlib
import os
import sys
from functools import partial

from stts_slowfast.pyslowfast import compat

# What happens after which module has been imported: functions of this package that take the module.
# What this package adds to SlowFast; patches of SlowFast itself are in `compat.PATCHES`.
OURS = {
    "slowfast": ["compat.check_switch"],
    "slowfast.datasets.build": ["annotations.wrap_build_dataset"],
    "slowfast.datasets.kinetics": ["rand_augment.wrap_augment"],
    "slowfast.models.attention": ["fused.register"],
    "slowfast.models.build": ["plugin.wrap_build_model"],
    "slowfast.models.optimizer": ["training.wrap_optimizer"],
    "slowfast.utils.checkpoint": [
        "checkpoint_loading.wrap_load_checkpoint",
        "plugin.wrap_load_test",
    ],
    "slowfast.utils.logging": ["training.wrap_log"],
    "slowfast.utils.misc": ["distributed.wrap_launch_job", "training.wrap_losses"],
    "slowfast.visualization.tensorboard_vis": ["training.wrap_tensorboard"],
    **{
        name: ["loops.wrap_jobs"]
        for module in ("tools.train_net", "tools.test_net")
        for name in compat.ALIASES[module]
    },
    # If the others cannot be waited for, SlowFast does not know the node STTS either.
    "slowfast.config.defaults": [
        "plugin.add_config",
        "config.add_our_keys",
        "config.read_our_nodes",
        "preflight.wrap_config",
        "plugin.wrap_config",
    ],
}


def _merged(first: dict, second: dict) -> dict[str, list[str]]:
    return {name: [*first.get(name, ()), *second.get(name, ())] for name in {**first, **second}}


HOOKS = _merged(OURS, compat.hooks())
# Last, so that the config is the last to be waited for.
HOOKS["slowfast.config.defaults"] = HOOKS.pop("slowfast.config.defaults")

# How the functions of HOOKS fared: their errors, None for success. What is not here never ran.
results: dict[str, Exception | None] = {}

_registered = False
_half_imported: dict[str, list[str]] = {}


def register() -> None:
    """Registers the post-import hooks, once, unless ``STTS_AUTOLOAD=0``."""
    if os.environ.get("STTS_AUTOLOAD") != "0":
        register_hooks()


def register_hooks() -> None:
    """Registers the post-import hooks, once; modules that are imported already get theirs now.

    A module of SlowFast may be the first to import torch, and is then only half imported here. Its
    functions run as soon as another hook does, or when `finish` is called.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from wrapt import register_post_import_hook

    for module_name, functions in HOOKS.items():
        if _is_half_imported(module_name):
            _half_imported[module_name] = functions
            continue
        for function in functions:
            register_post_import_hook(partial(_hook, function), module_name)


def finish() -> None:
    """Runs what waits for modules that were half imported when torch was, where they are whole."""
    for module_name in [name for name in _half_imported if not _is_half_imported(name)]:
        for function in _half_imported.pop(module_name):
            if module_name in sys.modules:  # its import may have failed
                _call(function, sys.modules[module_name])


def failed_hooks() -> list[str]:
    """What did not happen: ``plugin.wrap_models failed (KeyError: ...)``, ``... never ran``."""
    finish()
    found = []
    for module_name, functions in HOOKS.items():
        if module_name not in sys.modules or _is_half_imported(module_name):
            continue
        for function in functions:
            if function not in results:
                found.append(f"{function} never ran")
            elif (error := results[function]) is not None:
                found.append(f"{function} failed ({type(error).__name__}: {error})")
    return found


def _hook(function: str, module) -> None:
    finish()
    _call(function, module)


def _call(function: str, module) -> None:
    """Imports and calls a function of this package; its failure is told, not raised.

    SlowFast without STTS is worth more than a traceback out of its import statements; where a
    config asks for STTS, `guard.confirm` stops the run.
    """
    file, _, name = function.rpartition(".")
    try:
        getattr(importlib.import_module(f"{__package__}.{file}"), name)(module)
        results[function] = None
    except Exception as error:
        told = {str(one) for one in results.values()}
        results[function] = error
        if str(error) not in told:  # a file that is half there fails in every hook
            _complain(f"{function} failed on {module.__name__}", error)


def _is_half_imported(module_name: str) -> bool:
    spec = getattr(sys.modules.get(module_name), "__spec__", None)
    return bool(getattr(spec, "_initializing", False))


def _complain(what: str, error: Exception) -> None:
    print(f"stts_slowfast: {what}: {type(error).__name__}: {error}", file=sys.stderr)
