"""The command ``stts``: its subcommands, shared arguments, errors and exit codes."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from stts_slowfast.plugins import missing_dependency_error
from stts_slowfast.standalone.signals import worker_death_error

# Subcommand -> its module, which has add_arguments(parser) and main(args) -> int | None, and its
# help text. A module is imported when its command is called, so that `stts --help` is fast.
COMMANDS = {
    "run": ("stts_slowfast.tools.run", "train and test by SlowFast config files"),
    "quickstart": (
        "stts_slowfast.tools.demo.quickstart",
        "train and compare selection on small synthetic videos",
    ),
    "make-data": (
        "stts_slowfast.tools.demo.make_data",
        "write small synthetic videos whose class shows in few tokens",
    ),
    "study": (
        "stts_slowfast.tools.study.command",
        "compare scorers at every budget on your model and videos",
    ),
    "adapt": (
        "stts_slowfast.tools.adapt",
        "teach the selection of a trained model on videos without labels",
    ),
    "report": ("stts_slowfast.tools.report.command", "write an HTML page about runs and studies"),
    "visualize": ("stts_slowfast.tools.visualize", "show what a model keeps of a video"),
    "bench": ("stts_slowfast.tools.bench.command", "compare speed, memory and cost of models"),
    "export": ("stts_slowfast.tools.export", "export a model by torch.export or to ONNX"),
    "convert": (
        "stts_slowfast.tools.convert",
        "convert checkpoints and the authors' YAML files",
    ),
    "doctor": (
        "stts_slowfast.tools.doctor",
        "list what a run inside SlowFast needs and lacks",
    ),
}

# Errors that the user can fix are printed as one line; all others are bugs, with traceback.
_USER_ERRORS = (ValueError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``stts``.

    Args:
        argv: the arguments after ``stts``; those of the command line by default.

    Returns:
        0, or what the subcommand returned; 2 for errors that the user can fix; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("stts", description="Token selection for video transformers.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    missing = None
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text.capitalize()}.")
        subparser.add_argument(
            "--traceback", action="store_true", help="print the traceback of an error"
        )
        if name in argv[:1]:
            try:
                command = importlib.import_module(module)
                command.add_arguments(subparser)
            except ModuleNotFoundError as error:
                missing = missing_dependency_error(error)
                if missing is None:
                    raise
    if missing:
        print(f"stts: error: {missing}", file=sys.stderr)
        return 2
    args = parser.parse_args(argv)
    try:
        return command.main(args) or 0
    except KeyboardInterrupt as stop:
        print(f"stts: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)
    except Exception as error:
        error = missing_dependency_error(error) or worker_death_error(error) or error
        if args.traceback or os.environ.get("STTS_TRACEBACK") or not _is_user_error(error):
            traceback.print_exc()
            return 2 if _is_user_error(error) else 1
        print(f"stts: error: {_one_line(error)}", file=sys.stderr)
        return 2


# ---- arguments that several commands share --------------------------------------------------


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--cfg FILE``, the config of a model."""
    parser.add_argument("--cfg", required=True, metavar="FILE", help="config of the model")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint FILE``; without it, the weights are those that a test takes."""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights; else TEST.CHECKPOINT_FILE_PATH, else the last in OUTPUT_DIR",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """``--force``, to replace the file that a command writes."""
    parser.add_argument("--force", action="store_true", help="replace a file that exists already")


def add_opts(parser: argparse.ArgumentParser) -> None:
    """``--opts KEY VALUE ...``, as SlowFast's launcher takes them."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys and values, on top of the files; comes last",
    )


def read_config(args: argparse.Namespace):
    """The config that ``--cfg``, ``--checkpoint`` and ``--opts`` name, to test its weights."""
    from stts_slowfast.standalone.config import load_config

    cfg = load_config(args.cfg, args.opts)
    if args.checkpoint:
        cfg.TEST.CHECKPOINT_FILE_PATH = args.checkpoint
    return cfg


# ---- errors ---------------------------------------------------------------------------------


def _is_user_error(error: Exception) -> bool:
    # A loader's worker turns errors that it cannot pickle into RuntimeError.
    from stts_slowfast.video import VideoError

    return isinstance(error, (*_USER_ERRORS, VideoError)) or (
        _from_worker(error) and "VideoError" in str(error)
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if _from_worker(error):  # the worker's whole traceback; its last line is the message
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _from_worker(error: Exception) -> bool:
    return str(error).startswith("Caught ") and "DataLoader worker" in str(error)
