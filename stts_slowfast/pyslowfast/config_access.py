"""What a config asks of this package: it may be SlowFast's, older than this package, or no yacs."""

from collections.abc import Mapping

# Keys of ours in nodes of SlowFast's, as the standalone runner's slowfast_defaults.yaml has them.
OUR_KEYS = {
    "DATA": {"READ_TIMEOUT": 120.0},
    "TEST": {"ALLOW_MISSING": False},
    "TRAIN": {"MIXED_PRECISION_DTYPE": ""},
}


def value(cfg, key: str, default):
    """The value of a key such as ``STTS.ENABLE``; ``default`` if a config, of whatever kind, has no
    such key, or something of another type there."""
    found = cfg
    for name in key.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, (type(default), int)) else default


def ours(cfg, key: str):
    """The value of a key of `OUR_KEYS`, or its default."""
    node, _, name = key.partition(".")
    return value(cfg, key, OUR_KEYS[node][name])


def names_ours(tree) -> bool:
    """Whether what is read from a file or given as a node has a key of `OUR_KEYS`."""
    return any(
        isinstance(node := tree.get(name), Mapping) and not keys.keys().isdisjoint(node)
        for name, keys in OUR_KEYS.items()
    )


def is_enabled(cfg) -> bool:
    """Whether a config asks for selection; one made before the node was there does not."""
    return bool(value(cfg, "STTS.ENABLE", False))
