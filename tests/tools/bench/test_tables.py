"""Tables of benchmarks.md come from committed results, so none can be edited apart from its run."""

import importlib.util
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "projects" / "stts" / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(tables):
    """If not, ``python projects/stts/benchmarks/tables.py``."""
    text = tables.DOCUMENT.read_text()
    assert tables.rendered(text) == text
    shown = {name for names in re.findall(tables.BEGIN, text) for name in names.split()}
    assert shown == {path.name for path in (BENCHMARKS / "results").iterdir()}


def test_a_figure_that_was_edited_is_found(tables):
    text = tables.DOCUMENT.read_text()
    figures = [found for found in re.finditer(r"\d\.\d{3} ±", text)]
    assert figures
    first = figures[0].start()
    edited = text[:first] + str((int(text[first]) + 1) % 10) + text[first + 1 :]
    assert tables.rendered(edited) == text
    assert "older" not in text.partition("## The operator")[0].lower()
