"""Do learned single tokens beat random ones? Small VideoMAE and V-JEPA 2, from random weights.

    OMP_NUM_THREADS=1 python projects/stts/benchmarks/train_tokens.py [--kinds needle clutter ...]
        [--models videomae vjepa2] [--scorers learned random none] [--rests drop merge]
        [--seeds 0 1 2] [--json FILE]
    python projects/stts/benchmarks/tables.py      # the table, from results/train_tokens.json

Clips are those of ``stts make-data``, drawn in memory. A model of three blocks of width 48 learns
from Xavier's weights, with tokens of 2x8x8 pixels and selection before its first block: behind it
each token knows of all others. Each iteration samples a budget between 12% and 25%. It is tested on
other clips at several budgets. A row takes 10 to 20 seconds of a core.
"""

import argparse
import functools
import itertools

import numpy as np
import token_layouts
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stts_slowfast as stts
from stts_slowfast.backbones.vit import init_xavier
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.demo.make_data import draw_video

BUDGETS = (1.0, 0.25, 0.12, 0.06)
FRAMES = {"clutter": 4}  # it shows the class in every frame; the others need 16
BATCH = 32
# Steps and clips after which both models are above 95% with all tokens; V-JEPA 2 had 75.0 on
# clutter after 200 steps.
STEPS = {"needle": 250, "clutter": 300, "motion": 250}
CLIPS = {"needle": 1024, "clutter": 768, "motion": 1024}
LEARNING_RATE = 2e-3


@functools.lru_cache(maxsize=6)
def draw_clips(kind: str, seed: int, split: int, count: int) -> tuple[Tensor, Tensor]:
    """Clips (N, T, 3, 32, 32) and their classes."""
    clips, labels = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, split, number])
        frames, truth = draw_video(kind, number % 4, rng, 32, FRAMES.get(kind, 16))
        clips.append(torch.from_numpy(frames[..., 0].copy()))
        labels.append(truth.label)
    grey = (torch.stack(clips).float() / 255 - 0.45) / 0.225
    return grey[:, :, None].expand(-1, -1, 3, -1, -1), torch.tensor(labels)


def build(kind: str, name: str) -> nn.Module:
    """A classifier of transformers with random weights."""
    import transformers

    size = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_labels": 4}
    size |= {"patch_size": 8, "tubelet_size": 2}
    frames = FRAMES.get(kind, 16)
    if name == "videomae":
        more = {"image_size": 32, "num_frames": frames, "intermediate_size": 96}
        config = transformers.VideoMAEConfig(**size, **more)
        model = transformers.VideoMAEForVideoClassification(config)
    else:
        more = {
            "crop_size": 32,
            "frames_per_clip": frames,
            "mlp_ratio": 2.0,
            "num_pooler_layers": 1,
        }
        unused = {
            "pred_num_hidden_layers": 1,
            "pred_hidden_size": 24,
            "pred_num_attention_heads": 2,
        }
        config = transformers.VJEPA2Config(**size, **more, **unused)
        model = transformers.VJEPA2ForVideoClassification(config)
    init_xavier(model)
    return model


def train(
    model: nn.Module, clips: Tensor, labels: Tensor, steps: int, lr: float, seed: int
) -> None:
    """AdamW with a linear warm-up and a cosine schedule."""
    groups = stts.param_groups(model.parameters(), model)
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.05)
    schedule = stts.Schedule(model, optimizer, max_epochs=1, pretrained=False, seed=seed)
    torch.manual_seed(seed)
    rounds = steps * BATCH // len(clips) + 1
    order = torch.cat([torch.randperm(len(clips)) for _ in range(rounds)])
    model.train()
    for step in range(steps):
        done = step / steps
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, 10 * (step + 1) / steps) * (0.5 + 0.5 * np.cos(np.pi * done))
            )
        schedule.step(done)
        batch = order[step * BATCH : (step + 1) * BATCH]
        loss = F.cross_entropy(model(clips[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def top1(model: nn.Module, clips: Tensor, labels: Tensor) -> float:
    """In percent."""
    torch.manual_seed(0)
    found = torch.cat([model(batch).logits.argmax(1) for batch in clips.split(64)])
    return 100 * (found == labels).float().mean().item()


def run(kind: str, name: str, scorer: str, rest: str, seed: int, args: argparse.Namespace) -> dict:
    """A trained model's top-1 by budget; ``scorer`` "none" trains on all tokens."""
    torch.manual_seed(seed)
    model = build(kind, name)
    if scorer != "none":
        kept = {"tokens": {args.block: (0.12, 0.25)}, "tokens_scorer": scorer, "tokens_rest": rest}
        stts.attach(model, **kept, teacher=args.teacher, shrink=0.6)
    train(model, *draw_clips(kind, seed, 0, CLIPS[kind]), STEPS[kind], LEARNING_RATE, seed)
    model.eval()
    test = draw_clips(kind, seed, 1, 256)
    label = scorer if rest == "drop" else f"{scorer}, {rest}"
    row = {"kind": kind, "model": name, "scorer": label, "seed": seed}
    for budget in BUDGETS if scorer != "none" else (1.0,):
        for selector in model.stts.values() if scorer != "none" else ():
            selector.set_share(budget)
        row[f"{budget:g}"] = top1(model, *test)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kinds", nargs="+", default=["needle", "clutter", "motion"])
    parser.add_argument("--models", nargs="+", default=["videomae", "vjepa2"])
    parser.add_argument("--scorers", nargs="+", default=["learned", "random", "none"])
    parser.add_argument("--rests", nargs="+", default=["drop"], help="STTS.TOKENS.REST")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--block", type=int, default=0, help="before which tokens are selected")
    parser.add_argument("--teacher", default="saliency")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in itertools.product(args.kinds, args.models, args.scorers, args.rests, args.seeds):
        rows.append(run(*case, args))
        print(rows[-1], flush=True)
        if args.json:
            write_json(args.json, {"torch": torch.__version__, "rows": rows})
    print(token_layouts.train_tokens([{"rows": rows}]))


if __name__ == "__main__":
    main()
