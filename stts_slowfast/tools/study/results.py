"""The rows of a study as CSV, JSON, Markdown table and plot."""

import os
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from stts_slowfast.checkpoints.io import atomic_write
from stts_slowfast.plugins import require
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.markdown import format_cell, markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ENDINGS = ("csv", "json", "png")
SCORERS = ("learned", "change", "uniform", "random")
NUMBERS = ("top1", "top5", "gflops", "clips_per_s", "agreement", "frame_recall", "box_recall")
DIMENSIONS = ("time", "space", "both", "tokens", "time+tokens")  # of rows, as panels
COLUMNS = (
    *("name", "dimension", "time", "space", "tokens", "scorer", "trained", "seed"),
    *NUMBERS,
    *("unreadable", "damaged"),
)


def write_results(out: str, results: Sequence[dict]) -> None:
    """Writes OUT/study.csv, .json and .png."""
    pandas = require("pandas")
    write_json(os.path.join(out, "study.json"), results)
    # As objects, counts stay whole numbers beside empty cells.
    frame = pandas.DataFrame(results, columns=COLUMNS, dtype=object)
    atomic_write(
        os.path.join(out, "study.csv"),
        lambda path: frame.to_csv(path, index=False, lineterminator="\r\n"),
    )
    atomic_write(os.path.join(out, "study.png"), lambda path: plot(results, path))


def aggregate_seeds(results: Sequence[dict]) -> "DataFrame":
    """Rows that differ only in their seed as one: means of ``NUMBERS``, ``top1_std``, ``seeds``.

    The index is the row's name without its seed.
    """
    frame = require("pandas").DataFrame(results)
    names = frame.pop("name").str.rpartition("-seed")[0]
    numbers = frame.reindex(columns=list(NUMBERS)).astype(float).groupby(names, sort=False)
    others = frame.drop(columns=list(NUMBERS), errors="ignore").groupby(names, sort=False)
    merged = others.first().join(numbers.mean())
    merged["top1_std"] = numbers["top1"].std().fillna(0.0)
    merged["seeds"] = numbers.size()
    return merged


def summarize(results: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """The columns of ``NUMBERS`` that were measured, and cells: name, numbers; seeds merged."""
    merged = aggregate_seeds(results)
    columns = [column for column in NUMBERS if merged[column].notna().any()]
    lines = []
    for name, row in merged.iterrows():
        cells = [format_cell(value) for value in row[columns]]
        if row["seeds"] > 1:
            cells[0] += f" ± {row['top1_std']:.1f}"
        lines.append([name, *cells])
    return columns, lines


def table(results: Sequence[dict]) -> str:
    """The rows as Markdown, a line for all seeds of a row."""
    columns, lines = summarize(results)
    return markdown_table(["row", *columns], lines)


def plot(results: Sequence[dict], file: str | IO[bytes]) -> "Figure":
    """Draws top-1 accuracy against GFLOPs as PNG: a panel for each dimension, a colour for each
    scorer, hollow markers for rows without fine-tuning."""
    figure_module = require("matplotlib.figure")
    rows = aggregate_seeds(results)
    dimensions = [d for d in DIMENSIONS if (rows["dimension"] == d).any()]
    dimensions = dimensions or ["none"]
    colours = list(dict.fromkeys(["all", *SCORERS, *rows["scorer"]]))
    figure = figure_module.Figure(figsize=(4.4 * len(dimensions) + 1.6, 4), layout="constrained")
    panels = figure.subplots(1, len(dimensions), sharey=True, squeeze=False)[0]
    legend = {}
    for axes, dimension in zip(panels, dimensions):
        panel = rows[rows["dimension"].isin([dimension, "none"])]
        for (scorer, trained), line in panel.groupby(["scorer", "trained"], sort=False):
            line = line.sort_values("gflops", kind="stable")
            if scorer == "all":
                axes.axhline(line["top1"].iloc[0], color="grey", linestyle=":", linewidth=1)
            axes.errorbar(
                line["gflops"],
                line["top1"],
                line["top1_std"],
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
    figure.savefig(file, dpi=120, format="png")
    return figure
