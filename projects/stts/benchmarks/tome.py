"""Learned selection beside ToMe's merging of tokens, on a plain ViT, at equal measured speed.

    git clone https://github.com/facebookresearch/ToMe
    TOME_ROOT=ToMe python projects/stts/benchmarks/tome.py DIR [--seeds 3] [--epochs 4]

DIR is a folder of ``stts make-data``; the ViT of ``DIR/vit.yaml``, with Xavier's weights, is
trained on all tokens unless its checkpoint exists. Fine-tuned from that checkpoint, by the same
recipe, are learned selection of half of the frames and half of their tokens, and ToMe (arXiv
2210.09461, with its own functions for matching and merging), which is also tested without
fine-tuning. The number of tokens that ToMe merges per block is the smallest with which it is as
fast as the selection, by clips timed in turn; the largest if all are slower.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from dataclasses import replace

import torch
from torch.nn import functional as F

from stts_slowfast import build_model, load_config
from stts_slowfast.backbones import FAMILIES, vit
from stts_slowfast.standalone import engine
from stts_slowfast.standalone.checkpointing import checkpoint_path
from stts_slowfast.tools.study.evaluate import TestClips, evaluate
from stts_slowfast.tools.study.rows import load_row_model

XAVIER = ["MODEL.MODEL_NAME", "Xavier"]
SELECTED = [*XAVIER, "STTS.ENABLE", True, "STTS.TIME.KEEP", [0.5], "STTS.SPACE.KEEP", [0.5]]
RECIPE = ["SOLVER.BASE_LR", 1e-3, "SOLVER.WARMUP_EPOCHS", 0.0, "STTS.FREEZE_BACKBONE_EPOCHS", 0.5]
MERGED = ["MODEL.MODEL_NAME", "ToMe", "TOME_R"]


def read_tome():
    """ToMe's ``merge.py`` alone: its package imports timm."""
    path = os.path.join(os.environ["TOME_ROOT"], "tome", "merge.py")
    spec = importlib.util.spec_from_file_location("tome_merge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOME = read_tome()


class MergingBlock(vit.Block):
    """A block that merges ``self.r`` tokens, by the similarity of their keys, before its MLP.

    ``sizes`` (B, N, 1) is the number of tokens merged into each token of ``x`` (B, N, C); it
    weights them in attention.
    """

    def forward(self, x, sizes):
        heads, (b, n, c) = self.attn.num_heads, x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weight = sizes.log().view(b, 1, 1, n)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=weight.to(q.dtype))
        x = x + self.drop_path(self.attn.proj(mixed.transpose(1, 2).reshape(b, n, c)))
        if self.r:
            merge, _ = TOME.bipartite_soft_matching(k.mean(1), self.r, class_token=True)
            x, sizes = TOME.merge_wavg(merge, x, sizes)
        return x + self.drop_path(self.mlp(self.norm2(x))), sizes


class XavierViT(vit.ViT):
    """The ViT with weights that suit its width: SlowFast's 0.02 is for wider ones."""

    def __init__(self, cfg):
        super().__init__(cfg)
        vit.init_xavier(self)


class MergingViT(XavierViT):
    """The same model and parameters, with ``cfg.TOME_R`` tokens merged in each block."""

    def __init__(self, cfg):
        super().__init__(cfg)
        for block in self.blocks:
            block.__class__, block.r = MergingBlock, cfg.TOME_R

    def forward(self, clip):
        x, _ = self.patch_embed(clip)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position_embedding()
        sizes = torch.ones_like(x[..., :1])
        for block in self.blocks:
            x, sizes = block(x, sizes)
        return self.head(self.norm(x)[:, 0])


def add_config(cfg) -> None:
    cfg.setdefault("TOME_R", 0)


MVIT = replace(FAMILIES.get("MViT"), add_config=add_config)
FAMILIES.register(replace(MVIT, name="Xavier", build=XavierViT))
FAMILIES.register(replace(MVIT, name="ToMe", build=MergingViT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="written by stts make-data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning")
    parser.add_argument("--all-epochs", type=int, default=7, help="of the training before")
    args = parser.parse_args()
    file = os.path.join(args.folder, "vit.yaml")
    trained = checkpoint(load_config(file, [*XAVIER, "SOLVER.MAX_EPOCH", args.all_epochs]))
    clips = TestClips(load_config(file))
    r, times = equally_fast(file)
    print(f"ToMe merges {r} tokens per block; ms per clip, medians of clips timed in turn: {times}")
    ways = {
        "all tokens": XAVIER,
        "learned": SELECTED,
        "ToMe": [*MERGED, r],
    }
    for name in ("all tokens", "ToMe"):
        print(f"{name}, not fine-tuned: {test(load_config(file, ways[name]), trained, clips)}")
    for name in ("learned", "ToMe"):
        accuracies = []
        for seed in range(args.seeds):
            folder = os.path.join(args.folder, "tome", f"{name}{seed}")
            opts = ["OUTPUT_DIR", folder, "TRAIN.CHECKPOINT_FILE_PATH", trained, *RECIPE]
            opts += ["SOLVER.MAX_EPOCH", args.epochs, "RNG_SEED", seed, *ways[name]]
            opts += ["TRAIN.CHECKPOINT_EPOCH_RESET", True]
            cfg = load_config(file, opts)
            accuracies.append(test(cfg, checkpoint(cfg), clips))
        spread = statistics.stdev(accuracies) if args.seeds > 1 else 0.0
        mean = statistics.mean(accuracies)
        print(f"{name}, fine-tuned: {mean:.1f} ± {spread:.1f} {accuracies}")


def checkpoint(cfg) -> str:
    """The last checkpoint of a run, which is trained if it does not exist."""
    path = checkpoint_path(cfg, cfg.SOLVER.MAX_EPOCH)
    return path if os.path.exists(path) else engine.train(cfg)["checkpoint"]


def test(cfg, path: str, clips) -> float:
    """Top-1 in percent."""
    model, _ = load_row_model(cfg, path)
    return evaluate(cfg, model, clips, lambda: None)["top1"]


@torch.no_grad()
def equally_fast(file: str, rounds: int = 21, batch: int = 16) -> tuple[int, dict[str, float]]:
    """Tokens that a block must merge to be as fast as the selection; milliseconds per clip."""
    cfg = load_config(file, SELECTED)
    models = {"learned": build_model(cfg), "all tokens": build_model(load_config(file, XAVIER))}
    steps = [share * 32 for share in range(2, 9)]  # 256 of 512 tokens is the most
    for r in steps:
        models[f"ToMe {r}"] = build_model(load_config(file, [*MERGED, r]))
    clip = torch.randn(batch, 3, cfg.DATA.NUM_FRAMES, *[cfg.DATA.TEST_CROP_SIZE] * 2)
    times: dict[str, list] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            model.eval()(clip)
            times[name].append(1000 * (time.perf_counter() - start) / batch)
    medians = {name: round(statistics.median(each), 2) for name, each in times.items()}
    fast = [r for r in steps if medians[f"ToMe {r}"] <= medians["learned"]]
    return (fast or steps[-1:])[0], medians


if __name__ == "__main__":
    sys.exit(main())
