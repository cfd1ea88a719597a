"""SlowFast's config, whose nodes of ours are read, and refused, as the standalone runner does."""

import copy
from collections.abc import Mapping
from types import SimpleNamespace

from fvcore.common.config import CfgNode

from stts_slowfast.configfiles.files import read_yaml
from stts_slowfast.configfiles.values import coerce_tree, unflatten
from stts_slowfast.pyslowfast import autoload, plugin
from stts_slowfast.pyslowfast.config_access import OUR_KEYS, names_ours


class Config(CfgNode):
    """A config into which the nodes that this package adds are merged leniently, told helpfully.

    yacs refuses a whole number where the default has a point, and a wrong key without the right
    one. The keys of SlowFast's own nodes are merged as ever.
    """

    # yacs compares the classes of nodes, and those below are plain.
    _decode_cfg_value = CfgNode._decode_cfg_value

    def __deepcopy__(self, memo) -> "Config":
        memo[id(self)] = copied = Config()
        dict.update(copied, {name: copy.deepcopy(value, memo) for name, value in self.items()})
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self):
        """A config in a file, or on its way to another process, is of SlowFast's own class."""
        return CfgNode, (), vars(self), None, iter(self.items())

    def __repr__(self) -> str:
        return CfgNode.__repr__(self).replace(type(self).__name__, "CfgNode", 1)

    def merge_from_file(self, cfg_filename, *args, **kwargs) -> None:
        """What has no key of ours in it is read as ever, whatever is wrong with it."""
        tree = self.load_yaml_with_base(cfg_filename, *args, **kwargs)
        if self._is_for_us(tree):
            tree = read_yaml(cfg_filename, *args, **kwargs)
            self._merge(tree, f" in {cfg_filename}")
        else:
            super().merge_from_other_cfg(CfgNode(tree))

    def merge_from_other_cfg(self, cfg_other) -> None:
        if self._is_for_us(cfg_other):
            self._merge(cfg_other, "")
        else:
            super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list) -> None:
        ours, theirs = self._ours(), []
        for place in range(0, len(cfg_list), 2):
            pair = cfg_list[place : place + 2]
            node, _, name = str(pair[0]).partition(".")
            if len(pair) == 2 and (node in ours or name in OUR_KEYS.get(node, ())):
                self._merge(unflatten(*pair), "")
            else:
                theirs += pair
        super().merge_from_list(theirs)

    def _ours(self) -> CfgNode:
        """The nodes that this package adds, but those whose name is a node of a fork's own here."""
        ours = our_nodes()
        kept = {n: node for n, node in ours.items() if self.get(n, node).keys() == node.keys()}
        return CfgNode(kept)

    def _is_for_us(self, tree) -> bool:
        if not isinstance(tree, Mapping):
            return False
        return names_ours(tree) or not self._ours().keys().isdisjoint(tree)

    def _merge(self, tree, where: str) -> None:
        ours = self._ours()
        read = coerce_tree({name: tree[name] for name in ours if name in tree}, ours, where)
        if lacking := [name for name in read if name not in self]:
            raise RuntimeError(
                f"{lacking[0]} is given{where}, but stts_slowfast has not taken hold of SlowFast's "
                f"config: {'; '.join(autoload.failed_hooks())}. `stts doctor` tells more"
            )
        for node, keys in OUR_KEYS.items():
            if isinstance(theirs := tree.get(node), Mapping):
                own = {node: {name: theirs[name] for name in keys if name in theirs}}
                read[node] = CfgNode({**theirs, **coerce_tree(own, CfgNode(OUR_KEYS), where)[node]})
        super().merge_from_other_cfg(CfgNode({**tree, **read}))


def read_our_nodes(defaults) -> None:
    """Makes ``slowfast.config.defaults._C``, and with it all its copies, a :class:`Config`."""
    if type(defaults._C) is not Config:
        # The object stays what everybody holds; past yacs, which would make it a key.
        object.__setattr__(defaults._C, "__class__", Config)


def add_our_keys(defaults) -> None:
    """Adds what the standalone runner has in nodes of SlowFast's."""
    for node, keys in OUR_KEYS.items():
        for name, default in keys.items():
            if node in defaults._C:
                defaults._C[node].setdefault(name, default)


def our_nodes() -> CfgNode:
    """The nodes that this package adds to SlowFast's, with their defaults."""
    blank = SimpleNamespace(_C=CfgNode())
    plugin.add_config(blank)
    return blank._C
