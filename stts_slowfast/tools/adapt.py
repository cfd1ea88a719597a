"""``stts adapt``: teaches the selection of a trained model on videos without labels."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from stts_slowfast import backbones
from stts_slowfast.adaptation import Adaptation, adapt
from stts_slowfast.budgets import DIMENSIONS
from stts_slowfast.checkpoints import save_checkpoint
from stts_slowfast.checkpoints.io import check_output_path
from stts_slowfast.config import validate_stts
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import UNREADABLE, build_loader, normalize_clips
from stts_slowfast.standalone.films import find_films, unlabelled
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.cli import add_config, add_force, add_opts
from stts_slowfast.tools.markdown import format_cell, markdown_table
from stts_slowfast.tools.study.rows import find_checkpoint, load_row_model

TEST_CLIPS = 128  # at most so many are compared before and after
TEST_VIEWS = 8  # of a video
# Without --test-films every so many videos are left out of the adaptation, to compare on them.
TEST_PERIOD = 5
COLUMNS = ("top1_agreement", "kl", "logits_cosine", "features_cosine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``stts adapt``."""
    add_config(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="trained weights, with or without scorers; default: TEST.CHECKPOINT_FILE_PATH",
    )
    parser.add_argument(
        "--films",
        required=True,
        metavar="FOLDER|LIST",
        help="videos to adapt to: a folder, or a list with a path in each line",
    )
    parser.add_argument(
        "--test-films",
        metavar="FOLDER|LIST",
        help="videos to compare on; default: every fifth of --films, which is left out",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="fine-tune the backbone too, to compute what it computes from all tokens",
    )
    parser.add_argument("--steps", type=int, default=400, help="batches of TRAIN.BATCH_SIZE clips")
    parser.add_argument("--minutes", type=float, default=20.0, help="limit of the adaptation")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of scorers")
    parser.add_argument(
        "--backbone-lr", type=float, default=5e-6, help="peak learning rate of the backbone"
    )
    add_force(parser)
    add_opts(parser)


def main(args: argparse.Namespace) -> int:
    """Adapts the model, and prints its agreement with all tokens before and after.

    Raises:
        ValueError: for a config, checkpoint or videos that cannot be used.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    cfg = load_config(args.cfg, args.opts)
    cfg.OUTPUT_DIR, cfg.STTS.ENABLE = args.out, True
    grids = backbones.block_grids(cfg)
    validate_stts(cfg.STTS, len(grids), grids)
    if not any(cfg.STTS[name].BLOCKS for name in DIMENSIONS):
        raise ValueError(
            "nothing is selected: name a block in "
            + " or ".join(f"STTS.{name}.BLOCKS" for name in DIMENSIONS)
        )
    path = find_checkpoint(cfg, args.checkpoint)
    target = os.path.join(args.out, "adapted.pyth")
    for name in (target, os.path.join(args.out, "adapt.json")):
        check_output_path(name, args.force, [path])
    films, test_films = split_films(cfg, args.films, args.test_films)
    torch.manual_seed(cfg.RNG_SEED)
    model, _ = load_row_model(cfg, path)
    device = "cuda" if cfg.NUM_GPUS > 0 and torch.cuda.is_available() else "cpu"
    model.to(device)
    versions = _versions(model)
    try:
        found = adapt(
            model,
            Clips(cfg, "train", films, device),
            Clips(test_config(cfg, len(test_films)), "test", test_films, device),
            backbone=args.backbone,
            steps=args.steps,
            minutes=args.minutes,
            lr=args.lr,
            backbone_lr=args.backbone_lr,
            classes=True,
            seed=cfg.RNG_SEED,
        )
    except KeyboardInterrupt:
        if _versions(model) != versions:
            save_checkpoint(target, model, cfg, 0)
            print(f"interrupted: wrote {target}, as far as it was adapted, without a comparison")
        raise
    save_checkpoint(target, model, cfg, 0)
    counts = {"films": len(films), "test_films": len(test_films)}
    write_json(os.path.join(args.out, "adapt.json"), {**counts, **asdict(found)})
    print(table(found))
    print(
        f"{found.steps} steps in {found.seconds:.0f} s, {found.seconds_total:.0f} s with the "
        f"comparisons on {len(test_films)} videos that were not adapted to"
    )
    if hint := advice(found):
        print(hint)
    print(f"wrote {target}")
    return 0


def _versions(model: torch.nn.Module) -> list[int]:
    """How often each parameter has been changed in place."""
    return [parameter._version for parameter in model.parameters()]


# ---- videos ---------------------------------------------------------------------------------


class Clips:
    """Normalised clips ``(B, 3, T, H, W)`` of videos without labels, epoch after epoch.

    In training a clip is at a random time and position of its video, without further augmentation;
    in testing it is as ``stts run`` tests, and decoded once. Videos that cannot be read are left
    out.
    """

    def __init__(self, cfg, split: str, films: list[str], device: str):
        self.cfg, self.device, self.epoch = cfg.clone(), device, 0
        self.cfg.AUG.ENABLE, self.cfg.AUG.NUM_SAMPLE = False, 1
        if split == "train":
            self.cfg.TRAIN.BATCH_SIZE = min(cfg.TRAIN.BATCH_SIZE, len(films))
        self.loader = build_loader(self.cfg, split, films=unlabelled(films))
        self.decoded: list[Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        for clips in self._batches() if self.decoded is None else self.decoded:
            yield normalize_clips(clips.to(self.device), self.cfg)

    def _batches(self) -> Iterator[Tensor]:
        self.loader.set_epoch(self.epoch)
        self.epoch += 1
        batches, found = [], False
        for clips, labels, _, _ in self.loader:
            readable = labels != UNREADABLE
            if bool(readable.any()):
                found = True
                yield clips[readable]
                if self.loader.dataset.split == "test":
                    batches.append(clips[readable])
        if not found:
            raise ValueError(f"none of the {len(self.loader.dataset)} videos can be read")
        self.decoded = batches or None


def split_films(cfg, films: str, test_films: str | None) -> tuple[list[str], list[str]]:
    """The videos to adapt to, and those to compare on.

    Raises:
        ValueError: if nothing is left to compare on, or it was adapted to.
    """
    found = find_films(cfg, films)
    if test_films:
        tested = find_films(cfg, test_films)
        if both := {*map(os.path.realpath, found)} & {*map(os.path.realpath, tested)}:
            raise ValueError(
                f"{len(both)} videos are in both --films and --test-films, such as {min(both)}: "
                "compare on others"
            )
        return found, tested[:: -(-len(tested) // TEST_CLIPS)]
    if len(found) < 2:
        raise ValueError(
            f"{films} has one video: give two at least, or --test-films to compare on others"
        )
    period = min(TEST_PERIOD, len(found))
    tested = found[period - 1 :: period]
    left = set(tested)
    return [film for film in found if film not in left], tested[:: -(-len(tested) // TEST_CLIPS)]


def test_config(cfg, videos: int):
    """A config that tests one crop of up to ``TEST_VIEWS`` clips of a video."""
    cfg = cfg.clone()
    cfg.TEST.NUM_SPATIAL_CROPS = 1
    cfg.TEST.NUM_ENSEMBLE_VIEWS = min(max(TEST_CLIPS // videos, 1), TEST_VIEWS)
    return cfg


# ---- report ---------------------------------------------------------------------------------


def table(found: Adaptation) -> str:
    """The comparisons as Markdown."""
    columns = [name for name in COLUMNS if any(row[name] is not None for row in found.rows)]
    lines = [
        [row["budget"], row["when"], *(format_cell(row[name]) for name in columns)]
        for row in sorted(found.rows, key=lambda row: row["budget"])
    ]
    return markdown_table(["budget", "scorer", *columns], lines)


def advice(found: Adaptation) -> str:
    """Lines that name the budgets at which something else than the adapted model is better."""
    worse, others = [], []
    for budget in dict.fromkeys(row["budget"] for row in found.rows):
        kl = {row["when"]: row["kl"] for row in found.rows if row["budget"] == budget}
        best = min(kl, key=lambda when: kl[when])
        if best not in ("before", "after"):
            others.append(f"{budget}: {best}")
        if kl["before"] < kl["after"]:
            worse.append(budget)
    lines = []
    if worse:
        lines.append(
            f"the adaptation made the model worse at {'; '.join(worse)}: give more films or "
            "--steps, or a lower --backbone-lr"
        )
    if others:
        better = "; ".join(others)
        lines.append(f"without training these scorers agree better with all tokens: {better}")
    return "\n".join(lines)
