"""The table of functions that are called by name after SlowFast's modules are imported."""

import ast
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest

from stts_slowfast.pyslowfast import hook_table

ROOM = Path(hook_table.__file__).parent
NAMES = sorted(set(itertools.chain(*hook_table.HOOKS.values())))
PATCHES = {f: switch for switch, p in hook_table.PATCHES.items() for f in p.hooks.values()}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_a_function_that_takes_the_imported_module(name):
    file, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(f"{hook_table.__package__}.{file}"), function)
    inspect.signature(found).bind("the module")


def test_every_hook_of_the_package_is_in_the_table():
    defined = set()
    for path in ROOM.rglob("*.py"):
        file = ".".join(path.relative_to(ROOM).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.match("patch_|wrap_", node.name):
                defined.add(f"{file}.{node.name}")
    assert len(defined) > 30 and defined <= set(NAMES), defined - set(NAMES)


@pytest.mark.parametrize("name", PATCHES)
def test_every_patch_is_switched_off_by_its_row(name):
    file, _, function = name.rpartition(".")
    text = ROOM.joinpath(*file.split(".")).with_suffix(".py").read_text()
    assert re.findall(rf'@patch\("(\w+)"\)\ndef {function}\(', text) == [PATCHES[name]]


def test_features_have_no_switch():
    features = set(itertools.chain(*hook_table.FEATURES.values()))
    assert not features & PATCHES.keys() and features | PATCHES.keys() == set(NAMES)


def test_the_config_comes_last():
    """If another hook cannot be registered, SlowFast does not know the node STTS either."""
    assert list(hook_table.HOOKS)[-1] == "slowfast.config.defaults"
