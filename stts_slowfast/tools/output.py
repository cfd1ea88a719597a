"""What commands print and write: table cells, Markdown tables, JSON files."""

from collections.abc import Sequence

from stts_slowfast.standalone.run_logger import write_json

__all__ = ["format_cell", "markdown_table", "write_json"]


def format_cell(value: object) -> str:
    """A float with four significant digits; None and NaN as an empty cell."""
    if value is None or value != value:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
