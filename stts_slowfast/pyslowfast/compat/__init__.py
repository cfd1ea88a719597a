"""What keeps SlowFast from running on today's PyTorch, torchvision and PyAV, patched in memory.

`hook_table.PATCHES` lists the patches: what each is for and what it changes, and nothing else.
``STTS_COMPAT=0`` switches all off, ``STTS_COMPAT=-NAME,-NAME`` some. One line on stderr lists the
patches that were applied, if a run uses this package or ``STTS_COMPAT_VERBOSE=1``.
"""

import atexit
import functools
import multiprocessing
import os
import sys

from stts_slowfast.pyslowfast.config_access import EXTRA_KEYS, extra_key, get_value, is_enabled
from stts_slowfast.pyslowfast.hook_table import PATCHES

# Packages that SlowFast imports and no patch can replace, and how to install them.
REMEDIES = {
    "detectron2": "SlowFast needs detectron2 for every model, and it is not on PyPI: install it "
    "from https://github.com/facebookresearch/detectron2",
    "pytorchvideo": "SlowFast needs names that pytorchvideo's release 0.1.5 lacks: install it "
    "from https://github.com/facebookresearch/pytorchvideo",
}
# Environment variable that `stts run` sets for the launcher that it starts.
LAUNCHED_BY_CLI = "STTS_RUN"
GUIDE = "'Inside SlowFast' in projects/stts/README.md"

# In this process: the patches that were applied, and whether they have been reported.
applied: list[str] = []
_reported = False


def switched_off() -> set[str]:
    """The patches that ``STTS_COMPAT`` switches off; `check_switch` refuses unknown names."""
    text = os.environ.get("STTS_COMPAT", "")
    if text.strip() == "0":
        return set(PATCHES)
    return {word.strip()[1:] for word in text.split(",") if word.strip()[:1] == "-"} & set(PATCHES)


def check_switch(slowfast=None) -> None:
    """Raises ``ValueError``, which lists all patches, if ``STTS_COMPAT`` has an unknown name."""
    text = os.environ.get("STTS_COMPAT", "")
    if text.strip() in ("", "0", "1"):
        return
    for word in (word.strip() for word in text.split(",")):
        if word[:1] != "-" or word[1:] not in PATCHES:
            raise ValueError(
                f"STTS_COMPAT is {text!r}, but {word!r} switches nothing off: use 0 for all, or "
                f"-NAME,-NAME for some of {', '.join(PATCHES)}"
            )


def patch(name: str):
    """Decorates ``function(module) -> bool``, which returns whether it patched the module: it is
    not called if the patch ``name`` is switched off, and reported if it patched something."""

    def decorate(function):
        @functools.wraps(function)
        def hook(module) -> bool:
            if name in switched_off() or not function(module):
                return False
            if name not in applied:
                applied.append(name)
                if not _reported and os.environ.get("STTS_COMPAT_VERBOSE") == "1":
                    atexit.register(report)
            return True

        return hook

    return decorate


def uses_stts(cfg) -> bool:
    """Whether a run uses something of this package: by its config, or started by `stts run`."""
    return (
        is_enabled(cfg)
        or os.environ.get(LAUNCHED_BY_CLI) == "1"
        or get_value(cfg, "STTS.FAST_AUGMENT", False)
        or any(
            extra_key(cfg, f"{node}.{name}") != default
            for node, keys in EXTRA_KEYS.items()
            for name, default in keys.items()
        )
    )


def report(requested: bool = False) -> None:
    """Writes one line with the applied patches, once per process, if ``requested`` or verbose."""
    global _reported
    wanted = requested or os.environ.get("STTS_COMPAT_VERBOSE") == "1"
    # Not again from each process of a multi-GPU run and each worker of a DataLoader.
    is_main = multiprocessing.current_process().name == "MainProcess"
    if _reported or not (wanted and applied and is_main):
        return
    _reported = True
    print(
        f"stts_slowfast: patched SlowFast in memory: {', '.join(applied)} (STTS_COMPAT=-NAME "
        "switches one off; `stts doctor` lists them)",
        file=sys.stderr,
    )


def table() -> list[str]:
    """The patches as rows of a Markdown table: name, obstacle, where it acts."""
    return [f"| `{name}` | {patch.obstacle} | {patch.acts} |" for name, patch in PATCHES.items()]
