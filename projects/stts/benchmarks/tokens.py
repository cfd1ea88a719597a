"""Speed of single tokens on plain ViTs: half of the frames, then a quarter of the tokens.

    OMP_NUM_THREADS=1 python projects/stts/benchmarks/tokens.py [--width 768] [--json FILE]

VideoMAE, V-JEPA 2 (both of 16x224x224) and timm's ViT/16 on 8 frames, with random weights and the
width of their B models, or another. Evaluation and training, in core-seconds, each in turn with the
same model of all tokens; the last column is the share of the GFLOP ratio that is reached.
"""

import argparse
import copy
import functools
import statistics

import token_layouts
import torch
from torch import nn

import stts_slowfast as stts
from stts_slowfast.standalone.flops import count_gflops
from stts_slowfast.standalone.run_logger import write_json
from stts_slowfast.tools.bench.command import timed

SELECTION = {"time": {0: 0.5}, "tokens": {4: 0.25}, "teacher": "saliency", "shrink": 0.0}


class Logits(nn.Module):
    """A model of transformers, from clips to logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, clips):
        out = self.model(clips)
        return out if isinstance(out, torch.Tensor) else out.logits


def models(width: int):
    """Name, model and one clip of each host."""
    import timm
    import transformers

    clip = torch.randn(1, 16, 3, 224, 224)
    size = {"hidden_size": width, "num_attention_heads": width // 64, "num_labels": 400}
    config = transformers.VideoMAEConfig(**size, intermediate_size=4 * width)
    yield "VideoMAE", transformers.VideoMAEForVideoClassification(config), clip
    size |= {"crop_size": 224, "frames_per_clip": 16, "num_hidden_layers": 12}
    config = transformers.VJEPA2Config(**size, pred_num_hidden_layers=1)
    yield "V-JEPA 2", transformers.VJEPA2ForVideoClassification(config), clip
    size = {"embed_dim": width, "num_heads": width // 64, "num_classes": 400}
    frames = timm.models.VisionTransformer(**size)
    frames.num_frames = 8
    yield "timm ViT, 8 frames", frames, clip[0, ::2]


def step(model: nn.Module, clip: torch.Tensor, train: bool) -> None:
    """One forward pass, in training with the backward pass."""
    model.train(train)
    with torch.set_grad_enabled(train):
        logits = model(clip)
    if train:
        logits.square().mean().backward()
        model.zero_grad(set_to_none=True)


def measure(
    name: str, model: nn.Module, clip: torch.Tensor, repeats: int, modes: list[str]
) -> list[dict]:
    """A row for each of ``modes``."""
    selected = stts.attach(copy.deepcopy(model), **SELECTION)
    stts.set_progress(selected, 1.0)
    both = Logits(model), Logits(selected)
    gflops = [count_gflops(each.eval(), clip) for each in both]
    rows = []
    for mode in modes:
        train, seconds = mode == "training", [[], []]
        for repeat in range(repeats + 1):
            for each, found in zip(both, seconds):
                taken = timed(functools.partial(step, each, clip, train), "cpu", True)
                if repeat:
                    found.append(taken)
        medians = [statistics.median(found) for found in seconds]
        rows.append(
            {"model": name, "mode": mode, "gflops": gflops}
            | {"seconds": seconds, "ideal": gflops[0] / gflops[1]}
            | {"ratio": medians[0] / medians[1]}
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["evaluation", "training"])
    parser.add_argument("--models", nargs="*", help="parts of their names")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, model, clip in models(args.width):
        if not args.models or any(part in name for part in args.models):
            rows += measure(name, model, clip, args.repeats, args.modes)
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "rows": rows})
    print(token_layouts.tokens([{"rows": rows}]))


if __name__ == "__main__":
    main()
