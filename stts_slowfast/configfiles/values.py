"""Values and names of config keys: parsed leniently, with helpful errors."""

import contextlib
import difflib
from ast import literal_eval
from collections.abc import Iterable, Mapping

from fvcore.common.config import CfgNode

_TYPE_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    tuple: "a list",
}


def coerce_tree(
    tree: Mapping, known: CfgNode, location: str = "", optional: Mapping | None = None
) -> CfgNode:
    """Nested values from a file or a command line, each as its key's type: ready for yacs to merge.

    Args:
        tree: the values. A key that ``known`` does not have is skipped in a node that allows new
            ones, and an error in others.
        known: all keys with their defaults.
        location: source of the values, for messages: ``" in run.yaml"``.
        optional: keys that may be None, with an example of their other values.

    Raises:
        ValueError: for an unknown key, with the nearest, and a value of another type.
    """

    def read(key: str, value, default):
        if not isinstance(default, CfgNode):
            example = (optional or {}).get(key)
            value = read_value(key, value, default, location, example and type(example))
            return repr(value) if isinstance(value, str) else value  # yacs evaluates texts
        if value is None:
            value = {}  # a node without keys
        if not isinstance(value, Mapping):
            names = ", ".join(f"{key}.{name}" for name in default)
            raise ValueError(f"{key}{location} is a group of keys: give one of {names}")
        found = CfgNode()
        for name, part in value.items():
            inner = f"{key}.{name}" if key else name
            if name in default:
                found[name] = read(inner, part, default[name])
            elif not default.is_new_allowed():
                wrong = next(all_keys({inner: part}), inner)
                raise ValueError(
                    f"unknown config key {wrong}{location}; {suggest_key(wrong, all_keys(known))}"
                )
        return found

    return read("", tree, known)


def unflatten(key: str, value) -> dict:
    """``{"A": {"B": value}}`` for the key ``A.B``."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def read_value(key: str, value, default, location: str = "", optional: type | None = None):
    """Parses a value as the key's type: text as Python literals, whole numbers as floats.

    Args:
        key: full name, for messages.
        value: from a file, or a word of a command line.
        default: the key's default.
        location: source of the value, for messages: ``" in run.yaml"``.
        optional: for a key that may be None, the type of its other values.

    Raises:
        ValueError: for a value of another type, with the default as an example.
    """
    wanted = optional or type(default)
    given = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = literal_eval(value)
        if wanted is str and not isinstance(value, str):
            value = given
    if value is None and optional:
        return None
    if value is None and wanted is str:
        return ""  # a key that was left empty in a file
    if wanted is float and type(value) is int:
        with contextlib.suppress(OverflowError):  # more digits than a number has
            value = float(value)
    if wanted in (list, tuple) and isinstance(value, (list, tuple)):
        value = wanted(value)
    if type(value) is not wanted:
        also = " or None" if optional else ""
        raise ValueError(
            f"{key}{location} is {given!r}: it takes {_TYPE_NAMES[wanted]}{also}, "
            f"such as {default!r}"
        )
    return value


def check_choice(key: str, value, known: Iterable[str]) -> None:
    """Raises ``ValueError`` naming ``key`` if its value is not one of the known ones."""
    if value not in known:
        names = ", ".join(str(each) or "''" for each in known)
        raise ValueError(f"{key} is {value!r}: use one of {names}")


def suggest_key(key: str, known: Iterable[str]) -> str:
    """Names the known key most similar to ``key``, preferably in the same node."""
    known = list(known)
    node, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == node}
    if near := difflib.get_close_matches(leaf, siblings, 1):
        return f"did you mean {siblings[near[0]]}?"
    same_name = [k for k in known if k.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key, same_name or known, 1, cutoff=0.0)
    return f"the nearest known key is {near[0]}"


def flatten(node: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    """Full name and value of every key in a config node, or in nested dicts, in its order."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def all_keys(node: Mapping) -> Iterable[str]:
    """Full names of all keys in a config node, in its order."""
    return (key for key, _ in flatten(node))
