"""Tables of documents come from committed results, so none can be edited apart from its run."""

import importlib.util
import re
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "projects" / "stts" / "benchmarks"


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", BENCHMARKS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))  # as for a script in this folder
        spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_results(tables):
    """If not, ``python projects/stts/benchmarks/tables.py``."""
    shown = set()
    for document in tables.DOCUMENTS:
        text = document.read_text()
        assert tables.rendered(text) == text, document
        shown |= {name for names in re.findall(tables.BEGIN, text) for name in names.split()}
    assert shown == {path.name for path in (BENCHMARKS / "results").iterdir()}


def test_a_figure_that_was_edited_is_found(tables):
    text = tables.DOCUMENT.read_text()
    table = re.search(f"{tables.BEGIN}.*?{tables.END}", text, flags=re.DOTALL)
    figure = table.start() + re.search(r"\d\.\d\d \|", table[0]).start()
    edited = text[:figure] + str((int(text[figure]) + 1) % 10) + text[figure + 1 :]
    assert tables.rendered(edited) == text != edited


def test_no_table_of_models_is_older_than_the_code(tables):
    assert not re.search(r"\bolder\b", tables.DOCUMENT.read_text().partition("## The operator")[0])
