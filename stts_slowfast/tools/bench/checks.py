"""What ``stts bench`` refuses before it measures: options and keys that would have no effect."""

from argparse import Namespace
from collections.abc import Callable, Mapping

import torch

from stts_slowfast.configfiles.extra_keys import EXTRA_RANGES
from stts_slowfast.configfiles.values import check_choice
from stts_slowfast.tools.bench.spec import BenchSpec

# Options of models, which --data and --end-to-end do not have.
OF_MODELS = (
    *("dtype", "batch_size", "modes", "frames", "repeats", "warmup", "core_seconds"),
    *("cast_weights", "compile", "compile_mode", "cuda_graph", "no_memory"),
)
LEAST = {
    **{"batch_size": 1, "batches": 1, "frames": 1, "repeats": 1, "threads": 1},
    **{"warmup": 0, "workers": 0},
}
MATMUL, PRECISION, COMPILE = "MODEL.FLOAT32_MATMUL_PRECISION", "TEST.PRECISION", "TEST.COMPILE"
MIXED = "TRAIN.MIXED_PRECISION"


def check_options(args: Namespace, defaults: Mapping[str, object]) -> None:
    """Checks the options of ``stts bench``, before a config is read.

    Args:
        args: the options.
        defaults: their defaults, by name; a default passes anywhere.

    Raises:
        ValueError: for a value out of range, and for an option that would change nothing, with the
            way out.
    """
    for name, least in LEAST.items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if any(each is not None and each < least for each in values):
            found = " ".join(map(str, values))
            raise ValueError(f"{_option(name)} is {found}: use {least} or more")
    for name in ("modes", "frames", "workers"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise ValueError(f"{_option(name)} is {' '.join(map(str, values))}: name each once")
    given = {name for name, default in defaults.items() if getattr(args, name) != default}
    _check_kind(args, given)
    if args.cuda_graph and args.device != "cuda":
        raise ValueError("--cuda-graph needs --device cuda")
    if args.cast_weights and args.dtype == "float32":
        raise ValueError("--cast-weights needs --dtype bfloat16 or float16")
    if args.core_seconds and args.device == "cuda":
        raise ValueError("--core-seconds is for models on --device cpu")
    for name in ("cast_weights", "cuda_graph"):
        if getattr(args, name) and "eval" not in args.modes:
            raise ValueError(f"{_option(name)} is of evaluation: add eval to --modes")
    if "compile_mode" in given and not args.compile:
        raise ValueError("--compile-mode needs --compile")
    if "compile_mode" in given and args.cuda_graph:
        raise ValueError(
            f"--compile-mode {args.compile_mode} has CUDA graphs of its own: leave out --cuda-graph"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU, use --device cpu")


def _check_kind(args: Namespace, given: set[str]) -> None:
    if not (args.data or args.end_to_end):
        if "workers" in given:
            raise ValueError("--workers is of a loader: add --data or --end-to-end")
        if "batches" in given:
            raise ValueError("--batches is of a loader: add --data")
        return
    kind = "--data" if args.data else "--end-to-end"
    for name in OF_MODELS:
        if name not in given:
            continue
        if name == "core_seconds":
            raise ValueError(f"--core-seconds is for models on --device cpu: leave out {kind}")
        way = f"leave it out, or measure models without {kind}"
        if args.end_to_end:
            way = _KEYS_OF_A_TEST.get(name, way)
        raise ValueError(f"{_option(name)} has no effect with {kind}: {way}")
    if args.data and "device" in given:
        raise ValueError("--device has no effect with --data, which runs no model: leave it out")
    if args.end_to_end and "batches" in given:
        raise ValueError(
            "--batches has no effect with --end-to-end, which runs whole test lists: leave it out"
        )


# A whole test runs as its config says.
_KEYS_OF_A_TEST = {
    "dtype": f"set {PRECISION} in the rows",
    "cast_weights": f"set {PRECISION} in the rows",
    "compile": f"set {COMPILE} in the rows",
    "compile_mode": f"set {COMPILE} in the rows",
    "batch_size": "set TEST.BATCH_SIZE in the rows",
    "frames": "set DATA.NUM_FRAMES in the rows",
}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# ---- keys of the rows -----------------------------------------------------------------------


def key_value(cfg, key: str):
    """The value of one of the keys above, which a checkout of SlowFast may lack."""
    node, _, leaf = key.partition(".")
    default = {PRECISION: "float32", MIXED: False}.get(key, "")
    return getattr(getattr(cfg, node), leaf, default)


def check_choices(cfg) -> None:
    """Raises ``ValueError`` for a value that a key of precision or compilation does not have."""
    for key in (MATMUL, PRECISION, COMPILE):
        check_choice(key, key_value(cfg, key), EXTRA_RANGES[key])


def keys_of_steps(args: Namespace) -> Callable:
    """A check of a row's config: options say how steps are measured, the same for all rows.

    The check raises ``ValueError`` for a key that says otherwise, naming the option.
    """

    def check(cfg) -> None:
        check_choices(cfg)
        precision, mode = key_value(cfg, PRECISION), key_value(cfg, COMPILE)
        if "eval" in args.modes:
            cast = args.dtype == precision and args.cast_weights
            if precision != "float32" and not cast:
                _refuse(PRECISION, precision, f"--dtype {precision} --cast-weights", "float32")
            if mode and not (args.compile and args.compile_mode == mode):
                _refuse(COMPILE, mode, f"--compile --compile-mode {mode}", "''")
        if "train" in args.modes and key_value(cfg, MIXED):
            dtype = key_value(cfg, f"{MIXED}_DTYPE")
            measured = {dtype} if dtype else {"bfloat16", "float16"}
            if args.dtype not in measured:
                _refuse(MIXED, True, f"--dtype {dtype or 'bfloat16 or float16'}", "False")

    return check


def _refuse(key: str, value, option: str, default: str) -> None:
    raise ValueError(
        f"{key} is {value!r}, but an option says how stts bench measures all rows: use {option}, "
        f"or {key}={default} in this row"
    )


def common_matmul_precision(rows: list[BenchSpec]) -> str:
    """``MODEL.FLOAT32_MATMUL_PRECISION`` of all rows, which take turns in one process.

    Raises:
        ValueError: if rows differ, with the value of each.
    """
    if len({row.matmul_precision for row in rows}) > 1:
        found = ", ".join(f"{row.matmul_precision!r} in {row.name}" for row in rows)
        raise ValueError(
            f"{MATMUL} is {found}, but rows that are measured in turn share it: give all rows one "
            "value, or measure them in several runs"
        )
    return rows[0].matmul_precision
