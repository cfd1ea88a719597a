"""Starts SlowFast's launcher, ``tools/run_net.py`` of a checkout, with the plugin in place.

``python -m stts_slowfast.pyslowfast.launch LAUNCHER ARGS`` does what ``python LAUNCHER ARGS`` does.
It serves where PyTorch is too old to load the plugin by itself: spawned children import this module
as their main module, and with it the plugin.
"""

import importlib.util
import os
import signal
import sys

from stts_slowfast.pyslowfast import autoload, compat


def find_launcher() -> str | None:
    """Path of ``tools/run_net.py``: in ``SLOWFAST_ROOT``, else beside an importable slowfast.

    Returns None where there is neither. SlowFast's own packaging leaves the launcher out, so a
    slowfast that is installed otherwise than as a checkout has none.

    Raises:
        FileNotFoundError: where ``SLOWFAST_ROOT`` is set but holds no launcher.
    """
    root = os.environ.get("SLOWFAST_ROOT")
    if root:
        launcher = os.path.join(os.path.abspath(root), "tools", "run_net.py")
        if not os.path.isfile(launcher):
            raise FileNotFoundError(
                f"SLOWFAST_ROOT is {root}, but there is no {launcher}: set it to the root of a "
                "checkout of https://github.com/facebookresearch/SlowFast"
            )
        return launcher
    spec = importlib.util.find_spec("slowfast")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = os.path.dirname(os.path.abspath(next(iter(spec.submodule_search_locations))))
    launcher = os.path.join(root, "tools", "run_net.py")
    return launcher if os.path.isfile(launcher) else None


def environment(launcher: str) -> dict[str, str]:
    """The environment for a process that runs ``launcher``: its checkout can be imported."""
    root = os.path.dirname(os.path.dirname(launcher))
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    env.pop("STTS_AUTOLOAD", None)  # who starts SlowFast through us wants us
    return env


def run(argv: list[str]) -> None:
    """Becomes SlowFast's launcher: replaces this process, and does not return.

    Args:
        argv: arguments as ``tools/run_net.py`` takes them: ``["--cfg", path, "--opts", ...]``.

    Raises:
        FileNotFoundError: where there is no launcher.
    """
    launcher = find_launcher()
    if launcher is None:
        raise FileNotFoundError(
            "found no tools/run_net.py of SlowFast: set SLOWFAST_ROOT to the root of a checkout of "
            "https://github.com/facebookresearch/SlowFast"
        )
    command = [sys.executable, "-m", "stts_slowfast.pyslowfast.launch", launcher, *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, {**environment(launcher), compat.BY_US: "1"})


def main(launcher: str, argv: list[str]) -> None:
    """Runs ``launcher`` in this process, as Python does with a script."""
    autoload.register_hooks()
    # Slurm's warning, which would end a loop that cannot use it; children inherit this.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.argv = [launcher, *argv]
    sys.path.insert(0, os.path.dirname(launcher))  # older launchers import their neighbours by name
    # Not run as __main__: that stays this module, which spawned children then import.
    spec = importlib.util.spec_from_file_location("run_net", launcher)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_net"] = module
    spec.loader.exec_module(module)
    module.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
