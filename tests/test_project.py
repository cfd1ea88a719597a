"""Workflows, CONTRIBUTING.md and templates name only files that exist."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PAGES = ["CONTRIBUTING.md", "SECURITY.md"]


def commands(tree):
    """Every ``run`` of a workflow, also those in a matrix."""
    if isinstance(tree, dict):
        yield from (tree[key] for key in ("run",) if isinstance(tree.get(key), str))
        tree = tree.values()
    elif not isinstance(tree, list):
        return
    for value in tree:
        yield from commands(value)


def paths_in(text):
    """What looks like a file or folder of this repository."""
    found = re.findall(r"(?:stts_slowfast|tests|projects|configs|docs|examples)/[\w./]*\w", text)
    return {path for path in found if not path.startswith("tests/pytest")}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_files_that_exist(path):
    tree = yaml.safe_load(path.read_text())
    assert tree["permissions"] == {"contents": "read"}  # a job that needs more asks for it
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for job in tree["jobs"].values():
        assert job.get("uses") or job["steps"]
    for command in commands(tree):
        for name in paths_in(command):
            assert (ROOT / name).exists(), name
        for extras in re.findall(r"-e \"?\.\[([\w,]+)\]", command):
            assert set(extras.split(",")) <= set(setup["options.extras_require"]), extras


def test_the_promised_workflows_exist():
    assert {"tests", "nightly", "docs", "release"} <= {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("name", PAGES)
def test_pages_name_files_that_exist(name):
    for path in paths_in((ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=str)
def test_issue_forms_are_whole(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        return
    assert form["name"] and form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    assert all(
        field["attributes"]["label"] for field in form["body"] if field["type"] != "markdown"
    )
