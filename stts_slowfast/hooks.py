"""Attaches selectors to a model and detaches them; the one file that registers their hooks."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from stts_slowfast import fused
from stts_slowfast.block_hooks import (
    CloseCallHook,
    DataParallelHook,
    EnterClipHook,
    Hook,
    OpenCallHook,
    PropagateGridHook,
    SelectTokensHook,
    selectors_before,
)
from stts_slowfast.budgets import DIMENSIONS, Share, Sizes
from stts_slowfast.call_context import Calls
from stts_slowfast.config import Settings, rename_keys_in_message
from stts_slowfast.frozen_gradients import FrozenGradients
from stts_slowfast.hosts import Host, base_model, modules_with_selectors, resolve_host, unwrap
from stts_slowfast.selectors import Selector, Selectors, SpatialSelector, TemporalSelector
from stts_slowfast.token_selector import TokenSelector

logger = logging.getLogger(__name__)


def attach(
    model: nn.Module,
    node: CfgNode | None = None,
    grids: Sequence[Sizes] | None = None,
    *,
    time: Mapping[int, Share] | None = None,
    space: Mapping[int, Share] | None = None,
    tokens: Mapping[int, Share] | None = None,
    **keywords: Any,
) -> nn.Module:
    """Attaches selectors to a model, as an STTS node or plain arguments specify.

    It adds selectors (``model.stts``), fused modules and true distances, to any model that a
    registered host serves (``hosts.HOSTS``). Call it before the optimizer and DDP are made, since
    selectors have parameters. ``node.ENABLE`` is ignored.

    Args:
        model: the model, changed in place.
        node: ``cfg.STTS``; None with plain arguments.
        grids: the token grid ``(T, H, W)`` that arrives at each block without selection, if known
            (``backbones.block_grids(cfg)``): shares that keep nothing are then refused now
            instead of in the first forward pass, and each selector is logged with its grids.
        time: share of frames that is kept, by the block before which they are selected:
            ``{0: 0.9}``; or a range to sample in training, ``{0: (0.25, 0.9)}``.
        space: share of a frame's tokens that is kept as a window, likewise: ``{4: 0.9}``.
        tokens: share of the tokens that is kept, any of a clip, likewise: ``{4: 0.25}``; only in
            models without pooling, attention windows or attention over time at each position.
        **keywords: the node's other keys in small letters, with its defaults: ``time_scorer``,
            ``space_scorer``, ``space_stride``, ``space_shared``, ``tokens_scorer``,
            ``tokens_rest``, ``teacher``, ``shrink``, ``fused_attention`` and so on
            (``config.Settings``). ``backbone_lr`` and ``freeze_backbone_epochs`` need a training
            loop with a ``Schedule``, as both engines and ``SelectionCallback`` have.

    Returns:
        The same model. ``model.stts`` is read as a dict is, with keys such as ``time_0`` and
        ``space_4``, in the order in which they run; ``model.stts.settings`` has the settings.

    Raises:
        ValueError: if the model, or a module in it, has selectors already; if no host serves it; or
            if a setting is not valid for it.
        TypeError: for arguments beside a node, none at all, or one of an unknown name.
    """
    for path, module in modules_with_selectors(model).items():
        inside = f" in its {path}" if path else ""
        raise ValueError(
            f"this {type(model).__name__} has selectors already{inside} "
            f"({', '.join(selectors_of(module))}): call detach(model) first"
        )
    host, blocks = resolve_host(model)
    settings = _settings(node, time=time, space=space, tokens=tokens, **keywords)
    try:
        settings.validate(len(blocks))
        if settings.tokens:
            settings = _with_tokens_by_frame(settings, model, host, blocks)
        plan = settings.validate(len(blocks), grids)
    except ValueError as error:
        raise ValueError(str(error) if node else rename_keys_in_message(str(error))) from None
    stts = _make_selectors(host, blocks, settings, model.training)
    # The model changes only after everything that can fail: an error leaves it as it was.
    model.stts = stts
    _register(model, host, blocks, stts)
    for key, selector in stts.items():
        scorer = getattr(settings, f"{selector.dimension.lower()}_scorer")
        logger.info(_describe(key, selector, scorer, plan.get(key)))
    try:
        count = fused.fuse_model(model, settings.fused_attention, settings.true_distances)
    except Exception:
        _remove(model, host, blocks)
        raise
    if settings.fused_attention and not count and fused.has_attention(model):
        logger.warning(
            "STTS.FUSED_ATTENTION is True, but nothing in this %s could be fused: it runs unfused",
            type(model).__name__,
        )
    return model


def _settings(node: CfgNode | None, **arguments: Any) -> Settings:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if node is not None:
        if arguments:
            raise TypeError(f"give a node, or {', '.join(arguments)}, not both")
        return Settings.from_cfg(node)
    if not {"time", "space", "tokens"} & arguments.keys():
        raise TypeError("give a node, or what to select: attach(model, time={0: 0.9})")
    return Settings.from_kwargs(**arguments)


def _make_selectors(
    host: Host, blocks: Sequence[nn.Module], settings: Settings, training: bool
) -> Selectors:
    stts = Selectors(settings)
    shared: dict[str, Any] = {
        "teacher": settings.teacher,
        "sigma": settings.sigma,
        "sigma_decay": settings.sigma_decay,
        "shrink": settings.shrink,
        "num_samples": settings.num_samples,
        "gradient": settings.gradient,
        "operator": settings.operator,
    }
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "TIME": (TemporalSelector, {}),
        "SPACE": (
            SpatialSelector,
            {"stride": settings.space_stride, "shared": settings.space_shared},
        ),
        "TOKENS": (
            TokenSelector,
            {"per_frame": settings.tokens_per_frame, "rest": settings.tokens_rest},
        ),
    }
    for number, block in enumerate(blocks):
        for dimension in DIMENSIONS:
            if number not in settings.shares(dimension):
                continue
            kind, own = kinds[dimension]
            scorer = getattr(settings, f"{dimension.lower()}_scorer")
            share, width = settings.shares(dimension)[number], host.channels(block)
            selector: Selector = kind(width, number, share, scorer, **own, **shared)
            selector.to(*_device_and_dtype(block)).train(training)
            if hasattr(selector.scorer, "bind"):
                selector.scorer.bind(block)  # type: ignore[operator]
            stts[selector.key] = selector
    return stts


def _with_tokens_by_frame(
    settings: Settings, model: nn.Module, host: Host, blocks: Sequence[nn.Module]
) -> Settings:
    """The settings with ``tokens_per_frame`` if the model's blocks see each frame alone.

    Raises:
        ValueError: if the blocks need a grid.
    """
    try:
        by_frame = host.selects_tokens_by_frame(base_model(model), blocks)
    except ValueError as error:
        raise ValueError(
            f"STTS.TOKENS.BLOCKS is {sorted(settings.tokens)}, but single tokens of this "
            f"{type(model).__name__} cannot be selected: {error}; select windows (STTS.SPACE) and "
            "frames (STTS.TIME) instead"
        ) from None
    return replace(settings, tokens_per_frame=by_frame or settings.tokens_per_frame)


def _device_and_dtype(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the floating dtype in which a block computes.

    Its first parameter may have others: quantised ones are integers, offloaded ones are on ``meta``
    while accelerate's hook has their device.
    """
    parameters = list(block.parameters())
    floating = [p for p in parameters if p.is_floating_point() and p.element_size() > 1]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    hooks = [getattr(module, "_hf_hook", None) for module in block.modules()]
    planned = [getattr(hook, "execution_device", None) for hook in hooks]
    devices: list[Any] = [device for device in planned if device is not None]
    devices += [parameter.device for parameter in parameters]
    device = devices[0] if devices else "cpu"
    if isinstance(device, int):  # from accelerate's device map
        device = f"{torch.accelerator.current_accelerator()}:{device}"
    return torch.device(device), dtype


def _register(model: nn.Module, host: Host, blocks: Sequence[nn.Module], stts: Selectors) -> None:
    host.prepare(base_model(model), blocks)
    first = min((selector.block for selector in stts.values()), default=len(blocks))
    # Whether grids travel in the blocks' calls, or in the context of the model's call.
    in_call = type(host).set_block_grid is not Host.set_block_grid
    if not in_call:
        stts.calls = Calls()
        model.register_forward_pre_hook(OpenCallHook(host, model), prepend=True)
        model.register_forward_hook(CloseCallHook(host, model), always_call=True)
        entry = host.entry(base_model(model))
        stts.hooks["entry"] = EnterClipHook(host, model)
        entry.register_forward_pre_hook(stts.hooks["entry"], with_kwargs=True)
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1
        if not in_call or selectors_before(stts, number):
            stts.hooks[number] = SelectTokensHook(
                host, model, number, after_selection=number > first, last=last
            )
            block.register_forward_pre_hook(stts.hooks[number], with_kwargs=True)
        if in_call and number >= first:
            hook = PropagateGridHook(host, model, last=last)
            stts.hooks.setdefault("grid", hook)
            block.register_forward_hook(hook, with_kwargs=True)
    model.register_forward_pre_hook(DataParallelHook(host, model))


def _remove(model: nn.Module, host: Host, blocks: Sequence[nn.Module]) -> None:
    host.restore(base_model(model), blocks)
    for module in {model, host.entry(base_model(model)), *blocks}:
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = getattr(module, kind)
            for hook_id, hook in list(hooks.items()):
                if isinstance(hook, Hook):
                    del hooks[hook_id]
                    getattr(module, f"{kind}_with_kwargs").pop(hook_id, None)
                    module._forward_hooks_always_called.pop(hook_id, None)
    del model.stts


def detach(model: nn.Module) -> nn.Module:
    """Undoes :func:`attach`: the model has its own modules and computes as before.

    Raises:
        ValueError: if the model has no selectors.
    """
    model = unwrap(model)
    selectors_of(model)
    gradients = FrozenGradients(model)
    fused.unfuse_model(model)
    _remove(model, *resolve_host(model))
    gradients.turn_off([])  # without selectors, whose gradients DDP shall not wait for
    return model


def selections(model: nn.Module) -> dict[str, Tensor]:
    """What the last forward pass kept.

    Returns:
        ``{"time_0": LongTensor (B, k), "space_4": LongTensor (B*T, 4), "tokens_4": LongTensor
        (B, n)}``: frame indices among the frames that arrived at the selector, ascending; top,
        left, height and width of each frame's window, in tokens of the grid that arrived; flat
        indices of tokens among those that arrived, ascending. In training, what the scores without
        noise keep.
        For clips packed into one sequence, a list of such tensors, one per clip.

    Raises:
        ValueError: if the model has no selectors, or has not run since they were attached.
    """
    refuse_replicas(model)
    found = {key: selector.kept for key, selector in selectors_of(unwrap(model)).items()}
    kept = {key: value for key, value in found.items() if value is not None}
    if missing := found.keys() - kept.keys():
        raise ValueError(f"{', '.join(missing)} has selected nothing yet: run the model first")
    return kept


def refuse_replicas(model: nn.Module) -> None:
    """Raises ``ValueError`` for ``nn.DataParallel``, whose replicas do not return selections."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            "replicas of nn.DataParallel do not return what they kept: run model.module instead"
        )


def settings_of(model: nn.Module) -> Settings:
    """The settings of a model's selectors.

    Raises:
        ValueError: if the model has no selectors.
    """
    return selectors_of(unwrap(model)).settings


def nan_flag(model: nn.Module) -> Tensor | None:
    """Whether :func:`raise_on_nan` would raise, as a 0-dim bool on the device; does not wait for
    the device.

    Args:
        model: with selectors, wrapped (DDP) or not; None for a model without.
    """
    flags = [selector.nan_flag for selector in all_selectors(model)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any() if flags else None


def raise_on_nan(model: nn.Module, wait: bool = True) -> None:
    """Raises if a selector had NaN scores in a forward pass since the last call.

    On a device NaN scores do not stop the forward pass, and reading their flag waits for the
    device: call it when the host waits anyway, as after the loss was read. Without it, a later
    forward pass raises as soon as the flag has reached the host.

    Args:
        model: with selectors, wrapped (DDP) or not; a model without has none to check.
        wait: for a device. If False, raises only for what had finished by the previous call.

    Raises:
        ValueError: naming the selector.
    """
    # One number to wait for, however many selectors there are.
    if wait and not nan_flag(model):
        return
    for selector in all_selectors(model):
        selector.raise_on_nan(wait)


def all_selectors(model: nn.Module) -> list[Selector]:
    """Every selector anywhere in a model, wrapped or not; none in a model without."""
    return [module for module in model.modules() if isinstance(module, Selector)]


def selectors_of(model: nn.Module) -> Selectors:
    """The selectors that are attached to a module itself.

    Raises:
        ValueError: if it has none.
    """
    stts: Any = getattr(model, "stts", None)
    if not hasattr(stts, "settings"):
        raise ValueError(f"this {type(model).__name__} has no selectors: call attach(model, node)")
    selectors: Selectors = stts  # or a wrapper of peft around them
    return selectors


def _describe(key: str, selector: Selector, scorer: str, step: tuple[Sizes, Sizes] | None) -> str:
    unit = {"TIME": "frames", "SPACE": "window", "TOKENS": "tokens"}[selector.dimension]
    text = f"STTS {key}: {scorer} {unit} before block {selector.block}, keep {selector.share_text}"
    text += ", merge the rest" if getattr(selector, "rest", "drop") == "merge" else ""
    if step is None:
        return text
    (before, after) = ("x".join(map(str, grid)) for grid in step)
    count = [grid[0] * grid[1] * grid[2] for grid in step]
    return f"{text}, {before} -> {after}, {count[0]} -> {count[1]} tokens"
