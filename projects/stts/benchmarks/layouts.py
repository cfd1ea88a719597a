"""The tables of ../benchmarks.md that are not of ``stts bench`` alone; tables.py writes them.

``LAYOUTS`` has, by the first file of a table, a function from the contents of its files to a line
of how they were measured and the table.
"""

import statistics

from loader import TITLES

from stts_slowfast.tools.bench import command
from stts_slowfast.tools.bench.published import Published
from stts_slowfast.tools.bench.spec import BenchSpec
from stts_slowfast.tools.markdown import markdown_table


def machine(report: dict) -> str:
    """``one CPU thread, PyTorch 2.14.1``"""
    device = report["device"].replace("1 CPU threads", "one CPU thread")
    return f"{device}, PyTorch {report['torch'].partition('+')[0]}"


def how(report: dict, words: str) -> str:
    """``One CPU thread, PyTorch 2.14.1; <words>:``"""
    device = machine(report)
    return f"{device[0].upper()}{device[1:]}; {words}:"


def models(reports: list[dict]) -> str:
    """Models of SlowFast's registry, with their views and published accuracy."""
    (report,) = reports
    rows = []
    for row in report["rows"]:
        published = row["published"] and Published(**row["published"])
        rows.append(BenchSpec(**{**row, "published": published}))
    repeats, size = report["settings"]["repeats"], report["settings"]["batch_size"]
    words = f"medians of {repeats} steps of {size} clip in core-seconds"
    return f"{how(report, words)}\n\n{command.table(rows, size)}"


def operator(reports: list[dict]) -> str:
    """``topk.py``."""
    (report,) = reports
    head = ["B, d, k, n", "one-hot ms", "ours ms", "ratio", "one-hot MB", "ours MB", "ratio"]
    lines = []
    for row in report["rows"]:
        both = [1e3 * statistics.median(row["seconds"][who]) for who in ("one-hot", "ours")]
        sizes = [row["memory"][who] / 1e6 for who in ("one-hot", "ours")]
        cells = [f"{x:.1f}" for slow, fast in (both, sizes) for x in (slow, fast, slow / fast)]
        lines.append([", ".join(map(str, row["shape"])), *cells])
    repeats = len(report["rows"][0]["seconds"]["ours"])
    words = f"medians of {repeats} passes in core time"
    return f"{how(report, words)}\n\n{markdown_table(head, lines)}"


def loader(reports: list[dict]) -> str:
    """``loader.py``: ratios are to the first way of each item; a training item is random, so its
    time is a mean."""
    (report,) = reports
    lines, first = [], {}
    for row in report["rows"]:
        average = statistics.fmean if row["table"] == "train" else statistics.median
        took = average(row["ms"])
        base = first.setdefault(row["table"], took)
        lines.append([TITLES[row["table"]], row["way"], f"{took:.1f}", f"{base / took:.1f}"])
    counts = {row["table"]: len(row["ms"]) for row in report["rows"]}
    words = f"medians of {max(counts[t] for t in counts if t != 'train')} rounds"
    words += f", of training items the mean of {counts['train']}" if "train" in counts else ""
    return f"{how(report, words)}\n\n{markdown_table(['item', '', 'core-ms', 'ratio'], lines)}"


def decoders(reports: list[dict]) -> str:
    """``decoders.py``: minima, by the number of threads."""
    (report,) = reports
    fastest = {(row["way"], row["threads"]): min(row["core_ms"]) for row in report["rows"]}
    ways = list(dict.fromkeys(row["way"] for row in report["rows"]))
    lines = []
    for way in ways:
        cells = [f"{fastest[way, 1]:.0f}", f"{fastest[ways[0], 1] / fastest[way, 1]:.1f}"]
        lines.append([way, *cells, f"{fastest[way, 2]:.0f}"])
    words = f"minima of {len(report['rows'][0]['ms'])} rounds in core time"
    head = ["", "one thread: core-ms", "ratio", "two threads: core-ms"]
    return f"{words.capitalize()}:\n\n{markdown_table(head, lines)}"


def exact_frames(reports: list[dict]) -> str:
    """``exact_frames.py``."""
    (report,) = reports
    lines = []
    for row in report["rows"]:
        before, today = (min(row["ms"][when]) for when in ("before", "today"))
        cells = [f"{before:.1f}", f"{today:.1f}", f"{today / before:.2f}"]
        lines.append([f"{row['video']}: {row['way']}", *cells])
    words = f"minima of {len(report['rows'][0]['ms']['today'])} rounds in core time"
    head = ["", "before, ms", "today, ms", "ratio"]
    return f"{how(report, words)}\n\n{markdown_table(head, lines)}"


def whole_test(reports: list[dict]) -> str:
    """``whole_test.py``: ratios are to the first way."""
    (report,) = reports
    keys = ("seconds", "core_seconds", "top1")
    medians = [[statistics.median(row[key]) for key in keys] for row in report["rows"]]
    lines = []
    for row, (seconds, busy, top1) in zip(report["rows"], medians):
        ratios = f"{medians[0][0] / seconds:.1f}", f"{medians[0][1] / busy:.1f}"
        cells = [f"{seconds:.1f}", ratios[0], f"{busy:.1f}", ratios[1], f"{top1:.1f}"]
        lines.append([row["way"], *cells])
    rounds = len(report["rows"][0]["seconds"])
    words = "one round" if rounds == 1 else f"medians of {rounds} rounds"
    head = ["", "seconds", "ratio", "core-seconds", "ratio", "top-1"]
    return f"{how(report, words)}\n\n{markdown_table(head, lines)}"


def loaders(reports: list[list[dict]]) -> str:
    """``stts bench --data`` of each engine, without workers: their core time is not measured."""
    times: dict[str, dict] = {}
    for engine, rows in zip(("slowfast", "standalone"), reports):
        for row in rows:
            times.setdefault(row["row"], {})[engine, row["split"]] = row["core-ms / clip"]
    ways = [(engine, split) for split in ("train", "test") for engine in ("slowfast", "standalone")]
    lines = [
        [name, *(f"{of[way]:.0f}" if way in of else "" for way in ways)]
        for name, of in times.items()
    ]
    head = ["core-ms / clip", *(f"{split}, {engine}" for engine, split in ways)]
    return markdown_table(head, lines)


def end_to_end(reports: list[list[dict]]) -> str:
    """``stts bench --end-to-end`` of each engine; ratios are to its first row."""
    lines = []
    for engine, rows in zip(("standalone", "slowfast"), reports):
        for row in rows:
            ratio = rows[0]["seconds"] / row["seconds"]
            cells = [f"{row['seconds']:.1f}", f"{ratio:.1f}"]
            cells += [f"{row['waiting s']:.1f}", f"{row['computing s']:.1f}"]
            lines.append([row["row"], engine, *cells])
    head = ["", "engine", "seconds", "ratio", "waiting", "computing"]
    return markdown_table(head, lines)


def selection(reports: list[dict]) -> str:
    """``selection.sh``: top-1 of fine-tuned rows, mean and sample deviation of the seeds."""
    budgets = {
        ("time", 0.25, None): "frames",
        ("space", None, 0.25): "tokens of a frame",
        ("both", 0.5, 0.25): "both",
        ("both", 0.125, 0.25): "both, 3%",
    }
    models = {"mvit": "MViT", "timesformer": "TimeSformer", "video_swin": "Video Swin"}
    found: dict[tuple, list[float]] = {}
    for row in reports[0]["rows"]:
        if row["trained"]:
            budget = budgets.get((row["dimension"], row["time"], row["space"]))
            key = (row["kind"], row["model"], budget, row["scorer"])
            found.setdefault(key, []).append(row["top1"])
    lines = []
    for kind in ("clutter", "needle", "motion"):
        for model, title in models.items():
            for budget in budgets.values():
                keys = [(kind, model, budget, name) for name in ("learned", "uniform", "random")]
                if keys[0] in found:
                    values = [found[key] for key in [(kind, model, None, "all"), *keys]]
                    cells = [
                        f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in values
                    ]
                    lines.append([kind, title, budget, *cells])
    head = ["kind", "model", "kept share of", "all tokens", "learned", "uniform", "random"]
    return markdown_table(head, lines)


LAYOUTS = {
    "selection.csv": selection,
    "models.json": models,
    "topk.json": operator,
    "loader.json": loader,
    "decoders.json": decoders,
    "exact_frames.json": exact_frames,
    "whole_test.json": whole_test,
    "loaders_slowfast.json": loaders,
    "end_to_end_standalone.json": end_to_end,
}
