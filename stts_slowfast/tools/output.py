"""What commands print and write: table cells, Markdown tables, JSON files."""

import json
from collections.abc import Sequence
from typing import Any

from stts_slowfast.checkpoints.io import atomic_write


def format_cell(value: object) -> str:
    """A float with four significant digits; None and NaN as an empty cell."""
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file, which is whole or absent."""

    def write(partial: str) -> None:
        with open(partial, "w") as file:
            json.dump(value, file, indent=1)

    atomic_write(path, write)
