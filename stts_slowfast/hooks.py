"""Puts selectors before a model's blocks, and takes them off: the one file that knows hooks."""

import logging
from collections.abc import Sequence

from torch import Tensor, nn

from stts_slowfast.config import plan, validate_stts
from stts_slowfast.hosts import find_blocks, input_channels, select
from stts_slowfast.selectors import Selector, SpatialSelector, TemporalSelector

logger = logging.getLogger(__name__)


class SelectTokens:
    """Forward pre-hook that hands a block the tokens which its selector keeps.

    An object instead of a closure, so that a model with selectors can be copied and pickled: a
    copied hook holds the copied selector.
    """

    def __init__(self, selector: Selector):
        self.selector = selector

    def __call__(self, block: nn.Module, args: tuple) -> tuple:
        x, *rest = args
        thw, *rest = rest or (None,)
        x, thw = select(self.selector, x, thw)
        return (x,) if thw is None else (x, thw, *rest)


def attach(
    model: nn.Module, node, grids: Sequence[tuple[int, int, int]] | None = None
) -> nn.Module:
    """Adds the selectors that an STTS node asks for; they live in ``model.stts``.

    Works on every model whose blocks ``backbones.layout.find_blocks`` finds. Do it before the
    optimizer and DDP are made, since selectors bring parameters. ``node.ENABLE`` is not looked at.

    Args:
        model: the model, changed in place.
        node: ``cfg.STTS``.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection, where
            known (``backbones.block_grids(cfg)``): shares that leave nothing are then found now
            instead of in the first forward pass, and each selector is logged with its grids.

    Returns:
        The same model. ``model.stts`` is an ``nn.ModuleDict`` with keys such as ``time_0`` and
        ``space_4``, in the order in which they run.

    Raises:
        ValueError: where the model has selectors already, has no blocks that can be selected
            before, or the node is not valid for it.
    """
    if isinstance(getattr(model, "stts", None), nn.ModuleDict):
        raise ValueError(
            f"this {type(model).__name__} has selectors already ({', '.join(model.stts)}): "
            "call detach(model) first"
        )
    blocks = find_blocks(model)
    validate_stts(node, len(blocks), grids)
    steps = plan(node, grids) if grids is not None else {}
    stts = nn.ModuleDict()
    for number, block in enumerate(blocks):
        for kind in (TemporalSelector, SpatialSelector):
            dimension = node[kind.dimension]
            if number not in dimension.BLOCKS:
                continue
            keep = float(dimension.KEEP[list(dimension.BLOCKS).index(number)])
            selector = kind(input_channels(block), number, keep, node)
            parameter = next(block.parameters())
            selector.to(parameter.device, parameter.dtype).train(model.training)
            stts[f"{kind.dimension.lower()}_{number}"] = selector
    # Only now, when nothing can fail any more: an error leaves the model as it was.
    for key, selector in stts.items():
        blocks[selector.block].register_forward_pre_hook(SelectTokens(selector))
        scorer = node[selector.dimension].SCORER
        logger.info(_describe(key, selector, scorer, steps.get(key)))
    model.stts = stts
    return model


def detach(model: nn.Module) -> nn.Module:
    """Takes the selectors off again; the model computes what it did before ``attach``.

    Raises:
        ValueError: where the model has no selectors.
    """
    model = _unwrap(model)
    for selector in _selectors(model).values():
        selector.kept = None  # fused attention asks for it; now everything arrives
    for block in find_blocks(model):
        for hook_id, hook in list(block._forward_pre_hooks.items()):
            if isinstance(hook, SelectTokens):
                del block._forward_pre_hooks[hook_id]
    del model.stts
    return model


def selections(model: nn.Module) -> dict[str, Tensor]:
    """What the last forward pass kept.

    Returns:
        ``{"time_0": LongTensor (B, k), "space_4": LongTensor (B*T, 4)}``: frame indices among the
        frames that arrived at the selector, ascending; top, left, height and width of each frame's
        window, in tokens of the grid that arrived. In training, what the scores without noise keep.

    Raises:
        ValueError: where the model has no selectors, or has not run since they were attached.
    """
    kept = {key: selector.kept for key, selector in _selectors(_unwrap(model)).items()}
    missing = [key for key, value in kept.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} has selected nothing yet: run the model first")
    return kept


def _selectors(model: nn.Module) -> nn.ModuleDict:
    stts = getattr(model, "stts", None)
    if not isinstance(stts, nn.ModuleDict):
        raise ValueError(f"this {type(model).__name__} has no selectors: call attach(model, node)")
    return stts


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``."""
    while not hasattr(model, "stts"):
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _describe(key: str, selector: Selector, scorer: str, step) -> str:
    what = "frames" if selector.dimension == "TIME" else "window"
    text = f"STTS {key}: {scorer} {what} before block {selector.block}, keep {selector.keep:g}"
    if step is None:
        return text
    (before, after) = ("x".join(map(str, grid)) for grid in step)
    count = [grid[0] * grid[1] * grid[2] for grid in step]
    return f"{text}, {before} -> {after}, {count[0]} -> {count[1]} tokens"
