"""The report of ``gpu.sh``: tables of what its parts have written, as far as they came."""

import json
from collections.abc import Callable
from pathlib import Path


def read_json(path: Path) -> dict:
    """An object of a JSON file.

    Raises:
        ValueError: naming the file, if it is cut off or anything else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} cannot be read: it has no object")
    return found


def write(args, results: dict[Callable, dict]) -> None:
    """Writes ``report.md`` of the parts that this run has run, by their functions."""
    lines = [f"# {_device(args)}", ""]
    for part, found in results.items():
        title = f"## {part.__name__}: {found['status']}, {found.get('seconds', '?')} s"
        lines += [title, "", " ".join(part.__doc__.split()), "", *_part(args, found), ""]
    (args.out / "report.md").write_text("\n".join(lines))


def _device(args) -> str:
    try:
        import torch

        cuda = args.device == "cuda" and torch.cuda.is_available()
        device = torch.cuda.get_device_name() if cuda else "no GPU"
    except Exception as error:  # a report of the parts is worth more than their machine
        return f"unknown device ({error})"
    return f"{device}, PyTorch {torch.__version__}"


def _part(args, found: dict) -> list[str]:
    """The tables of a part. A table that cannot be made is a line which says why."""
    lines = [found["error"], ""] if "error" in found else []
    for table in [*(_File(args.out / file) for file in found.get("files", ())), _rows, _counts]:
        try:
            lines += table(found)
        except Exception as error:
            lines += [f"not reported: {type(error).__name__}: {error}", ""]
    return lines


class _File:
    """The table of a file that ``stts bench`` has written."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, found: dict) -> list[str]:
        from stts_slowfast.tools.bench import command, spec

        if not self.path.exists():
            return [f"{self.path.name}: not measured, see the log", ""]
        report = read_json(self.path)
        rows = [spec.BenchSpec(**{**row, "published": None}) for row in report["rows"]]
        settings = report["settings"]
        modes = [m for m in settings["modes"] if all(row.seconds.get(m) for row in rows)]
        for row in rows:
            row.seconds = {mode: row.seconds[mode] for mode in modes}
            row.memory = {mode: row.memory[mode] for mode in modes if mode in row.memory}
        how = f"batch {settings['batch_size']}, {settings['dtype']}"
        how += ", CUDA graph" * settings["cuda_graph"] + ", compiled" * settings["compile"]
        how += ", weights cast once" * settings["cast_weights"]
        table = command.table(rows, settings["batch_size"]) if modes else "not measured"
        return [f"{self.path.name}: {how}", "", table, ""]


def _rows(found: dict) -> list[str]:
    rows = found.get("rows")
    if not rows:
        return []
    head = [key for key in rows[0] if key != "longest"]
    lines = [_markdown(head, *([_cell(row.get(key)) for key in head] for row in rows)), ""]
    for row in rows:
        if row.get("longest"):
            lines += [f"Longest in {row['model']}, {row['precision']}, {row['mode']} (us):", ""]
            lines += [f"- {us} `{name}`" for name, us in row["longest"].items()] + [""]
    return lines


def _counts(found: dict) -> list[str]:
    if "passed" not in found and "failed" not in found:
        return []
    counts = [f"{found.get(word, 0)} {word}" for word in ("passed", "failed", "skipped")]
    return [", ".join(counts), *(f"- {failure}" for failure in found["failures"])]


def _markdown(head: list[str], *rows: list[str]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _cell(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
