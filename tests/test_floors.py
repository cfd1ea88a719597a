"""The package has floors: imports only point down, and libraries stay in their modules."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "stts_slowfast"
FLOORS = [
    {
        "budgets",
        "call_context",
        "configfiles",
        "constants",
        "fx_tracing",
        "grid",
        "plugins",
        "projections",
        "saliency",
        "scorers",
        "shares",
        "token_scorers",
        "topk",
        "video",
        "windows",
    },
    {"config", "hosts"},
    {"backbones", "fused"},
    {"checkpoints", "frozen_gradients", "selector_state", "selectors", "token_selector"},
    {"block_hooks", "hooks"},
    {
        "adaptation",
        "annealing",
        "dense_features",
        "evaluation",
        "fidelity",
        "optimizer_groups",
        "schedule",
        "visualization",
    },
    {"integrations", "pyslowfast", "standalone"},
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


EVERY_FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@EVERY_FILE
def test_imports_point_down(path):
    for name in imported(path):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "stts_slowfast" or target not in FLOOR or target == room(path):
            continue
        assert FLOOR[target] <= FLOOR[room(path)], name
        assert {target, room(path)} != {"pyslowfast", "standalone"}, name


# Who may import what is not ours: the lowest floor that knows it.
GUESTS = {
    "slowfast": None,
    "pytorchvideo": None,
    "lightning_fabric": "standalone",
    "lightning": None,
    "pytorch_lightning": None,
    "transformers": "integrations",
    "timm": "standalone",
    "matplotlib": "visualization",
    "rich": "standalone",
}


@EVERY_FILE
def test_libraries_stay_in_their_rooms(path):
    for name in imported(path):
        package = name.partition(".")[0]
        if package in GUESTS and room(path) != "pyslowfast":
            assert GUESTS[package] is not None, name
            assert FLOOR[room(path)] >= FLOOR[GUESTS[package]], name


def strings(path):
    """Every string of a file that is no docstring."""
    tree = ast.parse(path.read_text())
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
        if isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


@EVERY_FILE
def test_only_the_guest_names_what_is_slowfasts(path):
    for text in strings(path):
        named = re.search(r"(?<![\w/])slowfast\.\w", text)
        assert not named or room(path) == "pyslowfast", text


@EVERY_FILE
def test_only_hooks_puts_hooks_on_blocks(path):
    # The others read: visualization scores, fidelity and evaluation a model's outputs, the oracle
    # a block's tokens; predictions find the layer with NaN.
    readers = ("evaluation", "fidelity", "hooks", "oracle", "predictions", "visualization")
    if path.stem not in readers:
        assert "register_forward" not in path.read_text()


@EVERY_FILE
def test_no_module_reads_what_a_selector_kept_last(path):
    """Where tokens come from travels with them; ``hooks.selections`` alone looks at the modules."""
    if room(path) in (
        "block_hooks",
        "hooks",
        "selectors",
        "selector_state",
        "token_selector",
        "visualization",
        "tools",
    ):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("kept", "_nan_flag", "_nan_flag_host"), ast.unparse(node)


@EVERY_FILE
def test_a_host_is_short(path):
    if room(path) == "hosts" and path.stem not in ("__init__", "host"):
        assert len(path.read_text().splitlines()) <= 160


@EVERY_FILE
def test_no_file_of_the_core_is_long(path):
    if path.parent == PACKAGE or room(path) == "hosts":
        assert len(path.read_text().splitlines()) <= 350
