"""Adapts a trained classifier to keep few tokens, without labels: learned and random ones.

The small VideoMAE of train_tokens.py learns a kind of clips on all tokens. Then its selection and
its backbone learn from other clips, without labels (`stts_slowfast.adapt`). Agreement with all
tokens, before and after, is measured on a third set of clips.

    OMP_NUM_THREADS=1 python projects/stts/benchmarks/adapt.py [--kinds needle clutter motion]
        [--models videomae vjepa2] [--scorers learned random] [--seeds 0 1 2] [--json FILE]
"""

import argparse
import copy
import itertools
import time

import token_layouts
import torch
from train_tokens import CLIPS, LEARNING_RATE, STEPS, build, draw_clips, top1, train

import stts_slowfast as stts
from stts_slowfast.standalone.run_logger import write_json

SHARE = (0.12, 0.5)  # of tokens before block 0
ADAPTED_CLIPS, TEST_CLIPS = 512, 256
# Steps of 8 clips, and peak learning rates of scorers and backbone.
ADAPT = {"steps": 200, "lr": 2e-3, "backbone_lr": 2e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["needle", "clutter", "motion"])
    parser.add_argument("--models", nargs="+", default=["videomae"])
    parser.add_argument("--scorers", nargs="+", default=["learned", "random"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", metavar="FILE", help="file to write every row to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for kind, name, seed in itertools.product(args.kinds, args.models, args.seeds):
        torch.manual_seed(seed)
        model = build(kind, name)
        train(model, *draw_clips(kind, seed, 0, CLIPS[kind]), STEPS[kind], LEARNING_RATE, seed)
        model.eval()
        about = {"kind": kind, "model": name, "seed": seed}
        about["top1"] = top1(model, *draw_clips(kind, seed, 1, TEST_CLIPS))
        for scorer in args.scorers:
            found = adapted(copy.deepcopy(model), kind, scorer, seed)
            rows += [{**about, "scorer": scorer, **row} for row in found]
            print(*rows[-len(found) :], sep="\n", flush=True)
        if args.json:
            write_json(args.json, {"torch": torch.__version__, "rows": rows})
    print(token_layouts.adapted([{"rows": rows}]))


def adapted(model: torch.nn.Module, kind: str, scorer: str, seed: int) -> list[dict]:
    """The comparisons of one adaptation."""
    clips, _ = draw_clips(kind, seed, 2, ADAPTED_CLIPS)
    test, _ = draw_clips(kind, seed, 1, TEST_CLIPS)
    torch.manual_seed(seed)
    stts.attach(model, tokens={0: SHARE}, tokens_scorer=scorer)
    start = time.process_time()
    found = stts.adapt(
        model, clips.split(8), test.split(64), backbone=True, baselines=(), seed=seed, **ADAPT
    )
    seconds = round(time.process_time() - start, 1)
    return [{"core_seconds": seconds, **row} for row in found.rows]


if __name__ == "__main__":
    main()
