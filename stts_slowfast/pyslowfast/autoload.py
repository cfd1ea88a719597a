"""Waits until SlowFast is imported, then lets the plugin take hold: nothing else happens here.

PyTorch calls `register` at the end of every ``import torch`` (entry point ``torch.backends``), in
spawned children too, whether SlowFast will be used or not. So this file needs the standard library
and wrapt alone, takes microseconds once they are imported, and never raises. ``STTS_AUTOLOAD=0``
switches it off.
"""

import importlib
import os
import sys
from functools import partial

# What happens after which module has been imported: functions of this package that take the module.
# A hook on a module that is only half imported would run too early. That can happen where a module
# of SlowFast is the first to import torch, so each of these either has torch imported before it (by
# its parent package), or does not import it at all.
HOOKS = {
    "detectron2": ["compat.mend_pkg_resources"],
    "slowfast": [
        "compat.mend_vision_imports",
        "compat.mend_ava_evaluation",
        "compat.explain_missing_packages",
    ],
    "slowfast.config.defaults": ["plugin.add_config", "compat.mend_prefetch_key"],
    "slowfast.datasets.decoder": ["compat.mend_decoder"],
    "slowfast.models.video_model_builder": ["plugin.wrap_models", "compat.mend_cuda_synchronize"],
    "slowfast.models.optimizer": ["plugin.wrap_optimizer", "plugin.wrap_log"],
}

_registered = False


def register() -> None:
    """Registers the post-import hooks, once, unless ``STTS_AUTOLOAD=0``."""
    if os.environ.get("STTS_AUTOLOAD") != "0":
        register_hooks()


def register_hooks() -> None:
    """Registers the post-import hooks, once; modules that are imported already get theirs now."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from wrapt import register_post_import_hook

        for module_name, functions in HOOKS.items():
            for function in functions:
                register_post_import_hook(partial(_call, function), module_name)
    except Exception as error:
        _complain("cannot wait for SlowFast", error)


def _call(function: str, module) -> None:
    """Imports and calls a function of this package; its failure is told, not raised.

    SlowFast without STTS is worth more than a traceback out of its import statements.
    """
    file, name = function.split(".")
    try:
        getattr(importlib.import_module(f"{__package__}.{file}"), name)(module)
    except Exception as error:
        _complain(f"{function} failed on {module.__name__}", error)


def _complain(what: str, error: Exception) -> None:
    print(f"stts_slowfast: {what}: {type(error).__name__}: {error}", file=sys.stderr)
