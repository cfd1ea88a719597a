"""``MODEL.ACT_CHECKPOINT`` and ``MODEL.DETACH_FINAL_FC`` for every family."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stts_slowfast.budgets import DIMENSIONS
from stts_slowfast.hosts import find_blocks


class _CheckpointedForward:
    """A block's ``forward`` whose activations are computed again in the backward pass.

    It wraps only ``forward``: hooks, and so selectors, run once. An object instead of a closure,
    so that a copied or pickled model has its own.
    """

    def __init__(self, block: nn.Module):
        self.block = block

    def __call__(self, *args, **kwargs):
        forward = type(self.block).forward
        if not (self.block.training and torch.is_grad_enabled()):
            return forward(self.block, *args, **kwargs)
        return checkpoint(forward, self.block, *args, use_reentrant=False, **kwargs)


def checkpoint_activations(model: nn.Module) -> nn.Module:
    """Makes training recompute the activations of every block instead of keeping them, in place.

    Gradients are the same; random numbers inside a block, such as stochastic depth's, are repeated.
    """
    for block in find_blocks(model):
        # A stage of Video Swin is a sequence of blocks, which are recomputed one at a time.
        for part in block if isinstance(block, nn.Sequential) else [block]:
            part.forward = _CheckpointedForward(part)
    return model


def refuse_detached_scorers(cfg) -> None:
    """Raises ``ValueError`` if scorers are to learn but ``MODEL.DETACH_FINAL_FC`` prevents it.

    Scorers learn through the backbone, from which it detaches the classifier.
    """
    if not cfg.MODEL.get("DETACH_FINAL_FC") or not cfg.TRAIN.ENABLE:
        return
    if "STTS" not in cfg or not cfg.STTS.ENABLE:
        return
    learned = [
        f"STTS.{dimension}.SCORER"
        for dimension in DIMENSIONS
        if cfg.STTS[dimension].BLOCKS and cfg.STTS[dimension].SCORER == "learned"
    ]
    if learned:
        raise ValueError(
            "MODEL.DETACH_FINAL_FC is True: only the head would learn, and no gradient reaches "
            f"the scorers of {' and '.join(learned)}; set MODEL.DETACH_FINAL_FC False, with "
            "STTS.BACKBONE_LR 0.0 to keep the backbone as it is, or scorers that need no training, "
            "or set STTS.ENABLE False"
        )


def detach_backbone(model: nn.Module) -> nn.Module:
    """Freezes all but the classifier ``model.head``, in place."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    return model
