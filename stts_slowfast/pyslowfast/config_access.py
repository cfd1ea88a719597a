"""Reads keys of this package from any config: SlowFast's, one older than this package, or no yacs.

Everything here may run at ``import torch``: standard library only.
"""

from collections.abc import Mapping

from stts_slowfast.configfiles.extra_keys import EXTRA_KEYS


def get_value(cfg, key: str, default):
    """The value of a key such as ``STTS.ENABLE``; ``default`` if the config has no such key, or a
    value of another type."""
    found = cfg
    for name in key.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, (type(default), int)) else default


def extra_key(cfg, key: str):
    """The value of a key of `EXTRA_KEYS`, or its default."""
    node, _, name = key.partition(".")
    return get_value(cfg, key, EXTRA_KEYS[node][name])


def has_extra_keys(tree: Mapping) -> bool:
    """Whether a nested mapping has a key of `EXTRA_KEYS`."""
    return any(
        isinstance(node := tree.get(name), Mapping) and not keys.keys().isdisjoint(node)
        for name, keys in EXTRA_KEYS.items()
    )


def is_enabled(cfg) -> bool:
    """Whether a config enables selection."""
    return bool(get_value(cfg, "STTS.ENABLE", False))
