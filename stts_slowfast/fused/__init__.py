"""What makes a model faster, or its relative positions true, and never changes anything else."""

import logging

from torch import nn

from stts_slowfast.fused import pytorchvideo, torchvision  # noqa: F401  they add their views
from stts_slowfast.fused.attention import AttentionReplacement
from stts_slowfast.fused.replacement import (
    BLOCKS,
    FINAL_NORMS,
    SUBMODULES,
    FuseOptions,
    Replacement,
    verify_equivalence,
)
from stts_slowfast.hosts import find_blocks

logger = logging.getLogger(__name__)

# The parameters by which attention is known to have relative positions.
_TABLES = ("rel_pos_t", "rel_pos_h", "rel_pos_w", "relative_position_bias_table")


def fuse_model(model: nn.Module, fuse: bool, true_distances: bool) -> int:
    """Gives a model's attention what a node asks for, in place; calling it again starts afresh.

    Modules are replaced by views of them. Parameters and buffers stay the same objects under the
    same names. What cannot be computed by other means exactly (pooling before the projection,
    unshared convolutions, norms other than LayerNorm), or turns out to differ, stays stock. With
    either value of ``fuse`` the model's numbers are the same.

    Args:
        model: with its selectors in place, which hand ``Grid``s to its blocks.
        fuse: ``STTS.FUSED_ATTENTION``: faster attention and blocks, wherever their parts have no
            hooks and were not wrapped or replaced.
        true_distances: ``STTS.TRUE_DISTANCES``: after a selection, relative positions are those
            between the tokens that are left; False stretches the tables over what is left, as the
            stock modules do for any smaller input.

    Returns:
        How many attention modules were fused with ``fuse``; without, how many were replaced.
    """
    unfuse_model(model)
    request = FuseOptions(fuse, true_distances, _cropped(model), _readers(model))
    problems = {}
    for kinds in (SUBMODULES, BLOCKS):
        for parent, name, child in _children(model):
            kind = next((kind for kind in kinds if kind.matches(child, parent, name)), None)
            view = kind and kind.build(child, request)
            if view is None:
                continue
            problem = verify_equivalence(view)
            if problem:
                problems.setdefault(type(child).__name__, problem)
            else:
                parent._modules[name] = view
    for name, problem in problems.items():
        logger.warning(f"{name} stays as it is, for what would replace it differs: {problem}")
    strange = _strange_positions(model) - problems.keys()
    if true_distances and strange and hasattr(model, "stts"):
        names = ", ".join(sorted(strange))
        logger.warning(f"STTS.TRUE_DISTANCES is True, but is not for {names}, which is unknown")
    views = [module for module in model.modules() if isinstance(module, AttentionReplacement)]
    return sum(view.fuse for view in views) if fuse else len(views)


def unfuse_model(model: nn.Module) -> None:
    """Puts the stock modules back, the very objects that ``configure`` replaced."""
    for parent, name, child in _children(model):
        if isinstance(child, Replacement):
            parent._modules[name] = child.original


def has_attention(model: nn.Module) -> bool:
    """Whether some attention is of a kind that can be fused where nobody changed its parts."""
    kinds = [kind for kind in SUBMODULES if issubclass(kind, AttentionReplacement)]
    return any(
        isinstance(child, AttentionReplacement) or kind.matches(child, parent, name)
        for parent, name, child in _children(model)
        for kind in kinds
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
    first = min((int(number) for kind, number in keys if kind == "space"), default=None)
    blocks = [] if first is None else find_blocks(model)[first:]
    return {module for block in blocks for module in block.modules()}


def _readers(model: nn.Module) -> dict[nn.Module, tuple[nn.Module, nn.Module]]:
    found = [(module, reader(module)) for module in model.modules() for reader in FINAL_NORMS]
    return {find_blocks(module)[-1]: (module, norm) for module, norm in found if norm is not None}


def _strange_positions(model: nn.Module) -> set[str]:
    """The classes in a model that have relative positions, and that no view knows."""
    return {
        type(module).__name__
        for module in model.modules()
        if any(module._parameters.get(name) is not None for name in _TABLES)
        and not isinstance(module, Replacement)
        and not any(kind.matches(module, module, "") for kind in SUBMODULES)
    }
