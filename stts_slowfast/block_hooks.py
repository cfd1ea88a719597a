"""The hooks that run a model's selectors; ``hooks.py`` registers them."""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from stts_slowfast import fx_tracing
from stts_slowfast.call_context import CallGrid, Calls, first_tensor, in_backward
from stts_slowfast.fx_tracing import tracer_of
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import Args, Host, Kwargs, Tokens, base_model
from stts_slowfast.selectors import Selector, Selectors
from stts_slowfast.token_selector import TokenSelector


def select(selector: Selector, tokens: Tokens, block: nn.Module) -> Tokens:
    """The tokens that a selector keeps before a block, with their grid."""
    if isinstance(selector, TokenSelector):
        cls = tokens.cls if tokens.frame_cls is None else tokens.frame_cls
        selection = selector.select(tokens.grid, block, cls)
    else:
        selection = selector.select(tokens.grid)
    grid = selector.apply_selection(selector.teach(tokens.grid, selection), selection)
    if selector.dimension == "TOKENS":
        if grid.shape == tokens.grid.shape:
            return tokens._replace(grid=grid, thw=tokens.thw.keep_all(selection.kept))
        thw = tokens.thw.keep_tokens(selection.kept, grid.shape[1])
        return tokens._replace(grid=grid, thw=thw)
    if selector.dimension == "SPACE":
        thw = tokens.thw.crop(selection.kept, (grid.shape[2], grid.shape[3]))
        return tokens._replace(grid=grid, thw=thw)
    cls = tokens.frame_cls
    cls = None if cls is None else selector.apply_selection(cls, selection)
    thw = tokens.thw.keep_frames(selection.kept)
    return tokens._replace(grid=grid, thw=thw, frame_cls=cls)


# Hooks are objects instead of closures, so that a model with selectors can be copied and pickled: a
# copied hook has the copied selectors.


class Hook:
    """Base of our hooks on modules.

    Args:
        host: of the model.
        model: with selectors. They are read from it in each call: peft may have replaced them by a
            copy, which it trains (``modules_to_save``).
    """

    def __init__(self, host: Host, model: nn.Module):
        self.host, self.model = host, model

    def __deepcopy__(self, memo: dict[Any, Any]) -> "Hook":
        # The model is copied with its hooks, but not if only a block or the selectors are copied.
        # A wrapper may copy blocks before the model, so their hooks wait for the model's.
        hook = copy.copy(self)
        waiting = memo.setdefault((Hook, id(self.model)), [])
        waiting.append(hook)
        if (copied := memo.get(id(self.model))) is not None:
            while waiting:
                waiting.pop().model = copied
        return hook

    def selectors(self, module: nn.Module) -> Selectors:
        """The selectors in the call of a module, which in a traced graph are the module itself."""
        if isinstance(module, Selectors):
            return module
        model: Any = self.model
        return model.stts

    def calls(self, module: nn.Module) -> Calls:
        """The calls of a model whose grids travel in the context of its call."""
        calls = self.selectors(module).calls
        assert calls is not None
        return calls

    @property
    def __name__(self) -> str:
        # torch.jit.script reads it, and then the hook's source, which it could not compile.
        raise AttributeError(
            "a model with selectors cannot be compiled by torch.jit.script: use torch.compile, "
            "torch.export or torch.jit.trace, or detach(model) first"
        )


class OpenCallHook(Hook):
    """Forward pre-hook on the model: a call begins."""

    def __call__(self, model: nn.Module, args: Args) -> None:
        self.calls(model).open()


class CloseCallHook(Hook):
    """Forward hook on the model, called also after an error: a call has ended."""

    def __call__(self, model: nn.Module, args: Args, output: Any) -> None:
        self.calls(model).close()


class EnterClipHook(Hook):
    """Forward pre-hook on the module by which a clip enters: reads the clip's grid."""

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        if tracer := tracer_of(args, kwargs):
            return _traced(tracer, _enter, self.selectors(module), args, kwargs)
        self.calls(module).start(self.host.call_grid(base_model(self.model), args, kwargs))
        return None


class SelectTokensHook(Hook):
    """Forward pre-hook that replaces a block's tokens by those that its selectors keep.

    Args:
        host, model: see :class:`Hook`.
        number: of the block.
        after_selection: whether selectors are in front of an earlier block.
        last: whether it is the last block.
    """

    def __init__(
        self, host: Host, model: nn.Module, number: int, after_selection: bool, last: bool
    ):
        super().__init__(host, model)
        self.number, self.after_selection, self.last = number, after_selection, last

    def __call__(self, block: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        stts = self.selectors(block)
        if tracer := tracer_of(args, kwargs):
            if any(hasattr(s.scorer, "bind") for s in selectors_before(stts, self.number)):
                raise ValueError(
                    "the scorer of tokens reads weights of its block, which a graph of torch.fx "
                    "does not have: give another STTS.TOKENS.SCORER (tokens_scorer) to trace"
                )
            return _traced(tracer, _select, stts, args, kwargs, self.number)
        thw = self._incoming_grid(stts, block, args, kwargs)
        selectors = getattr(block, "stts_replicas", None)
        if selectors is None:
            selectors = selectors_before(stts, self.number)
        if selectors:
            if stts.frozen and not torch.is_grad_enabled():
                _refuse_reentrant(self.number, block, first_tensor(args, kwargs))
            args, kwargs = _on_device_of(selectors, args, kwargs)
        if thw is not None:
            device = first_tensor(args, kwargs).device
            thw = [grid.to(device) for grid in thw] if isinstance(thw, list) else thw.to(device)
        if selectors:
            tokens = self.host.unpack(args, kwargs, thw)
            if isinstance(tokens, list):
                tokens = _select_packed(selectors, tokens, block)
                thw = [clip.thw for clip in tokens]
            else:
                for selector in selectors:
                    tokens = select(selector, tokens, block)
                thw = tokens.thw
            args, kwargs = self.host.pack(tokens, args, kwargs)
        if stts.calls is not None:
            stts.calls.advance(self.number, thw, self.last)
        record_grid(stts, thw)
        return self.host.adapt_call(block, thw, args, kwargs)

    def _incoming_grid(
        self, stts: Selectors, block: nn.Module, args: Args, kwargs: Kwargs
    ) -> CallGrid:
        """The grid of the tokens that arrive; see :class:`Host` for the two ways it travels."""
        if stts.calls is not None:
            x = first_tensor(args, kwargs)
            thw = stts.calls.arrive(self.number, block, x, self.after_selection)
            thw = self.host.default_grid() if thw is None else thw
            return self.host.incoming_grid(args, kwargs, thw)
        thw = self.host.incoming_grid(args, kwargs, None)
        if self.after_selection and not (isinstance(thw, Grid) and thw.is_selected):
            raise ValueError(
                f"tokens reached block {self.number} ({type(block).__name__}) without their grid "
                "after a selection: code between two blocks made new tensors; pass on the thw that "
                "the block before returned, and with checkpointing use_reentrant=False"
            )
        return thw


def _refuse_reentrant(number: int, block: nn.Module, tokens: Tensor) -> None:
    """Raises ``ValueError`` if scorers would learn nothing: reentrant checkpointing gives nothing
    a gradient to whose inputs none require it, as before the first selector of a frozen backbone.
    """
    frame = None if tokens.requires_grad or in_backward() else sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    if frame is not None:
        raise ValueError(
            f"block {number} ({type(block).__name__}) is checkpointed with use_reentrant=True, and "
            "the backbone is frozen: scorers would learn nothing; set use_reentrant=False"
        )


def _select_packed(
    selectors: Sequence[Selector], clips: list[Tokens], block: nn.Module
) -> list[Tokens]:
    """The tokens of several clips; ``selector.kept`` is then a list with an entry per clip."""
    for selector in selectors:
        kept: Any = []
        for i, clip in enumerate(clips):
            clips[i] = select(selector, clip, block)
            kept.append(selector.kept)
        selector.kept = kept
    return clips


def _on_device_of(selectors: Sequence[Selector], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    """The arguments of a block's call, on the device of its selectors.

    In a model over several devices, accelerate moves them only when the block's forward begins.
    """
    weights = next((p for selector in selectors for p in selector.parameters()), None)
    device = first_tensor(args, kwargs).device
    if weights is None or weights.device == device:
        return args, kwargs
    moved: tuple[Args, Kwargs] = tree_map_only(
        Tensor, lambda x: x.to(weights.device), (args, kwargs)
    )
    return moved


class PropagateGridHook(Hook):
    """Forward hook that attaches the grid which arrived at a block to its output."""

    def __init__(self, host: Host, model: nn.Module, last: bool):
        super().__init__(host, model)
        self.last = last

    def __call__(
        self,
        block: nn.Module,
        args: Args,
        kwargs: Kwargs,
        output: Any,
        pooling: bool | None = None,
    ) -> Any:
        stts = self.selectors(block)
        pooling = pools(block) if pooling is None else pooling
        if tracer := tracer_of(args, kwargs):
            if self.last:
                return None
            traced = fx_tracing.call(tracer, _propagate, stts, args, kwargs, output, pooling)
            thw, x = traced[1], traced[0]  # tokens last: features of a block are its last node
            return x, thw
        thw = self.host.incoming_grid(args, kwargs, None)
        if not isinstance(thw, Grid):
            return None
        if pooling:
            thw = thw.pooled_by_unknown()
        marked = self.host.set_block_grid(output, thw)
        is_pair = isinstance(marked, tuple)
        record_grid(stts, self.host.incoming_grid(marked, {}, None) if is_pair else thw)
        return None if self.last else marked  # after the last block nobody reads a grid


def pools(block: nn.Module) -> bool:
    """Whether a block pools its tokens in space."""
    pool = getattr(block, "pool_skip", None)  # as all MViTs call it
    strides = [getattr(m, "stride", 1) for m in pool.modules()] if pool is not None else []
    return any(isinstance(stride, (tuple, list)) and max(stride[1:]) > 1 for stride in strides)


# In a graph traced by torch.fx a node replaces each hook, and calls the hook of the graph's own
# selectors.


def _traced(
    tracer: fx.Tracer,
    function: Callable[..., Any],
    stts: Selectors,
    args: Args,
    kwargs: Kwargs,
    *more: Any,
) -> tuple[Args, Kwargs]:
    traced = fx_tracing.call(tracer, function, stts, args, kwargs, *more)
    args = tuple(traced[0][i] for i in range(len(args)))
    return args, {name: traced[1][name] for name in kwargs}


def _enter(stts: Selectors, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
    stts.hooks["entry"](stts, args, kwargs)
    return args, kwargs


def _select(stts: Selectors, args: Args, kwargs: Kwargs, number: int) -> tuple[Args, Kwargs]:
    changed: tuple[Args, Kwargs] = stts.hooks[number](stts, args, kwargs)
    return changed


def _propagate(stts: Selectors, args: Args, kwargs: Kwargs, output: Any, pooling: bool) -> Any:
    return stts.hooks["grid"](stts, args, kwargs, output, pooling)


class DataParallelHook(Hook):
    """Forward pre-hook on the model: gives a replica's blocks the selectors of the replica.

    ``nn.DataParallel`` copies modules anew for every forward pass, but not the hooks on them.
    """

    def __call__(self, model: nn.Module, args: Args) -> None:
        if not getattr(model, "_is_replica", False):
            return
        replica: Any = model
        for number, block in enumerate(self.host.blocks(base_model(model))):
            selectors: Any = selectors_before(replica.stts, number)
            block.stts_replicas = selectors


def selectors_before(stts: Selectors, number: int) -> tuple[Selector, ...]:
    """The selectors in front of a block, in the order in which they run."""
    return tuple(selector for selector in stts.values() if selector.block == number)


def record_grid(stts: Selectors, thw: CallGrid) -> None:
    """Records the grid of the last pass, as far as it came, for ``dense_features.positions``."""
    grids = thw if isinstance(thw, list) else [] if thw is None else [thw]
    if any(grid.is_selected for grid in grids) and not in_backward():
        parts = [(tuple(g), g.frames, g.windows, g.tokens, g.whole) for g in grids]
        stts.reached = parts if isinstance(thw, list) else parts[0]
