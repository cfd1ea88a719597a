"""Tables of documents come from committed results, so none can be edited apart from its run."""

import importlib.util
import io
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
    files = {path.name for path in (BENCHMARKS / "results").iterdir()}
    assert shown == files


def test_a_figure_that_was_edited_is_found(tables):
    text = tables.DOCUMENT.read_text()
    table = re.search(f"{tables.BEGIN}.*?{tables.END}", text, flags=re.DOTALL)
    figure = table.start() + re.search(r"\d\.\d\d \|", table[0]).start()
    edited = text[:figure] + str((int(text[figure]) + 1) % 10) + text[figure + 1 :]
    assert tables.rendered(edited) == text != edited


def test_a_chart_shows_the_rows_of_its_results(tables):
    for study, picture in tables.CHARTS.items():
        drawn = io.BytesIO()
        figure = tables.draw(*study, drawn)
        assert drawn.getvalue().startswith(b"\x89PNG") and picture.is_file()
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "learned, fine-tuned" in texts and "uniform" in texts
        assert [axes.get_title() for axes in figure.axes] == ["time", "space", "both"]


# Sections whose table is not measured again: its text names the commit.
BY_HAND = {"From the command to the accuracy"}


def test_no_other_table_is_written_by_hand(tables):
    whole = tables.DOCUMENT.read_text()
    text = re.sub(f"{tables.BEGIN}.*?{tables.END}", "", whole, flags=re.DOTALL)
    sections = (section.partition("\n") for section in text.split("\n## ")[1:])
    assert {title for title, _, body in sections if "\n| ---" in body} <= BY_HAND
    assert not re.search(r"\bolder\b", whole)


def test_one_step_has_no_spread_and_is_no_median(tables):
    rows = {"swin.json": False, "mvit.json": True}
    for name, has_spread in rows.items():
        report = tables.read(BENCHMARKS / "results" / name)
        assert ("±" in tables.tabulate([report])) == has_spread
        assert ("medians" in tables.describe([report])) == has_spread
