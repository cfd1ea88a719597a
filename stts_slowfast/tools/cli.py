"""The command ``stts``: its subcommands, and how errors and Ctrl-C leave it."""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from stts_slowfast.plugins import missing_dependency_error
from stts_slowfast.standalone.signals import worker_death_error

# Subcommand -> the module that has add_arguments(parser) and main(args) -> int | None, and what
# it does. A module is imported when its command is called, so that `stts --help` is quick.
COMMANDS = {
    "run": ("stts_slowfast.tools.run", "train and test by SlowFast config files"),
    "quickstart": (
        "stts_slowfast.tools.demo.quickstart",
        "watch selection being learned on real video",
    ),
    "make-data": (
        "stts_slowfast.tools.demo.make_data",
        "write small videos on which looking is hard",
    ),
    "study": (
        "stts_slowfast.tools.study.command",
        "measure whether selection wins, at every budget",
    ),
    "report": ("stts_slowfast.tools.report.command", "write a page about runs and studies"),
    "visualize": ("stts_slowfast.tools.visualize", "show what was kept of a video"),
    "bench": ("stts_slowfast.tools.bench.command", "compare speed, memory and cost of models"),
    "export": ("stts_slowfast.tools.export", "write a model for torch.export or ONNX"),
    "convert": ("stts_slowfast.tools.convert", "turn checkpoints and the authors' YAML into ours"),
    "doctor": ("stts_slowfast.tools.doctor", "say what a run inside SlowFast finds and misses"),
}

# What a person can mend: told in one line. Anything else is a fault of ours, and shown in full.
_MENDABLE = (ValueError, OSError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``stts``.

    Args:
        argv: the words after ``stts``; those of the command line by default.

    Returns:
        0, or what the subcommand returned; 2 for what the user can mend; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("stts", description="Token selection for video transformers.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    missing = None
    for name, (module, text) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=text, description=f"{text.capitalize()}.")
        subparser.add_argument(
            "--traceback", action="store_true", help="show where an error came from"
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
        if args.traceback or os.environ.get("STTS_TRACEBACK") or not _is_mendable(error):
            traceback.print_exc()
            return 2 if _is_mendable(error) else 1
        print(f"stts: error: {_one_line(error)}", file=sys.stderr)
        return 2


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """``--checkpoint FILE``; where it is not given, the weights are those that a test takes."""
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="weights; else TEST.CHECKPOINT_FILE_PATH, else the last in OUTPUT_DIR",
    )


def add_opts(parser: argparse.ArgumentParser) -> None:
    """``--opts KEY VALUE ...``, as SlowFast's launcher takes them."""
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config keys and values, on top of the files; comes last",
    )


def _is_mendable(error: Exception) -> bool:
    # A loader's worker turns errors that it cannot rebuild into RuntimeError.
    from stts_slowfast.video import VideoError

    return isinstance(error, (*_MENDABLE, VideoError)) or (
        _from_worker(error) and "VideoError" in str(error)
    )


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    if _from_worker(error):  # the worker's whole traceback; its last line is the message
        text = text.splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _from_worker(error: Exception) -> bool:
    return str(error).startswith("Caught ") and "DataLoader worker" in str(error)
