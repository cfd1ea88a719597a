"""The list of changes that must turn the tests red still finds what it changes."""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
spec = importlib.util.spec_from_file_location("mutations", HERE / "mutations.py")
mutations = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_a_row_finds_its_line(name):
    row = mutations.MUTATIONS[name]
    source = (HERE.parent / mutations.PACKAGE / row.file).read_text()
    assert source.count(row.line) == 1
    assert (HERE.parent / row.tests.split()[0]).is_file()
