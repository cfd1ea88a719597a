"""Loads the guest for SlowFast; called when Python starts (by a ``.pth`` file) and at the end of
``import torch`` (entry point ``torch.backends``). It cannot fail.

An error here would break Python for everybody in the environment. So this file is copied next to
PyTorch, also by an editable install, and needs the standard library only. If the package behind it
has moved, lacks a dependency or is incomplete, the first import of ``slowfast`` prints one line.
"""

import os
import sys

_registered = False


def wait() -> None:
    """Makes the first import of ``slowfast`` call `register`: a launcher may read its config, with
    keys of this package, before it imports torch, or without."""
    if os.environ.get("STTS_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _RegisterOnImport())


class _RegisterOnImport:
    """Calls `register` before ``slowfast`` is found by the other finders."""

    def find_spec(self, name, path=None, target=None):
        if name != "slowfast":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        register()
        return importlib.util.find_spec(name)


def register() -> None:
    """Registers the hooks on SlowFast's modules; the second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from stts_slowfast.pyslowfast import autoload

        autoload.register()
    except (Exception, SystemExit) as error:
        sys.meta_path.insert(0, _ErrorOnImport(error))


class _ErrorOnImport:
    """Finds no module; prints why this package failed to load when ``slowfast`` is imported."""

    def __init__(self, error: BaseException):
        self.text = f"{type(error).__name__}: {error}"

    def find_spec(self, name, path=None, target=None):
        if name == "slowfast":
            sys.meta_path.remove(self)
            print(
                f"stts_slowfast: SlowFast runs without it ({self.text}): install it again, or "
                "`pip uninstall stts-slowfast`",
                file=sys.stderr,
            )
        return None
