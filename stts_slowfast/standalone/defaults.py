"""The config of a run: SlowFast's keys and ours, read from YAML files and a command line.

A file for SlowFast is a file for us: keys that nothing here reads are known all the same, and what
only SlowFast can do is refused by name instead of being ignored.
"""

from collections.abc import Iterable, Iterator, Sequence

from fvcore.common.config import CfgNode

from stts_slowfast.backbones import add_configs, settle
from stts_slowfast.config import add_stts_config
from stts_slowfast.keys import all_keys, nearest, read_value
from stts_slowfast.standalone.slowfast_keys import KEYS, NOT_READ, ONLY_IN_SLOWFAST, OPTIONAL
from stts_slowfast.yamlfiles import find_config, read_yaml

_C = KEYS.clone()
add_stts_config(_C)
add_configs(_C)


def get_cfg() -> CfgNode:
    """A copy of the defaults: SlowFast's keys, the node STTS, and those of all families."""
    add_configs(_C)  # again: a family may have been registered since
    return _C.clone()


def load_config(path: str, opts: Sequence = ()) -> CfgNode:
    """Reads a YAML file as SlowFast does, ``_BASE_`` files included.

    Args:
        path: the file, opened through iopath; or the name of a config that comes along, such as
            ``STTS_MVIT_B_16x4_T0_0.9_S4_0.9``.
        opts: ``KEY VALUE`` pairs that come on top, such as ``("SOLVER.BASE_LR", 0.01)``; a value
            may be text as on a command line.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for an unknown key, a value of the wrong type, and what only SlowFast can do;
            it names the key.
    """
    path = find_config(path)
    cfg = get_cfg()
    values = dict(_leaves(read_yaml(path)))
    for key, value in values.items():
        _set(cfg, key, value, f" in {path}")
    if len(opts) % 2:
        raise ValueError(
            f"--opts takes pairs of KEY and VALUE, but {len(opts)} words were given; "
            f"the last is {opts[-1]!r}"
        )
    for key, value in zip(opts[0::2], opts[1::2]):
        _set(cfg, str(key), value, "")
    check_supported(cfg)
    settle(cfg, {*values, *map(str, opts[0::2])})
    return cfg


def check_supported(cfg: CfgNode) -> None:
    """Raises ``ValueError`` for a key whose value asks for what only SlowFast can do."""
    for key, what in ONLY_IN_SLOWFAST.items():
        value, default = _get(cfg, key), _get(_C, key)
        if value != default:
            raise ValueError(
                f"{key} is {value!r}: {what} is only in SlowFast itself; leave it at {default!r}, "
                "or run with --engine slowfast"
            )


def check_choice(key: str, value: str, known: Iterable[str]) -> None:
    """Raises ``ValueError`` naming ``key`` where its value is none of the known ones."""
    if value not in known:
        raise ValueError(f"{key} is {value!r}: use one of {', '.join(known)}")


def _leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """``(full key, value)`` of everything in nested mappings."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        elif value is not None or not isinstance(_get(_C, key), CfgNode):
            yield key, value  # a node without keys says nothing


def _set(cfg: CfgNode, key: str, value, where: str) -> None:
    known = _get(cfg, key)
    if known is _MISSING:
        if key.split(".")[0] in NOT_READ:
            return
        raise ValueError(f"unknown config key {key}{where}; {nearest(key, all_keys(_C))}")
    if isinstance(known, CfgNode):
        raise ValueError(f"{key}{where} is a group of keys: give one of {_names(known, key)}")
    node, _, leaf = key.rpartition(".")
    value = read_value(key, value, _get(_C, key), where, OPTIONAL.get(key))
    (_get(cfg, node) if node else cfg)[leaf] = value


_MISSING = object()


def _get(cfg: CfgNode, key: str):
    for name in key.split("."):
        if not isinstance(cfg, CfgNode) or name not in cfg:
            return _MISSING
        cfg = cfg[name]
    return cfg


def _names(node: CfgNode, prefix: str) -> str:
    return ", ".join(f"{prefix}.{name}" for name in node)
