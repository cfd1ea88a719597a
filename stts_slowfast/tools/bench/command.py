"""``stts bench``: speed, memory and cost of any models, side by side in one run."""

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from stts_slowfast.annealing import update_schedule
from stts_slowfast.evaluation import half_precision, matmul_precision
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench import checks, loader
from stts_slowfast.tools.bench.published import Published
from stts_slowfast.tools.bench.spec import ENGINES, BenchSpec, build_all, parse_row
from stts_slowfast.tools.markdown import markdown_table

DTYPES = ("float32", "bfloat16", "float16")
MODES = ("eval", "train")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts bench``."""
    parser.add_argument(
        "rows",
        nargs="+",
        metavar="[NAME=]FILE[,KEY=VALUE...]",
        help="a config, with keys to change; the first row is the baseline of the ratios. "
        "STTS.ENABLE=False switches selection off, STTS.FUSED_ATTENTION=False fused attention",
    )
    parser.add_argument(
        "--engine",
        default="standalone",
        choices=ENGINES,
        help="builds the models; slowfast also has its own, such as SlowFast, X3D, C2D, I3D",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--data", action="store_true", help="measure only the loader, not models")
    kind.add_argument(
        "--end-to-end", action="store_true", help="measure a whole test, from files to scores"
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[0], help="of the loader, for these two"
    )
    parser.add_argument("--batches", type=int, default=20, help="of each loader with --data")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of autocast")
    parser.add_argument("--batch-size", type=int, default=2, help="clips in a step")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--frames", type=int, nargs="+", help="clip lengths, for a scaling curve")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each row")
    parser.add_argument("--warmup", type=int, default=1, help="steps before them")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument(
        "--core-seconds",
        action="store_true",
        help="time steps by core time instead of the clock, for a machine that others use too",
    )
    parser.add_argument(
        "--cast-weights",
        action="store_true",
        help="evaluate with weights cast to --dtype once, as TEST.PRECISION does",
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True)")
    parser.add_argument("--compile-mode", default="default", choices=COMPILE_MODES, help="its mode")
    parser.add_argument("--cuda-graph", action="store_true", help="replay a CUDA graph in eval")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument("--json", metavar="FILE", help="file to write every number to")
    parser.add_argument("--plot", metavar="PNG", help="draw time against GFLOPs, or frames")


def main(args: Namespace) -> int:
    """Measures all rows and prints the table.

    Raises:
        ValueError: for a row that cannot be read or built, or for options that exclude each other.
    """
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    checks.check_options(args, vars(parser.parse_args(["row"])))
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [parse_row(text, args.engine) for text in args.rows]
    if args.data or args.end_to_end:
        return loader.run(rows, args)
    if args.frames:
        rows = [
            replace(row, frames=frames, seconds={}, memory={})
            for frames in args.frames
            for row in rows
        ]
    try:
        measure(rows, args)
    finally:  # an interrupted run prints what it has measured
        if any(rows[-1].seconds.values()):
            print(table(rows, args.batch_size), flush=True)
    if args.plot:
        plot(rows, args.batch_size, args.plot)
    return 0


def measure(rows: list[BenchSpec], args: Namespace) -> None:
    """Measures all rows, one step of each in turn, so that the machine's load is the same for all.
    --json is written after each turn."""
    models = build_all(rows, args.device, checks.keys_of_steps(args))
    precision = checks.common_matmul_precision(rows)
    for row, (model, shapes) in zip(rows, models):
        row.gflops = count_gflops(model, torch.zeros(1, *shapes["eval"], device=args.device))
        print(f"{row.name}: {row.gflops:.2f} GFLOPs", file=sys.stderr)
    with matmul_precision(precision):
        for mode in args.modes:
            with cast_weights([model for model, _ in models], mode, args):
                measure_seconds(rows, models, mode, args)
        if not args.no_memory:
            measure_memory(rows, models, args)


def measure_memory(rows: list[BenchSpec], models: list, args: Namespace) -> None:
    """Measures the memory of a step of each row in each mode."""
    for row, (model, shapes) in zip(rows, models):
        for mode in args.modes:
            weights = tensors_of(model)
            with cast_weights([model], mode, args):
                weights |= tensors_of(model)
                step = make_step(model, shapes[mode], mode, args)
                step()
                if args.cuda_graph and mode == "eval":  # a replay allocates nothing
                    step = functools.partial(capture, step)
                row.memory[mode] = sum(weights.values()) + peak_memory(step, args.device)
        save(rows, args)


def measure_seconds(rows: list[BenchSpec], models: list, mode: str, args: Namespace) -> None:
    """Times the steps of all rows in one mode, in turn."""
    steps = [make_step(model, shapes[mode], mode, args) for model, shapes in models]
    if args.cuda_graph and mode == "eval":
        steps = [capture(step) for step in steps]
    for repeat in range(args.warmup + args.repeats):
        for row, step in zip(rows, steps):
            seconds = timed(step, args.device, args.core_seconds)
            if repeat >= args.warmup:
                row.seconds.setdefault(mode, []).append(seconds)
        print(f"{mode} {repeat + 1}/{args.warmup + args.repeats}", file=sys.stderr)
        save(rows, args)


@contextlib.contextmanager
def cast_weights(models: list[nn.Module], mode: str, args: Namespace) -> Iterator[None]:
    """Context manager: with --cast-weights, evaluation runs as ``TEST.PRECISION`` specifies."""
    with contextlib.ExitStack() as stack:
        if args.cast_weights and mode == "eval":
            for model in models:
                stack.enter_context(half_precision(model, getattr(torch, args.dtype)))
        yield


def tensors_of(model: nn.Module) -> dict[int, int]:
    """Bytes of the parameters and buffers, by their address."""
    return {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}


def save(rows: list[BenchSpec], args: Namespace) -> None:
    """Writes --json: machine, options and rows."""
    if args.json:
        plain = (str, int, float, bool, list, type(None))
        settings = {key: value for key, value in vars(args).items() if isinstance(value, plain)}
        results = {"settings": settings, "rows": [asdict(row) for row in rows]}
        write_json(args.json, machine(args.device) | results)


def make_step(model: nn.Module, shape: torch.Size, mode: str, args: Namespace):
    """A function without arguments that runs one batch: forward, in training also backward."""
    model.train(mode == "train")
    update_schedule(model, 1.0)  # the cost of training at the end of budget annealing
    clips = torch.randn(args.batch_size, *shape, device=args.device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
    forward = model
    if args.compile:
        forward = torch.compile(model, fullgraph=True, mode=args.compile_mode)
    dtype = getattr(torch, args.dtype)

    def autocast():
        half = dtype != torch.float32
        return torch.autocast(args.device, dtype) if half else contextlib.nullcontext()

    def train():
        model.train()
        with autocast():
            logits = forward(clips)
        F.cross_entropy(logits.float(), labels).backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate():
        model.eval()
        with autocast():
            return forward(clips)

    return train if mode == "train" else evaluate


def capture(step):
    """Captures a step as a CUDA graph; returns the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(step, device: str, core_seconds: bool = False) -> float:
    """Wall-clock seconds of one step, including the device's work, or seconds of all cores."""
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    clock = time.process_time if core_seconds else time.perf_counter
    synchronize()
    start = clock()
    step()
    synchronize()
    return clock() - start


def peak_memory(step, device: str) -> int:
    """Peak bytes that a step allocates for tensors, as PyTorch counts them.

    On a CPU, workspaces of its libraries and caches of the C allocator are not included.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((change for _, change in changes), initial=0))


def table(rows: list[BenchSpec], batch_size: int) -> str:
    """The rows as a Markdown table; ratios are to the first row of the same clip length."""
    modes = list(rows[-1].seconds)
    has_memory = all(len(row.memory) == len(modes) for row in rows)
    has_published = any(row.published for row in rows)
    head = ["model", "frames", "params (M)", "GFLOPs", "views", "GFLOPs / video", "published top-1"]
    left_out = {"frames": not rows[0].frames, "published top-1": not has_published}
    head = [title for title in head if not left_out.get(title)]
    for mode in modes:
        head += [f"{mode} clips/s", "ratio"]
        head += [f"{mode} GiB", "ratio"] if has_memory else []
    lines = []
    for row in rows:
        base = next(other for other in rows if other.frames == row.frames)
        cells = [row.name] + ([str(row.frames)] if row.frames else [])
        clips, crops = row.views
        cells += [f"{row.parameters / 1e6:.2f}", f"{row.gflops:.2f}", f"{clips} x {crops}"]
        cells += [f"{clips * crops * row.gflops:.2f}"]
        if has_published:
            cells += [_published(row.published) if row.published else ""]
        for mode in modes:
            cells += speed_cells(row.seconds[mode], base.seconds[mode], batch_size)
            if has_memory:
                cells += [f"{row.memory[mode] / GIB:.2f}"]
                cells += [f"{row.memory[mode] / base.memory[mode]:.2f}"]
        lines.append(cells)
    return markdown_table(head, lines)


def _published(result: Published) -> str:
    """``78.4 of 5 x 1 (its source)``: the views are those of the published number."""
    views = " of {} x {}".format(*result.views) if result.views else ""
    return f"{result.top1:.1f}{views} ({result.source})"


def speed_cells(seconds: list[float], base: list[float], batch_size: int) -> list[str]:
    """Median of clips per second, of several steps ± half the interquartile range, and ratio."""
    speed, spread = clips_per_second(seconds, batch_size)
    ratio = speed / clips_per_second(base, batch_size)[0]
    return [f"{speed:.3f}" + f" ± {spread:.3f}" * (len(seconds) > 1), f"{ratio:.2f}"]


def clips_per_second(seconds: list[float], batch_size: int) -> tuple[float, float]:
    """Median, and half the interquartile range."""
    speeds = [batch_size / second for second in seconds]
    if len(speeds) < 2:
        return speeds[0], 0.0
    low, middle, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return middle, (high - low) / 2


def plot(rows: list[BenchSpec], batch_size: int, path: str) -> None:
    """Draws seconds per clip against GFLOPs, with the line of perfect saving, or frames."""
    from matplotlib.figure import Figure

    modes = list(rows[0].seconds)
    figure = Figure(figsize=(5 * len(modes), 4), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes):
        times = [1 / clips_per_second(row.seconds[mode], batch_size)[0] for row in rows]
        if len({row.frames for row in rows}) > 1:
            for name in dict.fromkeys(row.name for row in rows):
                chosen = [i for i, row in enumerate(rows) if row.name == name]
                frames = [rows[i].frames for i in chosen]
                axes.plot(frames, [times[i] for i in chosen], marker="o", label=name)
            axes.set_xlabel("frames")
            axes.legend()
        else:
            gflops = [row.gflops for row in rows]
            axes.plot([0, gflops[0]], [0, times[0]], "--", color="grey", label="perfect saving")
            for row, x, y in zip(rows, gflops, times):
                axes.plot(x, y, "o")
                axes.annotate(row.name, (x, y), xytext=(4, 4), textcoords="offset points")
            axes.set_xlabel("GFLOPs")
            axes.set_xlim(left=0)
            axes.legend()
        axes.set_ylim(bottom=0)
        axes.set_ylabel("seconds per clip")
        axes.set_title("evaluation" if mode == "eval" else "training")
    figure.savefig(path, dpi=150)


def machine(device: str) -> dict:
    """What each file of results says of the machine: device, CPU threads, PyTorch's version."""
    threads = torch.get_num_threads()
    return {"device": device_name(device), "threads": threads, "torch": torch.__version__}


def device_name(device: str) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"
