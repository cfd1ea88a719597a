"""The notebooks in examples/ run, on fewer videos and steps, and hold the output of a whole run."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SHORT = {
    "attach": {"steps": 2},
    "study": {"num_train": 16, "num_test": 8, "epochs_all": 2, "epochs_learned": 1},
}
spec = importlib.util.spec_from_file_location("execute", ROOT / "examples" / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def kinds(notebook):
    """What each code cell's output is made of."""
    return [
        [next(iter(output.get("data", {"text": 0}))) for output in cell["outputs"]]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs_and_gives_what_it_holds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / f"{name}.ipynb"
    stored = json.loads(path.read_text())
    done = execute.execute(path, SHORT[name])
    assert kinds(done) == kinds(stored)
    assert any(kinds(stored)), "run python examples/execute.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_a_whole_run(path):
    text = path.read_text()
    assert not re.search(
        r"/(home|root|work|tmp)\b|Error|Traceback", re.sub(r'"image/png.*', "", text)
    )
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert len(cells) <= 8 and os.path.getsize(path) < 400_000


def test_a_parameter_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError, match="stepz"):
        execute.execute(ROOT / "examples" / "attach.ipynb", {"stepz": 1})
