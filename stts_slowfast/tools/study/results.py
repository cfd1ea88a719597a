"""A study's rows as CSV, JSON, table and plot."""

import csv
import json
import os
from collections.abc import Sequence

import torch

from stts_slowfast.checkpoints import atomic_write
from stts_slowfast.tools.bench.spec import markdown

ENDINGS = ("csv", "json", "png")
SCORERS = ("learned", "change", "uniform", "random")
NUMBERS = ("top1", "top5", "gflops", "clips_per_s", "agreement", "frame_recall", "box_recall")
COLUMNS = (
    *("name", "dimension", "time", "space", "scorer", "trained", "seed"),
    *NUMBERS,
    *("unreadable", "damaged"),
)


def write_results(out: str, results: Sequence[dict]) -> None:
    """Writes OUT/study.csv, .json and .png."""
    write_json(os.path.join(out, "study.json"), results)
    atomic_write(os.path.join(out, "study.csv"), lambda path: _write_csv(path, results))
    atomic_write(os.path.join(out, "study.png"), lambda path: plot(results, path))


def write_json(path: str, value) -> None:
    """Writes JSON, whole or not at all."""

    def write(partial: str) -> None:
        with open(partial, "w") as file:
            json.dump(value, file, indent=1)

    atomic_write(path, write)


def _write_csv(path: str, results: Sequence[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results)


def aggregate_seeds(results: Sequence[dict]) -> list[dict]:
    """Rows that differ in their seed alone as one: means, ``top1_std``, ``seeds``."""
    groups: dict[str, list[dict]] = {}
    for row in results:
        groups.setdefault(row["name"].rpartition("-seed")[0], []).append(row)
    merged = []
    for name, rows in groups.items():
        means = {}
        for column in NUMBERS:
            values = [row[column] for row in rows if row[column] is not None]
            means[column] = sum(values) / len(values) if values else None
        spread = torch.tensor([row["top1"] for row in rows]).std(correction=min(len(rows) - 1, 1))
        merged.append(
            {**rows[0], "name": name, **means, "top1_std": spread.item(), "seeds": len(rows)}
        )
    return merged


def table(results: Sequence[dict]) -> str:
    """The rows as Markdown, a line for all seeds of a row."""
    columns = [c for c in NUMBERS if any(row[c] is not None for row in results)]
    lines = [["row", *columns]]
    for row in aggregate_seeds(results):
        cells = ["" if row[c] is None else f"{row[c]:.4g}" for c in columns]
        if row["seeds"] > 1:
            cells[0] = f"{row['top1']:.1f} ± {row['top1_std']:.1f}"
        lines.append([row["name"], *cells])
    return markdown(lines)


def plot(results: Sequence[dict], path: str):
    """Draws accuracy against GFLOPs: a panel a dimension, a colour a scorer, hollow where nothing
    was fine-tuned. Returns matplotlib's figure."""
    from matplotlib.figure import Figure

    rows = aggregate_seeds(results)
    dimensions = [d for d in ("time", "space", "both") if any(r["dimension"] == d for r in rows)]
    panels = max(len(dimensions), 1)
    colours = list(dict.fromkeys(["all", *SCORERS, *(row["scorer"] for row in rows)]))
    figure, legend = Figure(figsize=(4.4 * panels + 1.6, 4), layout="constrained"), {}
    for axes, dimension in zip(
        figure.subplots(1, panels, sharey=True, squeeze=False)[0], dimensions or ["none"]
    ):
        lines: dict[tuple, list] = {}
        for row in rows:
            if row["dimension"] in (dimension, "none"):
                lines.setdefault((row["scorer"], row["trained"]), []).append(row)
        for (scorer, trained), points in lines.items():
            points.sort(key=lambda row: row["gflops"])
            if scorer == "all":
                axes.axhline(points[0]["top1"], color="grey", linestyle=":", linewidth=1)
            axes.errorbar(
                [row["gflops"] for row in points],
                [row["top1"] for row in points],
                [row["top1_std"] for row in points],
                marker="*" if scorer == "all" else "o",
                color=f"C{colours.index(scorer)}",
                markerfacecolor=None if trained else "white",
                linestyle="-" if trained else "--",
                label=f"{scorer}, fine-tuned" if trained else scorer,
            )
        axes.set(title=dimension, xlabel="GFLOPs / clip")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=5)
        handles, labels = axes.get_legend_handles_labels()
        legend |= dict(zip(labels, handles))
    figure.legend(legend.values(), legend.keys(), loc="outside right upper", fontsize=8)
    figure.axes[0].set_ylabel("top-1 (%)")
    figure.savefig(path, dpi=120, format="png")
    return figure
