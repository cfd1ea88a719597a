"""Compares measures of a token's saliency by how often the best window shows the class.

    python projects/stts/benchmarks/saliency.py DIR/clutter/mvit.yaml CHECKPOINT

A trained model keeps all tokens of 256 training videos of ``stts make-data``, whose ground truth is
known. No scorer is trained. Each row of the table is a measure. "window" is the mean share of the
object's area inside the window of highest saliency, over all frames that show it; "frame" is how
often the frame of highest saliency shows it. Both are in percent.
"""

import argparse
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_slowfast.annealing import update_schedule
from stts_slowfast.selectors import Selection, Selector
from stts_slowfast.standalone.config import load_config
from stts_slowfast.standalone.data import ClipDataset, normalize_clips
from stts_slowfast.tools.demo.make_data import read_truth
from stts_slowfast.tools.study.coverage import share_inside, true_boxes
from stts_slowfast.tools.study.rows import StudyRow, load_row_model, row_config
from stts_slowfast.visualization import Box

SHARE = 0.25  # of a frame's tokens, in a window
VIDEOS, BATCH = 256, 16


def measures(x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Saliencies (B, T, H, W) of tokens ``x`` (B, T, H, W, C), by name; m is the clip's mean."""
    centred = x - x.mean(dim=(1, 2, 3), keepdim=True)
    return {
        "abs(sum_c g_c x_c)": (gradient * x).sum(-1).abs(),
        "sum_c abs(g_c x_c)": (gradient * x).abs().sum(-1),
        "norm(g)": gradient.norm(dim=-1),
        "abs(sum_c g_c (x_c - m_c))": (gradient * centred).sum(-1).abs(),
        "sum_c abs(g_c (x_c - m_c))": (gradient * centred).abs().sum(-1),
        "norm(g) norm(x - m)": gradient.norm(dim=-1) * centred.norm(dim=-1),
        "- sum_c g_c (x_c - m_c)": -(gradient * centred).sum(-1),
    }


def losses(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return {
        "cross entropy": F.cross_entropy(logits, labels, reduction="sum"),
        "with label smoothing 0.1": F.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=0.1
        ),
        "margin": (others - logits.gather(1, labels[:, None])[:, 0]).sum(),
    }


def recall(saliency: Tensor, boxes: dict[int, Box], selector: Selector) -> tuple[bool, float]:
    """Whether the frame of highest saliency shows the class, and the mean share of the object's
    area inside the windows of highest saliency.

    Args:
        saliency: (T, H, W) of a clip.
        boxes: of what shows the class, by frame of tokens, see ``true_boxes``.
        selector: whose windows are compared.
    """
    height, width = saliency.shape[1:]
    window, stride = selector.candidate_windows(saliency[None, ..., None])
    best = F.avg_pool2d(saliency[:, None], window, stride).flatten(1).argmax(1).tolist()
    columns = (width - window[1]) // stride[1] + 1
    shares = []
    for frame, box in boxes.items():
        top, left = best[frame] // columns * stride[0], best[frame] % columns * stride[1]
        region = top / height, left / width, window[0] / height, window[1] / width
        shares.append(share_inside(box, region))
    return int(saliency.mean((1, 2)).argmax()) in boxes, sum(shares) / len(shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    args = parser.parse_args()
    cfg = load_config(args.config, ["DATA_LOADER.NUM_WORKERS", 0])
    cfg = row_config(cfg, StudyRow(None, SHARE, "uniform"))
    model, _ = load_row_model(cfg, args.checkpoint)
    model.train()  # the models of make-data have no dropout
    (selector,) = model.stts.values()
    update_schedule(model, 0.0)
    selector.keep_all()
    arrived = []

    def replace_tokens(grid: Tensor, selection: Selection) -> Tensor:
        arrived.append(grid.detach().requires_grad_())
        return arrived[-1]

    selector.teach = replace_tokens
    truth, found = read_truth(cfg.DATA.PATH_TO_DATA_DIR), defaultdict(list)
    dataset = ClipDataset(cfg, "train")
    for first in range(0, VIDEOS, BATCH):
        items = [dataset[number] for number in range(first, first + BATCH)]
        clips = normalize_clips(torch.cat([item[0] for item in items]), cfg)
        labels = torch.cat([item[1] for item in items])
        names = [f"train_{number:04d}.mp4" for number in range(first, first + BATCH)]
        logits = model(clips)
        for loss_name, loss in losses(logits, labels).items():
            (gradient,) = torch.autograd.grad(loss, arrived[-1], retain_graph=True)
            for name, saliency in measures(arrived[-1].detach(), gradient).items():
                found[name, loss_name] += [
                    recall(each, true_boxes(cfg, truth[video]), selector)
                    for each, video in zip(saliency, names)
                ]
    print("| saliency | loss | frame | window |\n| --- | --- | --- | --- |")
    for (name, loss_name), pairs in found.items():
        frame, window = (100 * sum(each) / len(pairs) for each in zip(*pairs))
        print(f"| `{name}` | {loss_name} | {frame:.1f} | {window:.1f} |")


if __name__ == "__main__":
    main()
