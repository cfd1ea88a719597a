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
# Agreement with the model on all tokens, of a study with --fidelity.
FIDELITY = ("top1_agreement", "kl", "logits_cosine", "features_cosine")
COST = ("gflops", "clips_per_s")
NUMBERS = ("top1", "top5", *FIDELITY, *COST, "agreement", "frame_recall", "box_recall")
DIMENSIONS = ("time", "space", "both", "tokens", "time+tokens")  # of rows, as panels
COLUMNS = (
    *("name", "dimension", "time", "space", "tokens", "scorer", "trained", "seed"),
    *NUMBERS,
    *("unreadable", "damaged"),
)
AXES = {"top1": "top-1 (%)", "top1_agreement": "top-1 agreement with all tokens (%)"}


def metric_of(results: Sequence[dict]) -> str:
    """The number that a study compares: a key of its rows."""
    return FIDELITY[0] if any(FIDELITY[0] in row for row in results) else "top1"


def write_results(out: str, results: Sequence[dict]) -> None:
    """Writes OUT/study.csv, .json and .png."""
    pandas = require("pandas")
    write_json(os.path.join(out, "study.json"), results)
    unused = FIDELITY if metric_of(results) == "top1" else ()
    columns = [name for name in COLUMNS if name not in unused]
    # As objects, counts stay whole numbers beside empty cells.
    frame = pandas.DataFrame(results, columns=columns, dtype=object)
    atomic_write(
        os.path.join(out, "study.csv"),
        lambda path: frame.to_csv(path, index=False, lineterminator="\r\n"),
    )
    atomic_write(os.path.join(out, "study.png"), lambda path: plot(results, path))


def aggregate_seeds(results: Sequence[dict]) -> "DataFrame":
    """Rows that differ only in their seed as one: means of ``NUMBERS``, ``std`` of the number that
    the study compares, ``seeds``.

    The index is the row's name without its seed.
    """
    frame = require("pandas").DataFrame(results)
    names = frame.pop("name").str.rpartition("-seed")[0]
    numbers = frame.reindex(columns=list(NUMBERS)).astype(float).groupby(names, sort=False)
    others = frame.drop(columns=list(NUMBERS), errors="ignore").groupby(names, sort=False)
    merged = others.first().join(numbers.mean())
    merged["std"] = numbers[metric_of(results)].std().fillna(0.0)
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
            cells[columns.index(metric_of(results))] += f" ± {row['std']:.1f}"
        lines.append([name, *cells])
    return columns, lines


def table(results: Sequence[dict]) -> str:
    """The rows as Markdown, a line for all seeds of a row."""
    columns, lines = summarize(results)
    return markdown_table(["row", *columns], lines)


def plot(results: Sequence[dict], file: str | IO[bytes]) -> "Figure":
    """Draws top-1 accuracy, or agreement, against GFLOPs as PNG: a panel for each dimension, a
    colour for each scorer, hollow markers for rows without fine-tuning."""
    figure_module = require("matplotlib.figure")
    rows, metric = aggregate_seeds(results), metric_of(results)
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
                axes.axhline(line[metric].iloc[0], color="grey", linestyle=":", linewidth=1)
            axes.errorbar(
                line["gflops"],
                line[metric],
                line["std"],
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
    figure.axes[0].set_ylabel(AXES[metric])
    figure.savefig(file, dpi=120, format="png")
    return figure
