"""Replacements of attention and blocks: faster, or at true distances; nothing else changes.

Each swap is done in place, checked numerically, and falls back to the original if a submodule is
hooked, wrapped or replaced.
"""

import logging

from torch import nn

from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.equivalence import verify_equivalence
from stts_slowfast.fused.registry import BLOCKS, FINAL_NORMS, SUBMODULES
from stts_slowfast.fused.replacement import FuseOptions, Replacement
from stts_slowfast.hosts import find_blocks

logger = logging.getLogger(__name__)

# Parameters that show that an attention has relative positions.
_POSITION_TABLES = ("rel_pos_t", "rel_pos_h", "rel_pos_w", "relative_position_bias_table")


def fuse_model(model: nn.Module, fuse: bool, true_distances: bool) -> int:
    """Replaces a model's attention and blocks in place, as a config node specifies.

    A second call starts over. Parameters and buffers stay the same objects under the same names. A
    module that cannot be
    rearranged exactly (pooling before the projection, unshared convolutions, norms other than
    LayerNorm), or whose replacement differs, is kept. ``fuse`` does not change the numbers.

    Args:
        model: the model with its selectors, which pass ``Grid``s to its blocks.
        fuse: ``STTS.FUSED_ATTENTION``: faster attention and blocks, if their submodules have no
            hooks and were not wrapped or replaced.
        true_distances: ``STTS.TRUE_DISTANCES``: after a selection, relative positions are those
            between the tokens that are left; False stretches the tables over what is left, as the
            originals do for any smaller input.

    Returns:
        The number of fused attention modules if ``fuse``, else of replaced ones.
    """
    unfuse_model(model)
    options = FuseOptions(fuse, true_distances, _cropped(model), _final_norms(model))
    problems: dict[str, str] = {}
    for replacements in (SUBMODULES, BLOCKS):
        for parent, name, child in _children(model):
            match = next((cls for cls in replacements if cls.matches(child)), None)
            replacement = match and match.build(child, options)
            if replacement is None:
                continue
            if problem := verify_equivalence(replacement):
                problems.setdefault(type(child).__name__, problem)
            else:
                parent._modules[name] = replacement
    for name, problem in problems.items():
        logger.warning("not replacing %s: %s", name, problem)
    unknown = _unknown_positions(model) - problems.keys()
    if true_distances and unknown and hasattr(model, "stts"):
        names = ", ".join(sorted(unknown))
        logger.warning("STTS.TRUE_DISTANCES is True, but has no effect on the unknown %s", names)
    found = [module for module in model.modules() if isinstance(module, AttentionReplacement)]
    return sum(replacement.fuse for replacement in found) if fuse else len(found)


def unfuse_model(model: nn.Module) -> None:
    """Puts the originals back, the very objects that :func:`fuse_model` replaced."""
    for parent, name, child in _children(model):
        if isinstance(child, Replacement):
            parent._modules[name] = child.original


def has_attention(model: nn.Module) -> bool:
    """Whether a model has attention of a type that can be fused if its submodules are unchanged."""
    known = [cls for cls in SUBMODULES if issubclass(cls, AttentionReplacement)]
    return any(
        isinstance(module, AttentionReplacement) or any(cls.matches(module) for cls in known)
        for module in model.modules()
    )


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]


def _cropped(model: nn.Module) -> set[nn.Module]:
    """The modules of the blocks that run behind a selection of windows."""
    keys = [key.split("_") for key in getattr(model, "stts", ())]
    first = min((int(number) for dimension, number in keys if dimension == "space"), default=None)
    blocks = [] if first is None else find_blocks(model)[first:]
    return {module for block in blocks for module in block.modules()}


def _final_norms(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, nn.Module]]:
    found = [(module, find(module)) for module in model.modules() for find in FINAL_NORMS]
    return {find_blocks(module)[-1]: (module, norm) for module, norm in found if norm is not None}


def _unknown_positions(model: nn.Module) -> set[str]:
    """The classes in a model that have relative positions, and that no replacement knows."""
    return {
        type(module).__name__
        for module in model.modules()
        if any(module._parameters.get(name) is not None for name in _POSITION_TABLES)
        and not isinstance(module, Replacement)
        and not any(cls.matches(module) for cls in SUBMODULES)
    }
