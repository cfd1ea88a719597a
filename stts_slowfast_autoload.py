"""What Python calls as it starts (by a ``.pth`` file), and PyTorch at the end of ``import torch``
(by the group ``torch.backends``): it cannot fail.

An error here would be one of everybody in the environment. So this file is copied beside PyTorch,
also by an editable install, needs the standard library alone, and passes over a package behind it
that has moved, lacks a dependency or is half there. Whoever imports ``slowfast`` then reads so on
one line.
"""

import os
import sys

_registered = False


def wait() -> None:
    """Lets the first import of ``slowfast`` call `register`: a launcher may read its config, and
    the keys of this package in it, before it imports torch, or without."""
    if os.environ.get("STTS_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _Start())


class _Start:
    """Finds ``slowfast`` as it is found without us, but calls `register` before."""

    def find_spec(self, name, path=None, target=None):
        if name != "slowfast":
            return None
        import importlib.util

        sys.meta_path.remove(self)
        register()
        return importlib.util.find_spec(name)


def register() -> None:
    """Lets the package wait for SlowFast; the second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from stts_slowfast.pyslowfast import autoload

        autoload.register()
    except (Exception, SystemExit) as error:
        sys.meta_path.insert(0, _Notice(error))


class _Notice:
    """Finds no module; when ``slowfast`` is looked for, it writes why this package is not there."""

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
