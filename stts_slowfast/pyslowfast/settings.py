"""SlowFast's config, whose nodes of ours are read, and refused, as the standalone runner does."""

from types import SimpleNamespace

from fvcore.common.config import CfgNode

from stts_slowfast.keys import all_keys, nearest, read_value
from stts_slowfast.pyslowfast import plugin
from stts_slowfast.yamlfiles import check_file


class Config(CfgNode):
    """A config into which the nodes that this package adds are merged leniently, told helpfully.

    yacs refuses a whole number where the default has a point, and a wrong key without the right
    one. The keys of SlowFast's own nodes are merged as ever.
    """

    # yacs compares the classes of nodes, and those below are plain.
    _decode_cfg_value = CfgNode._decode_cfg_value

    def merge_from_file(self, cfg_filename, *args, **kwargs) -> None:
        check_file(cfg_filename)
        tree = self.load_yaml_with_base(cfg_filename, *args, **kwargs)
        self._merge(tree, f" in {cfg_filename}")

    def merge_from_other_cfg(self, cfg_other) -> None:
        self._merge(cfg_other, "")

    def merge_from_list(self, cfg_list) -> None:
        words = list(cfg_list)
        ours = our_nodes()
        for place, key in enumerate(words[0::2]):
            if str(key).split(".")[0] in ours and len(words) > 2 * place + 1:
                words[2 * place + 1] = _read(str(key), words[2 * place + 1], ours, "")
        super().merge_from_list(words)

    def _merge(self, tree, where: str) -> None:
        ours = our_nodes()
        tree = dict(tree or {})
        for name in [name for name in tree if name in ours]:
            tree[name] = _read_node(name, tree[name], ours, where)
        super().merge_from_other_cfg(CfgNode(tree))


def read_our_nodes(defaults) -> None:
    """Makes ``slowfast.config.defaults._C``, and with it all its copies, a :class:`Config`."""
    if type(defaults._C) is not Config:
        # The object stays what everybody holds; past yacs, which would make it a key.
        object.__setattr__(defaults._C, "__class__", Config)


def our_nodes() -> CfgNode:
    """The nodes that this package adds to SlowFast's, with their defaults."""
    blank = SimpleNamespace(_C=CfgNode())
    plugin.add_config(blank)
    return blank._C


def _read_node(key: str, node, ours: CfgNode, where: str) -> CfgNode:
    if node is None:
        node = {}  # a node without keys says nothing
    if not isinstance(node, dict):
        raise ValueError(_group(key, ours, where))
    return CfgNode(
        {
            name: _read_node(f"{key}.{name}", value, ours, where)
            if isinstance(_default(f"{key}.{name}", ours), CfgNode)
            else _read(f"{key}.{name}", value, ours, where)
            for name, value in node.items()
        }
    )


def _read(key: str, value, ours: CfgNode, where: str):
    default = _default(key, ours)
    if default is None:
        raise ValueError(f"unknown config key {key}{where}; {nearest(key, all_keys(ours))}")
    if isinstance(default, CfgNode):
        raise ValueError(_group(key, ours, where))
    return read_value(key, value, default, where)


def _group(key: str, ours: CfgNode, where: str) -> str:
    names = ", ".join(f"{key}.{name}" for name in _default(key, ours))
    return f"{key}{where} is a group of keys: give one of {names}"


def _default(key: str, ours: CfgNode):
    node = ours
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node
