"""The rows of mutations.py find the lines that they break."""

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
    assert (HERE.parent / row.tests.split()[0].partition("::")[0]).is_file()


def test_a_change_that_no_test_notices_is_reported():
    row = mutations.Mutation(
        "configfiles/values.py",
        "import difflib",
        "import difflib  #",
        "tests/configfiles/test_values.py",
    )
    assert mutations.judge(row) == "GREEN"
