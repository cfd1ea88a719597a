"""The parts of ``gpu.sh``: each in its own process, with a time limit and a file of results."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import gpu_report

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "Kinetics"
MVIT = CONFIGS / "RECOMMENDED_MVIT_B_16x4_T0_0.9_S4_0.9.yaml"
HALF = CONFIGS / "STTS_MVIT_B_16x4_T0_0.5_S4_0.7.yaml"
MVITV2 = CONFIGS / "RECOMMENDED_MVITv2_S_16x4_T0_0.9_S4_0.9.yaml"
TIMESFORMER = CONFIGS / "STTS_TIMESFORMER_96x4_T0_0.5_S4_0.9.yaml"
STOCK, FUSED = ",STTS.ENABLE=False,STTS.FUSED_ATTENTION=False", ",STTS.ENABLE=False"
TINY = ",DATA.NUM_FRAMES=4,DATA.TRAIN_CROP_SIZE=64,DATA.TEST_CROP_SIZE=64,MVIT.EMBED_DIM=24"
TINY_TIMESFORMER = ",DATA.NUM_FRAMES=4,DATA.TRAIN_CROP_SIZE=32,DATA.TEST_CROP_SIZE=32"
TINY_TIMESFORMER += ",TIMESFORMER.EMBED_DIM=48,TIMESFORMER.DEPTH=6"
# The command, which is not installed on the GPU's machine.
STTS = [
    sys.executable,
    "-c",
    "import sys; from stts_slowfast.tools.cli import main; sys.exit(main())",
]


# --- bench --------------------------------------------------------------------------------------


def _bench(args, name: str, rows: list[str], *words: str) -> dict:
    """``stts bench`` of rows ``NAME=FILE,...``; an error ends it and not its part.

    Its file is removed first, and named in the part's file before it is written: what counts is of
    this run, even if the part is killed.
    """
    from stts_slowfast.tools import cli

    path = args.out / f"bench_{name}.json"
    path.unlink(missing_ok=True)
    args.files.append(path.name)
    _write(args, args.part, {"files": args.files})
    common = ["--device", args.device, "--json", str(path)]
    common += (
        ["--repeats", "1", "--warmup", "0"] if args.tiny else ["--repeats", "10", "--warmup", "3"]
    )
    try:
        status = cli.main(["bench", *rows, *common, *words])
    except Exception:  # such as too little memory
        traceback.print_exc()
        status = 1
    return {"status": "done" if status == 0 else "failed", "files": args.files}


def _joined(args, found: list[dict]) -> dict:
    done = all(each["status"] == "done" for each in found)
    return {"status": "done" if done else "failed", "files": args.files}


def _row(args, name: str, config: Path, more: str = "") -> str:
    tiny = TINY_TIMESFORMER if config == TIMESFORMER else TINY
    return f"{name}={config}{more}{tiny if args.tiny else ''}"


def _mvit_rows(args) -> list[str]:
    rows = [
        _row(args, "stock", MVIT, STOCK),
        _row(args, "all tokens fused", MVIT, FUSED),
        _row(args, "0.9 subset", MVIT, ",STTS.OPERATOR=subset"),
        _row(args, "0.9 perturbed", MVIT, ",STTS.OPERATOR=perturbed"),
        _row(args, "0.5 subset", HALF, ",STTS.OPERATOR=subset"),
        _row(args, "0.5 perturbed", HALF, ",STTS.OPERATOR=perturbed"),
    ]
    return [rows[0], rows[2]] if args.tiny else rows


def bench(args) -> dict:
    """MViT-B stock, fused and selected by both operators, in evaluation and training; evaluation
    with weights cast once, as TEST.PRECISION does."""
    found, rows = [], _mvit_rows(args)
    evaluated = [row for row in rows if "perturbed" not in row]  # both evaluate alike
    for batch in ["1"] if args.tiny else ["8", "64"]:
        words = ["--batch-size", batch, "--dtype", "bfloat16"]
        found.append(_bench(args, f"mvit_b{batch}", rows, *words))
        words += ["--cast-weights", "--modes", "eval", "--no-memory"]
        found.append(_bench(args, f"mvit_b{batch}_cast", evaluated, *words))
    return _joined(args, found)


def graphs(args) -> dict:
    """The same evaluation, with weights cast once, compiled and as CUDA graphs."""
    rows = [row for row in _mvit_rows(args) if "perturbed" not in row]
    words = ["--batch-size", "1" if args.tiny else "8", "--dtype", "bfloat16", "--modes", "eval"]
    words += ["--cast-weights"]
    if args.device == "cpu":  # has no graphs, and compiling takes minutes
        return _bench(args, "eager", rows, *words)
    found = [_bench(args, "graphs", rows, *words, "--cuda-graph")]
    # Compiling a model takes most of this part's time.
    found.append(_bench(args, "compiled", rows[:3][-1:], *words, "--compile", "--no-memory"))
    return _joined(args, found)


def others(args) -> dict:
    """MViTv2-S and TimeSformer 96x4."""
    rows = [_row(args, "MViTv2-S stock", MVITV2, STOCK), _row(args, "MViTv2-S 0.9", MVITV2)]
    words = ["--batch-size", "1" if args.tiny else "8", "--dtype", "bfloat16"]
    found = [_bench(args, "mvitv2", rows, *words)]
    rows = [_row(args, "TimeSformer stock", TIMESFORMER, STOCK)]
    rows += [_row(args, "TimeSformer 0.5", TIMESFORMER)]
    found.append(_bench(args, "timesformer", rows, *words))
    return _joined(args, found)


# --- tests --------------------------------------------------------------------------------------


def _pytest(args, which: str) -> dict:
    if args.device == "cpu":
        os.environ["STTS_REHEARSE"] = "cpu"
    which += " and plain" * args.tiny
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_cuda.py", "-k", which]
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    print(ran.stdout)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", ran.stdout)}
    failures = re.findall(r"^FAILED (.*)$", ran.stdout, re.MULTILINE)
    return {"status": "done" if ran.returncode == 0 else "failed", **counts, "failures": failures}


def parity(args) -> dict:
    """Numbers of the GPU beside those of the CPU, for every host and family."""
    return _pytest(args, "numbers")


def tests(args) -> dict:
    """The other tests on a GPU: half precision, graphs, waiting, GradScaler, resuming."""
    return _pytest(args, "not numbers")


# --- profiler -----------------------------------------------------------------------------------


def profile(args) -> dict:
    """Launches, idle share and depthwise share of evaluation and training; float32 beside TF32 and
    bfloat16."""
    import torch

    from stts_slowfast.tools.bench import command, spec

    found = {"status": "done", "rows": []}
    rows = _mvit_rows(args)[:1] if args.tiny else [_mvit_rows(args)[i] for i in (0, 2)]
    for text in rows:
        row = spec.parse_row(text)
        model, shapes = spec.build(row, args.device)
        for precision in ("bf16",) if args.tiny else ("fp32", "tf32", "bf16"):
            torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            words = [text, "--device", args.device, "--batch-size", "1" if args.tiny else "8"]
            words += ["--dtype", "bfloat16" if precision == "bf16" else "float32"]
            for mode in ("eval", "train"):
                step = command.make_step(model, shapes[mode], mode, _parse_bench(words))
                for _ in range(0 if args.tiny else 3):
                    step()
                seconds = min(
                    command.timed(step, args.device) for _ in range(1 if args.tiny else 5)
                )
                line = {
                    "model": row.name,
                    "precision": precision,
                    "mode": mode,
                    "ms": 1e3 * seconds,
                }
                found["rows"].append(line | _profiled(step, args.device, seconds))
                _write(args, "profile", found)  # as it goes
    return found


def _parse_bench(words: list[str]) -> argparse.Namespace:
    from stts_slowfast.tools.bench import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def _profiled(step: Callable, device: str, seconds: float) -> dict:
    import torch
    from torch.profiler import ProfilerActivity

    cuda = device == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    ) as profiler:
        step()
        if cuda:
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    kernels: dict[str, float] = {}
    launches = 0
    for event in profiler.events():
        if event.device_type == kind:
            took = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            kernels[event.name] = kernels.get(event.name, 0.0) + took
            launches += 1
    busy = sum(kernels.values())
    depthwise = sum(us for name, us in kernels.items() if "depthwise" in name.lower())
    longest = sorted(kernels, key=kernels.get, reverse=True)[:12]
    return {
        "launches": launches,
        "idle share": max(0.0, 1.0 - busy / (1e6 * seconds)) if cuda else None,
        "depthwise share": depthwise / busy if busy else 0.0,
        "longest": {name[:90]: round(kernels[name]) for name in longest},
    }


# --- runs ---------------------------------------------------------------------------------------


def runs(args) -> dict:
    """``stts run`` on made videos in bfloat16 and float16: trained, stopped by SIGTERM, resumed."""
    data = args.out / "data"
    sizes = ["--train", "16", "--test", "4"] if args.tiny else ["--train", "256", "--test", "32"]
    _stts("make-data", "--kind", "clutter", "--out", str(data), *sizes, "--force")
    found = {"status": "done", "rows": []}
    for dtype in ("bfloat16",) if args.tiny else ("bfloat16", "float16"):
        folder = args.out / f"run_{dtype}"
        opts = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_EPOCH", "2", "TRAIN.BATCH_SIZE", "8"]
        opts += ["TRAIN.MIXED_PRECISION", "True", "TRAIN.MIXED_PRECISION_DTYPE", dtype]
        opts += ["TEST.PRECISION", dtype, "MODEL.FLOAT32_MATMUL_PRECISION", "high"]
        if args.device != "cpu":  # where compiling takes minutes
            opts += ["TEST.COMPILE", "reduce-overhead"]
        opts += ["NUM_GPUS", "0" if args.device == "cpu" else "1", "STTS.ENABLE", "True"]
        opts += ["DATA_LOADER.NUM_WORKERS", "0" if args.tiny else "4", "TRAIN.AUTO_RESUME", "True"]
        words = ["run", "--engine", "standalone", "--cfg", str(data / "mvit.yaml"), "--opts", *opts]
        start = time.monotonic()
        stopped = _stop_after_an_epoch(words, folder)
        resumed = _stts(*words, check=False)
        log = (folder / "stdout.log").read_text() if (folder / "stdout.log").exists() else ""
        accuracy = re.findall(r'"top1_acc": "([\d.]+)"', log)
        line = {"dtype": dtype, "exit when stopped": stopped, "exit when resumed": resumed}
        line |= {"top-1": accuracy[-1] if accuracy else None}
        line["seconds"] = round(time.monotonic() - start, 1)
        found["rows"].append(line)
        if resumed:
            found["status"] = "failed"
        _write(args, "runs", found)
    return found


def _stts(*words: str, check: bool = True) -> int:
    return subprocess.run([*STTS, *words], cwd=ROOT, check=check).returncode


def _stop_after_an_epoch(words: list[str], folder: Path) -> int:
    """Sends SIGTERM once there is a checkpoint; the exit code."""
    process = subprocess.Popen([*STTS, *words], cwd=ROOT)
    while process.poll() is None and not list(folder.glob("checkpoints/*.pyth")):
        time.sleep(0.1)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    return process.wait()


# --- all of them --------------------------------------------------------------------------------

# The parts in their order, with their seconds.
PARTS: dict[Callable, int] = {
    parity: 90,
    tests: 60,
    bench: 150,
    graphs: 60,
    profile: 90,
    others: 60,
    runs: 60,
}


def _write(args, name: str, found: dict) -> None:
    """Writes a file that is whole or absent, whenever the process is killed."""
    partial = args.out / f".{name}.json.partial"
    partial.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(partial, args.out / f"{name}.json")


def _command(args, name: str) -> list[str]:
    command = [sys.executable, __file__, str(args.out), "--device", args.device, "--part", name]
    return command + (["--tiny"] if args.tiny else [])


def _run_part(args, part: Callable, limit: int) -> dict:
    """Runs a part in a process of its own; what it has written by its limit counts."""
    name = part.__name__
    start, path = time.monotonic(), args.out / f"{name}.json"
    path.unlink(missing_ok=True)  # of an earlier run
    with open(args.out / f"{name}.log", "w") as log:
        process = subprocess.Popen(
            _command(args, name), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"stopped at its limit of {limit} s"
        finally:
            if process.poll() is None:  # also if the script is interrupted
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    try:
        found = gpu_report.read_json(path) if path.exists() else {}
    except ValueError as error:
        found, status = {"error": str(error)}, "failed"
    if status != "done" or "status" not in found:
        found["status"] = status if status != "done" else "failed"
    found["seconds"] = round(time.monotonic() - start, 1)
    _write(args, name, found)
    print(f"{name}: {found['status']}, {found['seconds']} s", flush=True)
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the arguments of gpu.sh, without importing PyTorch."""
    parser = argparse.ArgumentParser("bash projects/stts/gpu.sh", add_help=False)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models, to rehearse")
    names = [part.__name__ for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--part", choices=names, help=argparse.SUPPRESS)  # one, in this process
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)  # arguments only
    args = parser.parse_args(words)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"OUT is {args.out}, which is a file: name a folder")
    args.out, args.files = args.out.resolve(), []
    return args


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    names = {part.__name__: part for part in PARTS}
    if args.check:
        return 0
    if args.part:
        found = names[args.part](args)
        _write(args, args.part, found)
        return 0 if found["status"] == "done" else 1
    results: dict[str, dict] = {}
    for name in dict.fromkeys(args.parts):
        limit = 600 if args.device == "cpu" else PARTS[names[name]]  # a rehearsal may be slow
        results[name] = _run_part(args, names[name], limit)
        gpu_report.write(args, {names[each]: found for each, found in results.items()})
    print(f"all tables: {args.out / 'report.md'}")
    return 0 if all(found["status"] == "done" for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
