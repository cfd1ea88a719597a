"""Adapts a trained classifier to keep few tokens, without labels: learned, random and uniform ones.

Reads a config of `stts make-data`, and the checkpoint of a training on all tokens. Each scorer gets
the same steps of `stts_slowfast.adapt` on training videos, and is compared on the test videos. It
makes a table in docs/experiments.md:

    stts make-data --kind needle --out DIR --train 1024 --test 256
    stts run --engine standalone --cfg DIR/vit.yaml --opts SOLVER.MAX_EPOCH 7
    python projects/stts/benchmarks/adapt.py DIR/vit.yaml \\
        DIR/run_vit/checkpoints/checkpoint_epoch_00007.pyth --json DIR/adapt.json
"""

import argparse
import json
import logging
import time
from pathlib import Path

import tables
import torch
from torch import Tensor

import stts_slowfast as stts
from stts_slowfast.standalone.films import find_films
from stts_slowfast.tools.adapt import Clips
from stts_slowfast.tools.study.rows import load_row_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cfg", help="a config")
    parser.add_argument("checkpoint", help="its weights, trained on all tokens")
    parser.add_argument("--scorers", nargs="+", default=["learned", "random", "uniform"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3, help="of scorers")
    parser.add_argument("--backbone-lr", type=float, default=1e-4)
    parser.add_argument("--no-backbone", action="store_true", help="adapt only scorers")
    parser.add_argument("--keep", default="[[0.12, 0.5]]", help="STTS.TOKENS.KEEP")
    parser.add_argument("--block", type=int, default=1, help="STTS.TOKENS.BLOCKS")
    parser.add_argument("--limit", type=int, default=1024, help="training and test videos at most")
    parser.add_argument("--json", metavar="FILE", help="file to write every row to")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    rows: list[dict] = []
    clips: dict[str, list[Tensor]] = {}
    for seed in args.seeds:
        for scorer in args.scorers:
            cfg = stts.load_config(args.cfg, options(args, scorer, seed))
            clips = clips or {split: read(cfg, split, args) for split in ("train", "test")}
            about = {"kind": Path(args.cfg).parent.name, "scorer": scorer, "seed": seed}
            rows += adapted(cfg, clips, args, about)
            if args.json:
                Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))
    print(tables.adapted(rows))


def options(args: argparse.Namespace, scorer: str, seed: int) -> list:
    return [
        *("STTS.ENABLE", True, "STTS.TIME.BLOCKS", [], "STTS.SPACE.BLOCKS", []),
        *("STTS.TOKENS.BLOCKS", [args.block], "STTS.TOKENS.KEEP", args.keep),
        *("STTS.TOKENS.SCORER", scorer, "RNG_SEED", seed, "DATA_LOADER.NUM_WORKERS", 0),
        *("TRAIN.BATCH_SIZE", args.batch_size),
    ]


def read(cfg, split: str, args: argparse.Namespace) -> list[Tensor]:
    """The batches of a split, decoded once."""
    films = find_films(cfg, str(Path(cfg.DATA.PATH_TO_DATA_DIR) / f"{split}.csv"))[: args.limit]
    return list(Clips(cfg, split, films, "cpu"))


def adapted(cfg, clips: dict[str, list[Tensor]], args: argparse.Namespace, about: dict) -> list:
    """The comparisons of one adaptation."""
    torch.manual_seed(cfg.RNG_SEED)
    model, _ = load_row_model(cfg, args.checkpoint)
    start = time.process_time()
    found = stts.adapt(
        model,
        clips["train"],
        clips["test"],
        backbone=not args.no_backbone,
        steps=args.steps,
        lr=args.lr,
        backbone_lr=args.backbone_lr,
        classes=True,
        baselines=(),
        seed=cfg.RNG_SEED,
    )
    about |= {"steps": found.steps, "seconds": round(found.seconds, 1)}
    about["processor_seconds"] = round(time.process_time() - start, 1)
    return [{**about, **row} for row in found.rows]


if __name__ == "__main__":
    main()
