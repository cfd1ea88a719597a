"""``stts convert``: checkpoints from any known format to another; the authors' YAML to ours."""

import argparse

import yaml
from iopath.common.file_io import g_pathmgr

from stts_slowfast.budgets import DIMENSIONS
from stts_slowfast.checkpoints import (
    atomic_write,
    convert,
    load_weights,
    read_checkpoint,
    state_dict_of,
)
from stts_slowfast.checkpoints.formats import targets
from stts_slowfast.checkpoints.io import check_output_path, safetensors_bytes, save, save_bytes
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.model import build_model
from stts_slowfast.tools.cli import add_force

# Blocks before which the paper selects: the authors' checkpoints do not name them.
_PAPER_BLOCKS = {"TIME": [0], "SPACE": [4]}

# The authors' MVIT keys: our key, and their default.
_RENAMED = {
    "SIGMA": ("SIGMA", 0.05),
    "TIME_PRUNING_LOC": ("TIME.BLOCKS", None),
    "TIME_LEFT_RATIO": ("TIME.KEEP", [0.5]),
    "TIME_SCORE": ("TIME.SCORER", "tpool"),
    "SPACE_PRUNING_LOC": ("SPACE.BLOCKS", None),
    "SPACE_LEFT_RATIO": ("SPACE.KEEP", [0.5105]),
    "SPACE_SCORE": ("SPACE.SCORER", "spatch"),
}
_SCORERS = {"tpool": "learned", "spatch": "learned"}
_THEIR_BACKBONE_LR = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("source", metavar="IN", help="a checkpoint; with --config, a YAML file")
    parser.add_argument("target", metavar="OUT", help="file to write; .safetensors for that format")
    add_force(parser)
    parser.add_argument("--config", action="store_true", help="convert the STTS authors' YAML file")
    parser.add_argument(
        "--to",
        choices=targets(),
        default="slowfast",
        help="format to write (default: slowfast, which both engines read)",
    )
    parser.add_argument(
        "--cfg",
        metavar="YAML",
        help="config of the model: names the blocks with selectors, and lists missing parameters",
    )


def main(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.config:
        convert_config_file(args.source, args.target, args.force)
    else:
        convert_checkpoint_file(args.source, args.target, args.to, args.cfg, args.force)
    return 0


def convert_checkpoint_file(
    source: str, target: str, to: str, cfg_path: str | None, overwrite: bool = False
) -> None:
    """Converts a checkpoint; prints its format, and missing and unused parameters.

    Raises:
        FileNotFoundError: if a file does not exist.
        FileExistsError: if OUT exists already.
        ValueError: if the format is unknown, or cannot be converted to ``to``.
    """
    check_output_path(target, overwrite, [source])
    checkpoint = read_checkpoint(source)
    cfg = load_config(cfg_path) if cfg_path else None
    blocks = _selected_blocks(checkpoint, cfg)
    selectors = [f"{key.lower()}_{block}" for key in blocks for block in blocks[key]]
    converted, known, left_over = convert(checkpoint, to, selectors)
    print(f"{source}: recognised as {known.name}, {len(state_dict_of(checkpoint))} parameters")
    for key in left_over:
        print(f"  not renamed: {key}: name its block in STTS.*.BLOCKS of a file given with --cfg")
    if cfg is not None:
        loaded = load_weights(build_model(cfg), converted, strict=False)
        for kind in ("missing", "unexpected", "mismatched"):
            for key in getattr(loaded, kind):
                print(f"  {kind}: {key}")
    dropped = [key for key in _RUN_STATE if key in checkpoint and key not in converted]
    if dropped:
        print(f"  dropped: {', '.join(dropped)}: a run cannot resume from {target}")
    atomic_write(target, lambda path: _write(converted, path, target), overwrite, [source])
    hint = (
        ""
        if cfg is not None
        else "; --cfg YAML lists parameters that a model lacks or does not use"
    )
    print(f"{target}: written in {to} form{hint}")


# Entries of a checkpoint from which a run resumes, or which document it.
_RUN_STATE = ("epoch", "optimizer_state", "scaler_state", "cfg", "stts")


def _write(converted: dict, path: str, target: str) -> None:
    if not target.endswith(".safetensors"):
        save(converted, path)
        return
    state = state_dict_of(converted)
    metadata = {k: v for k, v in converted.items() if isinstance(v, (str, int, float))}
    save_bytes(safetensors_bytes(state, metadata), path)


def _selected_blocks(checkpoint: dict, cfg) -> dict[str, list[int]]:
    """Blocks with selectors before them, by the given config, the stored one, or the paper."""
    if cfg is not None:
        return {dimension: list(cfg.STTS[dimension].BLOCKS) for dimension in DIMENSIONS}
    mvit = _stored_config(checkpoint).get("MVIT")
    mvit = mvit if isinstance(mvit, dict) else {}
    return {
        key: list(mvit.get(f"{key}_PRUNING_LOC") or _PAPER_BLOCKS[key]) for key in _PAPER_BLOCKS
    }


def _stored_config(checkpoint: dict) -> dict:
    """The config that a checkpoint stores as text; empty if it has none or is not YAML."""
    text = checkpoint.get("cfg")
    try:
        tree = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        tree = None
    return tree if isinstance(tree, dict) else {}


def convert_config_file(source: str, target: str, overwrite: bool = False) -> None:
    """Converts a YAML file of the authors' MViT fork; prints changes other than renamed keys.

    Raises:
        FileNotFoundError: if a file does not exist.
        FileExistsError: if OUT exists already.
        ValueError: if the file is not YAML, or lacks the fork's selection keys.
    """
    if not g_pathmgr.isfile(source):
        raise FileNotFoundError(f"config file {source} does not exist")
    with g_pathmgr.open(source) as f:
        try:
            tree = yaml.safe_load(f)
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{source} holds no KEY: VALUE lines")
    tree, notes = convert_config(tree)
    atomic_write(target, lambda path: _dump(tree, path), overwrite, [source])
    for note in notes:
        print(f"  {note}")
    print(f"{target}: written")


def convert_config(tree: dict) -> tuple[dict, list[str]]:
    """The authors' configuration as ours.

    Args:
        tree: their YAML file as nested dicts.

    Returns:
        Our tree, and a sentence for each change that is not a renamed key.

    Raises:
        ValueError: if there is no ``MVIT.TIME_PRUNING_LOC`` or ``MVIT.SPACE_PRUNING_LOC``.
    """
    tree = {k: dict(v) if isinstance(v, dict) else v for k, v in tree.items()}
    for node in ("MVIT", "SOLVER", "TRAIN"):
        if not isinstance(tree.get(node, {}), dict):
            raise ValueError(f"{node} is {tree[node]!r}: it must hold KEY: VALUE lines")
    mvit, notes = tree.get("MVIT", {}), []
    if not {"TIME_PRUNING_LOC", "SPACE_PRUNING_LOC"} & set(mvit):
        raise ValueError(
            "there is neither MVIT.TIME_PRUNING_LOC nor MVIT.SPACE_PRUNING_LOC: "
            "this is not a configuration of the STTS authors' MViT"
        )
    stts = {"ENABLE": True, "TIME": {}, "SPACE": {}}
    for key, (ours, default) in _RENAMED.items():
        node, _, leaf = ours.rpartition(".")
        value = mvit.pop(key, default)
        if leaf == "SCORER" and value not in list(_SCORERS):
            raise ValueError(f"MVIT.{key} is {value!r}: {', '.join(_SCORERS)} can be converted")
        value = _SCORERS[value] if leaf == "SCORER" else value
        (stts[node] if node else stts)[leaf] = [] if value is None else value
    stts["OPERATOR"], stts["SHRINK"] = "perturbed", 0.0
    stts["SIGMA_DECAY"] = "linear" if mvit.pop("DECAY_SIGMA", True) else "constant"
    tree["STTS"] = stts
    _convert_schedule(tree, notes)
    _drop_placeholders(tree, notes)
    return tree, notes


def _convert_schedule(tree: dict, notes: list[str]) -> None:
    """Converts warm-up epochs to frozen epochs: in their code the backbone is frozen in them."""
    solver, train = tree.setdefault("SOLVER", {}), tree.setdefault("TRAIN", {})
    stts = tree["STTS"]
    stts["BACKBONE_LR"] = solver.pop("BACKBONE_LR", _THEIR_BACKBONE_LR)
    if not train.pop("FINETUNE", True):
        notes.append(
            "TRAIN.FINETUNE was False: backbone and scorers learn at one rate, from epoch 0"
        )
        stts["BACKBONE_LR"] = 1.0
        stts["FREEZE_BACKBONE_EPOCHS"] = 0.0
        solver["WARMUP_EPOCHS"] = 0.0
        return
    warmup = solver.get("WARMUP_EPOCHS", 0.0)
    if not isinstance(warmup, (int, float)):
        raise ValueError(f"SOLVER.WARMUP_EPOCHS is {warmup!r}: give a number of epochs")
    stts["FREEZE_BACKBONE_EPOCHS"] = float(warmup)
    solver["WARMUP_EPOCHS"] = 0.0
    train["CHECKPOINT_EPOCH_RESET"] = True
    notes.append(
        "SOLVER.WARMUP_EPOCHS became STTS.FREEZE_BACKBONE_EPOCHS: in their code nothing warms up"
    )
    notes.append("TRAIN.FINETUNE became TRAIN.CHECKPOINT_EPOCH_RESET")


def _drop_placeholders(tree: dict, notes: list[str]) -> None:
    for node in tree.values():
        for key in list(node) if isinstance(node, dict) else ():
            if isinstance(node[key], str) and node[key].startswith("path_to_"):
                notes.append(f"{key} was the placeholder {node[key]!r} and is left out")
                del node[key]


class _Dumper(yaml.SafeDumper):
    """One line per key, also for lists."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)


def _dump(tree: dict, path: str) -> None:
    with open(path, "w") as f:
        yaml.dump(tree, f, Dumper=_Dumper, default_flow_style=False, sort_keys=False, width=1000)
