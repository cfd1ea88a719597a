"""The list of changes that must turn the tests red still finds what it changes."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("mutations", HERE / "mutations.py")
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_a_row_finds_its_line_and_its_tests(name):
    row = mutations.MUTATIONS[name]
    source = (HERE.parent / mutations.PACKAGE / row.file).read_text()
    assert source.count(row.line) == 1
    file, _, word = row.tests.partition(" -k ")
    functions = [
        line for line in (HERE.parent / file).read_text().splitlines() if "def test" in line
    ]
    assert any(part in line for part in word.split(" or ") for line in functions)
