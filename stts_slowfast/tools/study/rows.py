"""The rows of a study: a budget and a scorer each, their configs, and their models."""

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

from iopath.common.file_io import g_pathmgr
from torch import nn

from stts_slowfast import backbones, build_model, load_weights
from stts_slowfast.checkpoints import pretrained_state, read_checkpoint, validate_checkpoint
from stts_slowfast.config import validate_stts

SHARES = (0.75, 0.5, 0.25)
NAMES = ("time", "space", "tokens")


@dataclass(frozen=True)
class StudyRow:
    """A budget and a scorer.

    Attributes:
        time, space, tokens: shares of frames, of a frame's tokens as a window, and of single tokens
            after all selectors; None without selection in that dimension.
        scorer: of all dimensions; "all" keeps all tokens, "oracle" is ``oracle.Oracle``.
        trained: whether the checkpoint is fine-tuned by the recipe first.
        seed: of training, and of random scores in testing.
    """

    time: float | None
    space: float | None
    scorer: str
    trained: bool = False
    seed: int = 0
    tokens: float | None = None

    @property
    def dimension(self) -> str:
        selected = [name for name in NAMES if getattr(self, name) is not None]
        return "both" if selected == ["time", "space"] else "+".join(selected) or "none"

    @property
    def name(self) -> str:
        shares = (f"{d}{getattr(self, d):g}-" for d in NAMES if getattr(self, d))
        trained = "-trained" if self.trained else ""
        return f"{''.join(shares)}{self.scorer}{trained}-seed{self.seed}"


def plan_rows(cfg, args: argparse.Namespace) -> list[StudyRow]:
    """The rows that the arguments ask for, each validated against the model.

    Raises:
        ValueError: naming the budget or scorer that is impossible.
    """
    if args.seeds < 1:
        raise ValueError(f"--seeds is {args.seeds}: give 1 at least")
    rows = [StudyRow(None, None, "all")]
    for budget in plan_budgets(cfg, args):
        rows += [StudyRow(**budget, scorer=scorer) for scorer in args.scorers]
    grids = backbones.block_grids(cfg)
    for row in rows[1:]:
        validate_stts(row_config(cfg, row).STTS, len(grids), grids)
    if args.train:
        rows += [replace(row, trained=True) for row in rows]
    return [seeded for row in rows for seeded in expand_seeds(row, args.seeds)]


def plan_budgets(cfg, args: argparse.Namespace) -> list[dict[str, float | None]]:
    """The shares of ``time``, ``space`` and ``tokens`` of each budget.

    Options that were not given have the shares ``SHARES`` of what the config has blocks for. An
    option without a share has no rows, and without frames there are none of both.
    """
    blocks = [name for name in NAMES if cfg.STTS[name.upper()].BLOCKS]
    none: dict[str, float | None] = {"time": None, "space": None}
    budgets = []
    for name in NAMES:
        default = SHARES if name in blocks else ()
        given = getattr(args, name)
        budgets += [{**none, name: share} for share in (default if given is None else given)]
    # Frames and windows or, without blocks for windows, frames and single tokens.
    second = "tokens" if "space" not in blocks and "tokens" in blocks else "space"
    both = {"time", second} <= {*blocks} and args.time != []  # `--time` alone: no such rows
    default = [f"{share}x{share}" for share in SHARES] if both else []
    for text in default if args.both is None else args.both:
        try:
            time, share = map(float, text.split("x"))
        except ValueError:
            raise ValueError(f"--both {text}: give shares such as 0.5x0.25") from None
        budgets.append({**none, "time": time, second: share})
    return budgets


def expand_seeds(row: StudyRow, seeds: int) -> Iterable[StudyRow]:
    """A row for each seed if it is fine-tuned or has random scores, else only the row."""
    is_random = row.trained or row.scorer == "random"
    return [replace(row, seed=seed) for seed in range(seeds if is_random else 1)]


def row_config(cfg, row: StudyRow):
    """The config of a row. If several blocks select, each keeps the same share."""
    cfg = cfg.clone()
    cfg.RNG_SEED += row.seed
    cfg.STTS.ENABLE = row.scorer != "all"
    for name in NAMES if cfg.STTS.ENABLE else ():
        node, share = cfg.STTS[name.upper()], getattr(row, name)
        if share is None:
            node.BLOCKS, node.KEEP = [], []
        elif not node.BLOCKS:
            raise ValueError(
                f"a budget for {name} is asked for, but STTS.{name.upper()}.BLOCKS is empty: name "
                f"a block there, or give --{name} without a share and no --both"
            )
        else:
            node.KEEP = [share ** (1 / len(node.BLOCKS))] * len(node.BLOCKS)
            node.SCORER = "uniform" if row.scorer == "oracle" else row.scorer
    return cfg


# ---- weights --------------------------------------------------------------------------------


def find_checkpoint(cfg, named: str | None) -> str:
    """The checkpoint to study: a file, or the folder that the config's model is initialized from.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if none is named, or it is another folder.
    """
    path = named or cfg.TEST.CHECKPOINT_FILE_PATH or cfg.TRAIN.CHECKPOINT_FILE_PATH
    folder = backbones.family_of(cfg).init_folder(cfg)
    if not path and not folder:
        raise ValueError("no checkpoint is named: give --checkpoint or TEST.CHECKPOINT_FILE_PATH")
    path = path or folder
    if not g_pathmgr.exists(path):
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    if os.path.isdir(path) and not (folder and os.path.samefile(path, folder)):
        raise ValueError(
            f"checkpoint {path} is a folder: name a file in it or, if save_pretrained wrote it, "
            f"set MODEL.MODEL_NAME hf:{path}"
        )
    return path


def has_scorer_weights(cfg, row: StudyRow, path: str) -> bool:
    """Whether a checkpoint has the weights of a row's scorers; if not, prints that."""
    if row.scorer != "learned":
        return True
    missing = load_row_model(row_config(cfg, row), path)[1]
    if missing:
        print(f"skipped {row.name}: {path} has no weights for {missing[0]}", file=sys.stderr)
    return not missing


def load_row_model(cfg, path: str) -> tuple[nn.Module, list[str]]:
    """A row's model with the weights of a checkpoint, and the names of the scorers' parameters
    that the checkpoint lacks.

    Raises:
        ValueError: if it is of another backbone.
    """
    model = build_model(cfg)
    checkpoint = pretrained_state(model, path) if os.path.isdir(path) else read_checkpoint(path)
    validate_checkpoint(model, checkpoint, cfg, "finetune", path)  # other heads pass
    loaded = load_weights(model, checkpoint, strict=False)
    lost = [name for name in loaded.missing if not name.startswith("stts.")]
    if lost or loaded.mismatched:
        raise ValueError(f"{path} does not fit this config's model: {loaded}")
    return model, list(loaded.missing)
