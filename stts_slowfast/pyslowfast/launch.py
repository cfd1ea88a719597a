"""Starts SlowFast's launcher, ``tools/run_net.py`` of a checkout, with this package loaded.

``python -m stts_slowfast.pyslowfast.launch LAUNCHER ARGS`` does what ``python LAUNCHER ARGS`` does.
PyTorch before 2.5 does not load this package by itself; here spawned children import this module as
their main module, and with it the package.
"""

import importlib.util
import os
import signal
import sys

from stts_slowfast.pyslowfast import autoload, compat


def find_launcher() -> str | None:
    """Path of ``tools/run_net.py``: in ``SLOWFAST_ROOT``, else beside an importable slowfast.

    Returns None if there is neither: SlowFast's own packaging leaves the launcher out.

    Raises:
        FileNotFoundError: if ``SLOWFAST_ROOT`` is set but has no launcher.
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
    """Environment variables for a process that runs ``launcher`` and imports its checkout."""
    root = os.path.dirname(os.path.dirname(launcher))
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
    env.pop("STTS_AUTOLOAD", None)  # `stts run` requests this package
    return env


def run(argv: list[str]) -> None:
    """Replaces this process by SlowFast's launcher; does not return.

    Args:
        argv: arguments of ``tools/run_net.py``: ``["--cfg", path, "--opts", ...]``.

    Raises:
        FileNotFoundError: if there is no launcher.
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
    os.execve(sys.executable, command, {**environment(launcher), compat.LAUNCHED_BY_CLI: "1"})


def main(launcher: str, argv: list[str]) -> None:
    """Runs ``launcher`` in this process, as Python runs a script."""
    autoload.register_hooks()
    # Slurm's warning signal would kill the run, which cannot handle it; children inherit this.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    sys.argv = [launcher, *argv]
    sys.path.insert(0, os.path.dirname(launcher))  # older launchers import their neighbours by name
    # Not as __main__: that stays this module, which spawned children import.
    spec = importlib.util.spec_from_file_location("run_net", launcher)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_net"] = module
    spec.loader.exec_module(module)
    module.main()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
