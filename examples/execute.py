"""Runs notebooks and writes their output into them: ``python examples/execute.py [NOTEBOOK ...]``.

No Jupyter is needed: cells are plain Python, run one after the other in a temporary folder. What a
cell prints, the value of its last line and the figures that it leaves open become its output.
``--set NAME=VALUE`` changes a number of the cell tagged ``parameters``, for a shorter run; with
``--dry`` the files stay as they are.
"""

import argparse
import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def execute(path: Path, parameters: dict | None = None) -> dict:
    """The notebook with the output of its cells, run in the present folder.

    Args:
        path: of the notebook.
        parameters: values of names that the cell tagged ``parameters`` sets.

    Raises:
        KeyError: if that cell does not set a name.
    """
    notebook = json.loads(path.read_text())
    names: dict = {"__name__": "__main__"}
    count = 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        count += 1
        source = "".join(cell["source"])
        cell["outputs"] = run(source, names, f"{path.name}[{number}]")
        cell["execution_count"] = count
        if "parameters" in cell["metadata"].get("tags", []):
            for name, value in (parameters or {}).items():
                names[name] = type(names[name])(value)
    return notebook


def run(source: str, names: dict, title: str) -> list[dict]:
    """Runs a cell in ``names``; its outputs, as a notebook stores them."""
    tree = ast.parse(source, title)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, title, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), title, "eval"), names)
    outputs = []
    if printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if "matplotlib.pyplot" in sys.modules:
        outputs += [_display({"image/png": picture}) for picture in _figures()]
        value = None if type(value).__module__.startswith("matplotlib") else value
    if value is not None:
        outputs.append(_display({"text/plain": repr(value)}))
    return outputs


def _display(data: dict) -> dict:
    return {"output_type": "display_data", "data": data, "metadata": {}}


def _figures():
    """The open figures as PNG in base64; they are closed."""
    from matplotlib import pyplot

    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, dpi=60, bbox_inches="tight")
        pyplot.close(number)
        yield base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--dry", action="store_true", help="do not write the output")
    args = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "agg")
    paths = [path.resolve() for path in args.notebooks]
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            done = execute(path, dict(pair.split("=") for pair in args.set))
            os.chdir(HERE)
        if not args.dry:
            path.write_text(json.dumps(done, indent=1) + "\n")
        print(f"ran {path.name}")


if __name__ == "__main__":
    main()
