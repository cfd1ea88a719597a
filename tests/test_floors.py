"""The house has floors: imports only point down, and each room keeps to its own business."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stts_slowfast"
FLOORS = [
    # A node's check names the scorers that there are.
    {"config", "extras", "grid", "keys", "scorers", "topk", "video"},
    {"selectors"},
    {"backbones", "hosts"},
    {"hooks", "schedule", "fused", "checkpoints"},
    {"pyslowfast", "standalone"},
    {"tools"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or not path.stem.startswith("__")
]


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path):
    """Every dotted name that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "stts_slowfast" or target not in FLOOR or target == room(path):
            continue
        assert FLOOR[target] <= FLOOR[room(path)], name
        assert {target, room(path)} != {"pyslowfast", "standalone"}, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_hosts_stay_in_their_rooms(path):
    for name in imported(path):
        package = name.partition(".")[0]
        assert package != "slowfast" or room(path) == "pyslowfast", name
        if package in ("lightning", "pytorch_lightning"):
            assert FLOOR[room(path)] >= FLOOR["standalone"], name
    if room(path) not in ("hooks", "tools"):
        assert "register_forward" not in path.read_text(), "only hooks.py knows forward hooks"
