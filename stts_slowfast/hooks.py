"""Puts selectors before a model's blocks, and takes them off: the one file that knows hooks."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from stts_slowfast import fused
from stts_slowfast.config import Settings, as_arguments
from stts_slowfast.hosts import Host, Tokens, find, hosted, modules_with_selectors, unwrap
from stts_slowfast.selectors import Selector, Selectors, SpatialSelector, TemporalSelector

logger = logging.getLogger(__name__)


def select(selector: Selector, tokens: Tokens) -> Tokens:
    """The tokens that a selector keeps, with the grid that says where they come from."""
    choice = selector.choose(tokens.grid)
    grid = selector.take(selector.teach(tokens.grid, choice), choice)
    if selector.dimension == "SPACE":
        thw = tokens.thw.crop(choice.kept, tuple(grid.shape[2:4]))
        return tokens._replace(grid=grid, thw=thw)
    frames = None if tokens.frames is None else selector.take(tokens.frames, choice)
    thw = tokens.thw.keep_frames(choice.kept)
    return tokens._replace(grid=grid, thw=thw, frames=frames)


# Hooks are objects instead of closures, so that a model with selectors can be copied and pickled: a
# copied hook holds the copied selectors.


class BeforeBlock:
    """Forward pre-hook that hands a block the tokens which its selectors keep."""

    def __init__(self, host: Host, model: nn.Module, number: int, behind: bool):
        self.host, self.model, self.number = host, model, number
        self.behind = behind  # a selection, so that a grid must have travelled here

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.behind and self.host.arrived(args, kwargs) is None:
            raise ValueError(
                f"the tokens that arrive at this {type(block).__name__} do not say where they lie, "
                "though some were dropped before: something between two blocks made new tensors "
                "(checkpointing with use_reentrant=True around whole blocks does)"
            )
        tokens = self.host.read(args, kwargs)
        selectors = getattr(block, "stts_replicas", None)
        # Asked of the model, where peft may have put a copy that it trains (modules_to_save).
        for selector in (
            selectors_before(self.model, self.number) if selectors is None else selectors
        ):
            tokens = select(selector, tokens)
        self.host.tell(block, tokens.thw)
        return self.host.write(tokens, args, kwargs)


class AfterBlock:
    """Forward hook that puts the grid which arrived at a block on what the block returns."""

    def __init__(self, host: Host):
        self.host = host

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict, output):
        thw = self.host.arrived(args, kwargs)
        return None if thw is None else self.host.hand_on(output, thw)


class ShareReplicas:
    """Forward pre-hook on the model: tells a replica's blocks of the replica's selectors.

    ``nn.DataParallel`` copies modules anew for every forward pass, but not the hooks on them.
    """

    def __init__(self, host: Host):
        self.host = host

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if not getattr(model, "_is_replica", False):
            return
        for number, block in enumerate(self.host.blocks(hosted(model))):
            block.stts_replicas = selectors_before(model, number)


HOOKS = (BeforeBlock, AfterBlock, ShareReplicas)


def selectors_before(model: nn.Module, number: int) -> tuple[Selector, ...]:
    """The selectors in front of a block, in the order in which they run."""
    return tuple(selector for selector in model.stts.values() if selector.block == number)


def attach(
    model: nn.Module,
    node=None,
    grids: Sequence[tuple[int, int, int]] | None = None,
    *,
    time: Mapping[int, float] | None = None,
    space: Mapping[int, float] | None = None,
    **keywords,
) -> nn.Module:
    """Does all that an STTS node, or the same in plain arguments, asks for.

    Selectors, which live in ``model.stts``, then fused modules and true distances. It works on
    every model in which ``hosts.find`` finds blocks. Do it before the optimizer and DDP are made,
    since selectors bring parameters. ``node.ENABLE`` is not looked at.

    Args:
        model: the model, changed in place.
        node: ``cfg.STTS``; leave it out to give plain arguments.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection, where
            known (``backbones.block_grids(cfg)``): shares that leave nothing are then found now
            instead of in the first forward pass, and each selector is logged with its grids.
        time: share of frames that goes on, by the block before which they are selected:
            ``{0: 0.9}``; or a range to draw from in training, ``{0: (0.25, 0.9)}``.
        space: share of a frame's tokens that goes on, likewise: ``{4: 0.9}``.
        **keywords: the node's other keys in small letters, with its defaults: ``time_scorer``,
            ``space_scorer``, ``space_stride``, ``space_shared``, ``teacher``, ``sigma``,
            ``shrink``, ``fused_attention`` and so on (``config.Settings``). ``backbone_lr`` and
            ``freeze_backbone_epochs`` are for training loops that call ``schedule.step``, as
            those of both engines and ``SelectionCallback`` do.

    Returns:
        The same model. ``model.stts`` is read as a dict is, with keys such as ``time_0`` and
        ``space_4``, in the order in which they run; ``model.stts.settings`` what was asked for.

    Raises:
        ValueError: if the model, or a module in it, has selectors already; if it has no blocks that
            can be selected before; or if what is asked for is not valid for it.
        TypeError: for arguments beside a node, none at all, or one of an unknown name.
    """
    for path, module in modules_with_selectors(model).items():
        inside = f" in its {path}" if path else ""
        raise ValueError(
            f"this {type(model).__name__} has selectors already{inside} "
            f"({', '.join(module.stts)}): call detach(model) first"
        )
    host, blocks = find(model)
    settings, steps = _settings(node, len(blocks), grids, time=time, space=space, **keywords)
    stts = _make_selectors(host, blocks, settings, model.training)
    # Only now, when nothing can fail any more: an error leaves the model as it was.
    model.stts = stts
    _register(model, host, blocks, stts)
    for key, selector in stts.items():
        scorer = getattr(settings, f"{selector.dimension.lower()}_scorer")
        logger.info(_describe(key, selector, scorer, steps.get(key)))
    try:
        count = fused.configure(model, settings.fused_attention, settings.true_distances)
    except Exception:
        _remove(model, host, blocks)
        raise
    if settings.fused_attention and not count and fused.has_attention(model):
        logger.warning(
            "STTS.FUSED_ATTENTION is True, but nothing in this %s could be fused: it runs as it is",
            type(model).__name__,
        )
    return model


def _settings(node, num_blocks: int, grids, **arguments) -> tuple[Settings, dict]:
    """What was asked for, checked, and its plan."""
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if node is not None:
        if arguments:
            raise TypeError(f"give a node, or {', '.join(arguments)}, not both")
        settings = Settings.of_node(node)
        return settings, settings.check(num_blocks, grids)
    if "time" not in arguments and "space" not in arguments:
        raise TypeError("give a node, or what to select: attach(model, time={0: 0.9})")
    try:
        settings = Settings.of_arguments(**arguments)
        return settings, settings.check(num_blocks, grids)
    except ValueError as error:
        raise ValueError(as_arguments(str(error))) from None


def _make_selectors(
    host: Host, blocks: Sequence[nn.Module], settings: Settings, training: bool
) -> Selectors:
    stts = Selectors(settings)
    operator = {
        "teacher": settings.teacher,
        "sigma": settings.sigma,
        "sigma_decay": settings.sigma_decay,
        "shrink": settings.shrink,
        "num_samples": settings.num_samples,
        "gradient": settings.gradient,
        "operator": settings.operator,
    }
    window = {"stride": settings.space_stride, "shared": settings.space_shared}
    for number, block in enumerate(blocks):
        for kind, shares, scorer, more in (
            (TemporalSelector, settings.time, settings.time_scorer, {}),
            (SpatialSelector, settings.space, settings.space_scorer, window),
        ):
            if number in shares:
                selector = kind(
                    host.channels(block), number, shares[number], scorer, **more, **operator
                )
                parameter = next(block.parameters())
                selector.to(parameter.device, parameter.dtype).train(training)
                stts[selector.key] = selector
    return stts


def _register(model: nn.Module, host: Host, blocks: Sequence[nn.Module], stts: Selectors) -> None:
    host.prepare(blocks)
    travels = type(host).hand_on is not Host.hand_on
    first = min((selector.block for selector in stts.values()), default=len(blocks))
    for number, block in enumerate(blocks):
        if selectors_before(model, number) or (number > first and host.tells_every_block):
            before = BeforeBlock(host, model, number, behind=travels and number > first)
            block.register_forward_pre_hook(before, with_kwargs=True)
        # Nothing of ours comes behind the last block.
        if travels and first <= number < len(blocks) - 1:
            block.register_forward_hook(AfterBlock(host), with_kwargs=True)
    model.register_forward_pre_hook(ShareReplicas(host))


def _remove(model: nn.Module, host: Host, blocks: Sequence[nn.Module]) -> None:
    host.restore(blocks)
    for module in (model, *blocks):
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind)
            for hook_id, hook in list(hooks.items()):
                if isinstance(hook, HOOKS):
                    del hooks[hook_id]
                    getattr(module, f"{kind}_with_kwargs").pop(hook_id, None)
    del model.stts


def detach(model: nn.Module) -> nn.Module:
    """Takes off again what ``attach`` did: the model has its own modules and computes as before.

    Raises:
        ValueError: where the model has no selectors.
    """
    model = unwrap(model)
    _selectors(model)
    fused.restore(model)
    _remove(model, *find(model))
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
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "replicas of nn.DataParallel forget what they kept: run model.module alone"
        )
    kept = {key: selector.kept for key, selector in _selectors(unwrap(model)).items()}
    missing = [key for key, value in kept.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} has selected nothing yet: run the model first")
    return kept


def settings_of(model: nn.Module) -> Settings:
    """What ``attach`` was asked for.

    Raises:
        ValueError: where the model has no selectors.
    """
    return _selectors(unwrap(model)).settings


def raise_on_nan(model: nn.Module) -> None:
    """Raises where a selector had NaN scores in a forward pass since the last call.

    On a device they do not stop the forward pass, and asking waits for the device: call it where
    the host waits anyway, after the loss was read, say. Without it the first forward pass that
    can know raises.

    Args:
        model: with selectors, wrapped (DDP) or not; a model without has none to ask.

    Raises:
        ValueError: naming the selector.
    """
    for module in model.modules():
        if isinstance(module, Selector):
            module.raise_on_nan()


def _selectors(model: nn.Module) -> Selectors:
    stts = getattr(model, "stts", None)
    if not hasattr(stts, "settings"):
        raise ValueError(f"this {type(model).__name__} has no selectors: call attach(model, node)")
    return stts


def _describe(key: str, selector: Selector, scorer: str, step) -> str:
    what = "frames" if selector.dimension == "TIME" else "window"
    text = f"STTS {key}: {scorer} {what} before block {selector.block}, keep {selector.share_text}"
    if step is None:
        return text
    (before, after) = ("x".join(map(str, grid)) for grid in step)
    count = [grid[0] * grid[1] * grid[2] for grid in step]
    return f"{text}, {before} -> {after}, {count[0]} -> {count[1]} tokens"
