"""Config files: found by path or by the name of a packaged one, and read with their bases."""

import difflib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import yaml
from fvcore.common.config import BASE_KEY, CfgNode
from iopath.common.file_io import g_pathmgr

logger = logging.getLogger(__name__)

# Nodes in which no key may be given twice.
OURS = ("STTS.",)

# A link to configs/ in the repository, its files in a wheel.
CONFIGS = Path(__file__).parents[1] / "configs"


def find_config(name: str | os.PathLike) -> str:
    """The path of a config file, which may be one of this package.

    Args:
        name: a path that iopath opens; or a name such as ``STTS_MVIT_B_16x4_T0_0.9_S4_0.9``
            (Kinetics), ``SSv2/STTS_MVIT_B_16x4_T0_0.9_S4_0.9``, with ``.yaml`` or without.

    Raises:
        FileNotFoundError: if there is neither, naming the nearest.
    """
    name = os.fspath(name)
    if g_pathmgr.exists(name) or "://" in name:
        return name
    stem = name.removeprefix("configs/").removesuffix(".yaml")
    for folder in ("", "Kinetics", "SSv2"):
        path = CONFIGS / folder / f"{stem}.yaml"
        if path.is_file():
            return str(path)
    if os.sep in stem and not stem.startswith(("Kinetics/", "SSv2/")):
        raise FileNotFoundError(f"config file {name} does not exist")
    known = [str(p.relative_to(CONFIGS).with_suffix("")) for p in sorted(CONFIGS.glob("*/*.yaml"))]
    near = difflib.get_close_matches(f"Kinetics/{stem}", known, 1, cutoff=0.7)
    raise FileNotFoundError(
        f"config file {name} does not exist, and stts-slowfast has none of that name"
        + (f"; did you mean {near[0].removeprefix('Kinetics/')}?" if near else "")
    )


def read_yaml(path: str | os.PathLike, allow_unsafe: bool = False) -> dict:
    """A config file as nested dicts, merged into the files of its ``_BASE_``.

    Args:
        path: a file that iopath opens.
        allow_unsafe: allow tags that run code, as fvcore's reader.

    Raises:
        FileNotFoundError: if the file, or one of its bases, does not exist.
        ValueError: if it is not YAML, or if :func:`check_file` refuses it.
    """
    path = os.fspath(path)
    try:
        check_file(path)
        return CfgNode.load_yaml_with_base(path, allow_unsafe)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config file {error.filename or path} does not exist"
            + (f" (asked for by {path})" if error.filename not in (None, path) else "")
        ) from error
    except IsADirectoryError as error:
        raise FileNotFoundError(f"config file {path} is a folder") from error
    except TypeError as error:
        raise ValueError(f"config file {path} is empty, or its base file is") from error
    except (yaml.YAMLError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"config file {path} is not YAML that can be read: {reason}") from error


def check_file(path: str, above: tuple[str, ...] = ()) -> None:
    """Checks what the YAML reader ignores: keys given twice, and circular bases.

    A node given twice is refused, since the first would be lost as a whole, and so is a key of
    ours. SlowFast's own files have single keys twice, of which the last counts: that is logged.

    Args:
        path: a file that iopath opens.
        above: the files whose base it is, outermost first.

    Raises:
        ValueError: naming the key and both lines, or the circle.
    """
    real = path if "://" in path else os.path.realpath(path)
    if real in above:
        raise ValueError(
            f"{BASE_KEY} leads in a circle: {' -> '.join([*above[above.index(real) :], real])}; "
            "a config file cannot be its own base"
        )
    with g_pathmgr.open(path) as f:
        try:
            root = yaml.compose(f, Loader=yaml.SafeLoader)
        except (UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"config file {path} is not YAML that can be read: {error}") from error
    if root is None:
        raise ValueError(f"config file {path} is empty")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"config file {path} is not a mapping: write lines such as 'STTS:'")
    _check_duplicates(root, path)
    for base in _bases(root):
        base = os.path.expanduser(base)
        if not base.startswith("/") and "://" not in base:
            base = os.path.join(os.path.dirname(path), base)
        check_file(base, (*above, real))


def _check_duplicates(root: yaml.Node, path: str) -> None:
    done = set()  # a node with several aliases is checked once

    def check(node: yaml.Node, prefix: str, above: tuple[yaml.Node, ...]) -> None:
        if node in above:
            line = node.start_mark.line + 1
            raise ValueError(f"config file {path}: the value in line {line} contains itself")
        if node in done:
            return
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            for part in node.value:
                check(part, prefix, above)
        if isinstance(node, yaml.MappingNode):
            _check_keys(node, path, prefix)
            for key, value in node.value:
                check(value, f"{prefix}{key.value}.", above)
        done.add(node)

    check(root, "", ())


def _check_keys(node: yaml.MappingNode, path: str, prefix: str) -> None:
    first: dict[str, tuple[int, yaml.Node]] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in first:
            line_before, before = first[name]
            text = f"{name} is given twice in {path}, in lines {line_before} and {line}"
            groups = any(isinstance(each, yaml.MappingNode) for each in (before, value))
            if groups or name.startswith(OURS):
                raise ValueError(f"{text}: only the last would count; leave one")
            if yaml.serialize(before) != yaml.serialize(value):
                logger.warning("%s: the last counts", text)
        first[name] = (line, value)


def _bases(root: yaml.MappingNode) -> Iterator[str]:
    for key, value in root.value:
        if key.value == BASE_KEY:
            parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
            yield from (part.value for part in parts if isinstance(part, yaml.ScalarNode))
