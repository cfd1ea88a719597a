"""Top-k accuracy of predictions, also of lists with videos that are unreadable or have no label."""

from collections.abc import Sequence

from torch import Tensor

from stts_slowfast.video.error_log import UNREADABLE

# The label of a video whose line in the list has none. (-1, which lists use for it, is UNREADABLE.)
NO_LABEL = -2


def topk_errors(predictions: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> list[Tensor]:
    """The top-k errors in percent of predictions (B, classes) for labels (B,)."""
    best = predictions.topk(min(max(ks), predictions.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return [100.0 - 100.0 * hits[:, :k].any(1).float().mean() for k in ks]


def mixed_topk_errors(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """As :func:`topk_errors`, also for labels (B, classes) of mixed clips: both classes of a clip
    are right, as SlowFast adds their logits."""
    if labels.dim() == 1:
        return topk_errors(logits, labels)
    first, second = labels.topk(2, dim=1).indices.unsqueeze(-1).unbind(1)
    logits = logits.float()
    logits = logits.scatter_add(1, first, logits.gather(1, second)).scatter(1, second, 0.0)
    return topk_errors(logits, first.squeeze(1))


def video_accuracies(
    predictions: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float | None]:
    """``top{k}_acc`` in percent of the videos that have a label; None if none has.

    Args:
        predictions: (videos, classes).
        labels: (videos,); ``UNREADABLE`` if a video cannot be read, which counts as wrong, and
            ``NO_LABEL`` if it has none.

    Returns:
        If any video is unreadable, also ``top{k}_acc_readable`` without those.
    """
    labelled = labels != NO_LABEL
    masks = {"": labelled}
    if bool((labels == UNREADABLE).any()):
        masks["_readable"] = labelled & (labels != UNREADABLE)
    accuracies: dict[str, float | None] = {}
    for ending, mask in masks.items():
        errors = topk_errors(predictions[mask], labels[mask], ks) if bool(mask.any()) else []
        for index, k in enumerate(ks):
            accuracy = 100.0 - errors[index].item() if errors else None
            accuracies[f"top{k}_acc{ending}"] = accuracy
    return accuracies
