"""The config of a run: SlowFast's keys and ours, read from YAML files and a command line.

Every config of SlowFast is valid here: keys that nothing reads are accepted, and what only SlowFast
can do raises an error that names the key.
"""

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import yaml
from fvcore.common.config import CfgNode

from stts_slowfast.backbones import add_configs, resolve_config
from stts_slowfast.config import add_stts_config
from stts_slowfast.configfiles.extra_keys import EXTRA_KEYS, EXTRA_RANGES
from stts_slowfast.configfiles.files import find_config, read_yaml
from stts_slowfast.configfiles.values import all_keys, coerce_tree, unflatten
from stts_slowfast.standalone.value_ranges import check_machines, check_patches, check_ranges

logger = logging.getLogger(__name__)

# The keys, the nodes whose further keys are ignored, what is refused, what may be None, what
# nothing reads, and the ranges of the rest.
_KEYS, _IGNORED_NODES, _ONLY_IN_SLOWFAST, _OPTIONAL, _NOT_READ, _RANGES = yaml.safe_load_all(
    Path(__file__).with_name("slowfast_defaults.yaml").read_text()
)
_C = CfgNode({**{name: {} for name in _IGNORED_NODES}, **_KEYS})
for _name in _IGNORED_NODES:
    _C[_name].set_new_allowed(True)
for _name in EXTRA_KEYS:
    _C[_name].update(EXTRA_KEYS[_name])
_RANGES.update(EXTRA_RANGES)
add_stts_config(_C)
add_configs(_C)


def get_cfg() -> CfgNode:
    """A copy of the defaults: SlowFast's keys, the node STTS, and those of all families."""
    add_configs(_C)  # again: a family may have been registered since
    return _C.clone()


def load_config(path: str, opts: Sequence = ()) -> CfgNode:
    """Reads a YAML file as SlowFast does, ``_BASE_`` files included.

    Args:
        path: the file, opened through iopath; or the name of a config in the package, such as
            ``STTS_MVIT_B_16x4_T0_0.9_S4_0.9``.
        opts: ``KEY VALUE`` pairs that override the file, such as ``("SOLVER.BASE_LR", 0.01)``; a
            value may be a string as on a command line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key, a value of the wrong type or out of its range, and what
            only SlowFast can do; it names the key.
    """
    path = find_config(path)
    if len(opts) % 2:
        raise ValueError(
            f"--opts takes pairs of KEY and VALUE, but {len(opts)} words were given; "
            f"the last is {opts[-1]!r}"
        )
    cfg, given = get_cfg(), set()
    pairs = [(unflatten(str(key), value), "") for key, value in zip(opts[0::2], opts[1::2])]
    for tree, where in [(read_yaml(path), f" in {path}"), *pairs]:
        values = coerce_tree(tree, _C, where, _OPTIONAL)
        cfg.merge_from_other_cfg(values)
        given.update(all_keys(values))
    check_values(cfg)
    resolve_config(cfg, given)
    check_values(cfg)
    _warn_of_unread_keys(cfg, given)
    return cfg


def check_values(cfg: CfgNode) -> None:
    """Raises ``ValueError`` for a key whose value is out of its range, contradicts another key, or
    asks for what only SlowFast can do."""
    check_ranges(cfg, _RANGES)
    check_machines(cfg)
    check_patches(cfg)
    for key, what in _ONLY_IN_SLOWFAST.items():
        value, default = (functools.reduce(dict.get, key.split("."), node) for node in (cfg, _C))
        if value != default:
            raise ValueError(
                f"{key} is {value!r}: {what} is only in SlowFast itself; keep it at {default!r}, "
                "or run with --engine slowfast"
            )


def _warn_of_unread_keys(cfg: CfgNode, given: set[str]) -> None:
    for key, why in _NOT_READ.items():
        value, default = (functools.reduce(dict.get, key.split("."), node) for node in (cfg, _C))
        if key in given and value != default:
            logger.warning("%s is %r, which nothing reads: %s", key, value, why)
