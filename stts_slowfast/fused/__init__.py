"""What makes a model faster and never changes its numbers: attention, blocks, a CPU's operators."""

from torch import nn

from stts_slowfast.fused.attention import fuse_attention, unfuse_attention


def configure(model: nn.Module, fuse: bool, true_distances: bool) -> int:
    """Gives a model's attention what a node asks for, in place; calling it again starts afresh.

    Args:
        model: with its selectors in place.
        fuse: ``STTS.FUSED_ATTENTION``.
        true_distances: ``STTS.TRUE_DISTANCES``.

    Returns:
        How many attention modules were replaced.
    """
    restore(model)
    return fuse_attention(model, true_distances) if fuse else 0


def restore(model: nn.Module) -> None:
    """Puts the stock modules back, the very objects that ``configure`` replaced."""
    unfuse_attention(model)
