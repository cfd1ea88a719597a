"""Every path, module and test that a document names exists. Nothing of the package is imported."""

import ast
import functools
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "stts_slowfast"
FOLDERS = ("docs", "projects", "examples", ".github", "configs/Kinetics", "configs/SSv2")
SUFFIXES = {".md", ".yml", ".yaml", ".sh", ".sbatch", ".ipynb"}
FILES = sorted(
    path
    for path in [*ROOT.iterdir(), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
    if path.suffix in SUFFIXES
)
EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
EVERY_PAGE = pytest.mark.parametrize(
    "path", [path for path in FILES if path.suffix == ".md"], ids=lambda path: path.stem
)

# A path from the repository's root, anywhere; any path of source code in backticks.
ROOTED = re.compile(
    r"(?<![\w./$-])(?:stts_slowfast|tests|projects|configs|docs|examples)/[\w./*-]*"
)
QUOTED = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|sbatch|ipynb))(?:::\w+)?`")
# A dotted name with the package's name; one in backticks that begins with a module of the package.
DOTTED = re.compile(r"(?<![\w./-])stts_slowfast((?:\.\w+)+)(?![\w/-])")
SHORT = re.compile(r"`([a-z_]+(?:\.\w+)+)(?:\(.*?\))?`")
# Files of SlowFast and of model libraries.
OTHERS = [
    "run_net.py",
    "tools/*_net.py",
    "tools/benchmark.py",
    "tools/visualization.py",
    "setup.py",
    "configs/*/M[Vv]*",
    "configs/*/X3D_M.yaml",
    "projects/mvitv2*",
    "tests/test_models*.py",
]


def text_of(path):
    """A file's text; a notebook's without pictures, the changelog's with the new names alone."""
    text = re.sub(r'"image/png.*', "", path.read_text())
    if path.name == "CHANGELOG.md":
        text = re.sub(r"^ *\|.*\| (.*?) \|$", r"\1", text, flags=re.MULTILINE)
    return text


def prose_of(path):
    return re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)


def is_of_others(name):
    return any(fnmatch(name, pattern) for pattern in OTHERS)


@EVERY_FILE
def test_paths_from_the_root_exist(path):
    for name in ROOTED.findall(text_of(path)):
        name = name.rstrip("./-")
        assert is_of_others(name) or list(ROOT.glob(name)) or list(ROOT.glob(f"{name}_*")), name


@EVERY_PAGE
def test_quoted_source_files_exist(path):
    for name in QUOTED.findall(prose_of(path)):
        places = (ROOT, PACKAGE, ROOT / "tests", path.parent)
        assert is_of_others(name) or any((place / name).exists() for place in places), name


@EVERY_FILE
def test_dotted_names_exist(path):
    for name in DOTTED.findall(text_of(path)):
        assert exists(name[1:]), f"stts_slowfast{name}"


@EVERY_PAGE
def test_short_dotted_names_exist(path):
    modules = {file.stem for file in PACKAGE.iterdir() if file.name != "py.typed"}
    for name in SHORT.findall(prose_of(path)):
        first, _, ending = name.partition(".")
        if first in modules and ending not in ("py", "yaml", "json", "md"):
            assert exists(name), name


@functools.cache
def exists(name):
    """Whether a dotted name below ``stts_slowfast`` is a module, or defined in one."""
    path, names = PACKAGE, name.split(".")
    while names and (path / names[0]).is_dir():
        path /= names.pop(0)
    if names and (path / f"{names[0]}.py").is_file():
        path /= f"{names.pop(0)}.py"
    else:
        path /= "__init__.py"
    if not names:
        return path.is_file()
    text = path.read_text()
    on_demand = re.findall(r'^    "(\w+)": "', text, re.MULTILINE)  # of the package itself
    return names[0] in {*defined(ast.parse(text)), *(on_demand if path.parent == PACKAGE else ())}


def defined(tree):
    """What a module defines or imports at its top level."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from (part.id for part in ast.walk(node) if isinstance(part, ast.Name))


def test_the_tests_of_promises_exist():
    """In a row of reliability.md a test without a file is in the file before it."""
    found = 0
    for row in (ROOT / "projects" / "stts" / "reliability.md").read_text().splitlines():
        file = None
        for name, test in re.findall(r"`([\w/.]*)::(test_\w+)`", row):
            file = ROOT / "tests" / name if name else file
            assert file and file.is_file(), f"{name} {test}"
            assert f"\ndef {test}(" in file.read_text(), f"{file.name}::{test}"
            found += 1
    assert found > 60
