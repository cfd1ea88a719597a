"""SlowFast's config, with the nodes of this package read as by the standalone runner."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace

from fvcore.common.config import CfgNode

from stts_slowfast.configfiles.files import read_yaml
from stts_slowfast.configfiles.values import coerce_tree, unflatten
from stts_slowfast.pyslowfast import autoload, plugin
from stts_slowfast.pyslowfast.config_access import EXTRA_KEYS, has_extra_keys


class Config(CfgNode):
    """A config that converts values of this package's keys, and suggests a key for a wrong one.

    yacs refuses a whole number for a float, and suggests nothing. It still merges SlowFast's keys.
    """

    # yacs compares the classes of nodes, and the nodes of this config are plain CfgNodes.
    _decode_cfg_value = CfgNode._decode_cfg_value

    def __deepcopy__(self, memo) -> "Config":
        memo[id(self)] = copied = Config()
        dict.update(copied, {name: copy.deepcopy(value, memo) for name, value in self.items()})
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self):
        """Pickled configs are of SlowFast's class, so that they load without this package."""
        return CfgNode, (), vars(self), None, iter(self.items())

    def __repr__(self) -> str:
        return CfgNode.__repr__(self).replace(type(self).__name__, "CfgNode", 1)

    def merge_from_file(self, cfg_filename, *args, **kwargs) -> None:
        tree = self.load_yaml_with_base(cfg_filename, *args, **kwargs)
        if self._has_our_keys(tree):
            tree = read_yaml(cfg_filename, *args, **kwargs)
            self._merge(tree, f" in {cfg_filename}")
        else:
            super().merge_from_other_cfg(CfgNode(tree))

    def merge_from_other_cfg(self, cfg_other) -> None:
        if self._has_our_keys(cfg_other):
            self._merge(cfg_other, "")
        else:
            super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list) -> None:
        nodes, others = self._our_nodes(), []
        for start in range(0, len(cfg_list), 2):
            pair = cfg_list[start : start + 2]
            node, _, name = str(pair[0]).partition(".")
            if len(pair) == 2 and (node in nodes or name in EXTRA_KEYS.get(node, ())):
                self._merge(unflatten(*pair), "")
            else:
                others += pair
        super().merge_from_list(others)

    def _our_nodes(self) -> CfgNode:
        """The nodes that this package adds, without those whose name a fork uses for another."""
        nodes = added_nodes()
        same = {n: node for n, node in nodes.items() if self.get(n, node).keys() == node.keys()}
        return CfgNode(same)

    def _has_our_keys(self, tree) -> bool:
        if not isinstance(tree, Mapping):
            return False
        return has_extra_keys(tree) or not self._our_nodes().keys().isdisjoint(tree)

    def _merge(self, tree, source: str) -> None:
        nodes = self._our_nodes()
        read = coerce_tree({name: tree[name] for name in nodes if name in tree}, nodes, source)
        if missing := [name for name in read if name not in self]:
            raise RuntimeError(
                f"{missing[0]} is set{source}, but stts_slowfast could not patch SlowFast's "
                f"config: {'; '.join(autoload.failed_hooks())}. `stts doctor` shows details"
            )
        for node, keys in EXTRA_KEYS.items():
            if isinstance(values := tree.get(node), Mapping):
                extra = {node: {name: values[name] for name in keys if name in values}}
                extra = coerce_tree(extra, CfgNode(EXTRA_KEYS), source)
                read[node] = CfgNode({**values, **extra[node]})
        super().merge_from_other_cfg(CfgNode({**tree, **read}))


def install_config_class(defaults) -> None:
    """Makes ``slowfast.config.defaults._C``, and so all its copies, a :class:`Config`."""
    if type(defaults._C) is not Config:
        # In place, for all who hold the object; CfgNode.__setattr__ would make it a key.
        object.__setattr__(defaults._C, "__class__", Config)


def add_extra_keys(defaults) -> None:
    """Adds `EXTRA_KEYS` to SlowFast's nodes."""
    for node, keys in EXTRA_KEYS.items():
        for name, default in keys.items():
            if node in defaults._C:
                defaults._C[node].setdefault(name, default)


def added_nodes() -> CfgNode:
    """The nodes that this package adds to SlowFast's config, with their defaults."""
    empty = SimpleNamespace(_C=CfgNode())
    plugin.add_config(empty)
    return empty._C
