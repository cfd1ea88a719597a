"""Writes the tables and charts of documents from the results in results/.

    bash projects/stts/benchmarks/cpu.sh projects/stts/benchmarks/results    # measures
    bash projects/stts/selection.sh DIR                                      # trains
    python projects/stts/benchmarks/tables.py [--selection DIR]              # writes them

A table is between ``<!-- table: FILE.json ... -->`` and ``<!-- end of table -->``; several files
are one table. A test compares the documents with what this gives. --selection makes selection.csv
of the studies of selection.sh.
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import IO

import layouts
import pandas
import token_layouts
from matplotlib.figure import Figure

from stts_slowfast.tools.bench.command import GIB, speed_cells
from stts_slowfast.tools.markdown import markdown_table
from stts_slowfast.tools.study.results import plot

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.with_name("benchmarks.md")
DOCS = FOLDER.parents[2] / "docs"
DOCUMENTS = (DOCUMENT, DOCS / "experiments.md", DOCS / "which-tokens.md")
# Charts of rows of selection.csv: their kind and model.
CHARTS = {("clutter", "mvit"): DOCS / "accuracy.png"}
LAYOUTS = {**layouts.LAYOUTS, **token_layouts.LAYOUTS}
BEGIN, END = r"<!-- table: (.*?) -->\n", r"<!-- end of table -->"


def rendered(text: str) -> str:
    """A document with all of its tables written anew."""

    def replace(found: re.Match) -> str:
        names = found[1].split()
        reports = [read(FOLDER / "results" / name) for name in names]
        if names[0] in LAYOUTS:
            table = LAYOUTS[names[0]](reports)
        else:
            table = f"{describe(reports)}\n\n{tabulate(reports)}"
        return f"<!-- table: {found[1]} -->\n{table}\n\n{END}"

    return re.sub(f"{BEGIN}.*?{END}", replace, text, flags=re.DOTALL)


def describe(reports: list[dict]) -> str:
    """How the results of a table were measured."""
    counts = sorted({len(each) for report in reports for each in all_seconds(report["rows"])})
    several = " or ".join(str(count) for count in counts if count > 1)
    steps = [f"medians of {several} steps"] * bool(several) + ["one step"] * (1 in counts)
    first = reports[0]
    size = first.get("batch_size") or first["settings"]["batch_size"]
    batch = "one clip" if size == 1 else f"{size} clips"
    how = f"{layouts.machine(first)}; {' or '.join(steps)}"
    return f"Batches of {batch}, {how} in core-seconds:"


def all_seconds(rows: list[dict]) -> list[list[float]]:
    """The measured seconds of each row and mode."""
    found, waiting = [], [row["seconds"] for row in rows]
    while waiting:
        each = waiting.pop()
        waiting += each.values() if isinstance(each, dict) else []
        found += [each] if isinstance(each, list) else []
    return found


def tabulate(reports: list[dict]) -> str:
    """The table of one or several reports of ``stts bench --json``, or of ``authors.py``."""
    rows = [row for report in reports for row in report["rows"]]
    if "theirs" in rows[0]["seconds"]:
        return compare(rows)
    size = reports[0]["settings"]["batch_size"]
    modes, frames = list(rows[0]["seconds"]), rows[0]["frames"]
    has_memory = all(len(row["memory"]) == len(modes) for row in rows)
    head = ["model", *(["frames"] if frames else []), "params (M)", "GFLOPs", "ratio"]
    for mode in modes:
        head += [f"{mode} clips/s", "ratio"] + [f"{mode} GiB", "ratio"] * has_memory
    lines = []
    for row in rows:
        base = next(other for other in rows if other["frames"] == row["frames"])
        cells = [row["name"], *([str(row["frames"])] if frames else [])]
        cells += [f"{row['parameters'] / 1e6:.2f}", f"{row['gflops']:.2f}"]
        cells += [f"{base['gflops'] / row['gflops']:.2f}"]
        for mode in modes:
            cells += speed_cells(row["seconds"][mode], base["seconds"][mode], size)
            if has_memory:
                memory = row["memory"][mode]
                cells += [f"{memory / GIB:.2f}", f"{memory / base['memory'][mode]:.2f}"]
        lines.append(cells)
    return markdown_table(head, lines)


def compare(rows: list[dict]) -> str:
    """Seconds of a step of both implementations, and how many times faster ours is."""
    head = ["model"]
    for mode in ("eval", "train"):
        head += [f"{mode}, theirs", f"{mode}, ours", "ratio"]
    lines = []
    for row in rows:
        cells = [row["name"]]
        for mode in ("eval", "train"):
            theirs, ours = (
                statistics.median(row["seconds"][who][mode]) for who in ("theirs", "ours")
            )
            cells += [f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.2f}"]
        lines.append(cells)
    return markdown_table(head, lines)


def read(path: Path) -> dict:
    """A file of results; of a CSV its rows, in which nothing is None."""
    if path.suffix == ".json":
        found: dict = json.loads(path.read_text())
        return found
    table = pandas.read_csv(path).astype(object)
    return {"rows": table.where(table.notna(), None).to_dict("records")}


def collect(folder: Path) -> None:
    """Writes selection.csv from the studies in ``folder/KIND/study_MODEL``."""
    tables = []
    for path in sorted(folder.glob("*/study_*/study.csv")):
        table = pandas.read_csv(path).drop(columns=["clips_per_s"])  # beside other jobs
        table.insert(0, "kind", path.parts[-3])
        table.insert(1, "model", path.parent.name.removeprefix("study_"))
        tables.append(table)
    pandas.concat(tables).to_csv(FOLDER / "results" / "selection.csv", index=False)


def draw(kind: str, model: str, file: str | IO[bytes]) -> Figure:
    """The chart of a study of selection.csv."""
    rows = pandas.read_csv(FOLDER / "results" / "selection.csv")
    return plot(rows[(rows["kind"] == kind) & (rows["model"] == model)].to_dict("records"), file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--selection", type=Path, metavar="DIR", help="folder of selection.sh")
    if selection := parser.parse_args().selection:
        collect(selection)
    for study, picture in CHARTS.items():
        draw(*study, str(picture))
    for document in DOCUMENTS:
        document.write_text(rendered(document.read_text()))
