"""The table of docs/hosts.md is the one that tests/soak/hosts_table.py prints."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
TEXT = PAGE.split("## Tested combinations")[1]
TABLE = re.search(r"\| host .*?\n\n", TEXT, re.DOTALL)[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TABLE.splitlines()
    if line.startswith("|") and "---" not in line
]


def test_each_host_and_each_way_is_in_the_table():
    pytest.importorskip("timm", reason="timm is not installed")
    from tests.soak.hosts_table import COLUMNS, HOSTS

    assert ROWS[0] == ["host", *COLUMNS]
    assert [row[0] for row in ROWS[1:]] == list(HOSTS)


def test_no_cell_is_an_error():
    for host, *cells in ROWS[1:]:
        assert set(cells) <= {"yes", "-", "stock fails"}, host


def test_tests_that_the_page_names_are_there():
    names = re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    assert names and all((Path(__file__).parents[2] / name).is_file() for name in names)
