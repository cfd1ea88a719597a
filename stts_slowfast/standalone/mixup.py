"""Mixup, cutmix and label smoothing of a mini-batch, as in SlowFast (``datasets/mixup.py``)."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def batch_mixer(cfg) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup (arXiv 1710.09412), cutmix (1905.04899) and label smoothing of a mini-batch.

    Clip i is mixed with clip B - 1 - i, all of a batch by the same share: so the AUG.NUM_SAMPLE
    clips of one video, which are neighbours, are mixed with another video's. (torchvision's
    operators mix neighbours.) Random numbers are NumPy's.

    Returns:
        None if MIXUP.ENABLE is False, else a function of clips (B, 3, T, H, W) float, which it
        does not change, and labels (B,) long to clips and labels (B, NUM_CLASSES) float32.
    """
    if not cfg.MIXUP.ENABLE:
        return None
    node, num_classes = cfg.MIXUP, cfg.MODEL.NUM_CLASSES

    def mix(clips: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        share, cutmix = draw_share(node)
        if cutmix:
            clips, share = paste_box(clips, share)
        elif share < 1.0:
            clips = clips.flip(0).mul_(1.0 - share).add_(clips, alpha=share)
        soft = smooth_labels(labels, num_classes, node.LABEL_SMOOTH_VALUE)
        return clips, soft * share + soft.flip(0) * (1.0 - share)

    return mix


def draw_share(node) -> tuple[float, bool]:
    """The share of each clip that is kept (1 for no mixing), and whether by cutmix."""
    if np.random.rand() >= node.PROB or not (node.ALPHA or node.CUTMIX_ALPHA):
        return 1.0, False
    cutmix = not node.ALPHA
    if node.ALPHA and node.CUTMIX_ALPHA:
        cutmix = np.random.rand() < node.SWITCH_PROB
    alpha = node.CUTMIX_ALPHA if cutmix else node.ALPHA
    share = float(np.random.beta(alpha, alpha))
    return share, cutmix and share < 1.0


def paste_box(clips: Tensor, share: float) -> tuple[Tensor, float]:
    """The clips (..., H, W), 1 - ``share`` of each replaced by a box of its partner; and the true
    share, which is larger if the border cuts the box."""
    height, width = clips.shape[-2:]
    side = (1.0 - share) ** 0.5
    box = []
    for size, center in ((height, np.random.randint(height)), (width, np.random.randint(width))):
        half = int(size * side) // 2
        box.append(slice(max(center - half, 0), min(center + half, size)))
    rows, columns = box
    clips, partners = clips.clone(), clips.flip(0)
    clips[..., rows, columns] = partners[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return clips, 1.0 - area / (height * width)


def smooth_labels(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Classes (B,) as shares (B, num_classes), ``smoothing`` of each spread over all classes."""
    soft = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    return soft.scatter_(1, labels[:, None], 1.0 - smoothing + smoothing / num_classes)
