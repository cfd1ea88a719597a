"""The hooks on a model's modules by which its selectors run; ``hooks.py`` puts them there."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from stts_slowfast import fx_tracing
from stts_slowfast.call_context import first_tensor, in_backward
from stts_slowfast.fx_tracing import tracer_of
from stts_slowfast.grid import Grid
from stts_slowfast.hosts import Host, Tokens, base_model
from stts_slowfast.selectors import Selector, Selectors


def select(selector: Selector, tokens: Tokens) -> Tokens:
    """The tokens that a selector keeps, with the grid that says where they come from."""
    choice = selector.select(tokens.grid)
    grid = selector.apply_selection(selector.teach(tokens.grid, choice), choice)
    if selector.dimension == "SPACE":
        thw = tokens.thw.crop(choice.kept, tuple(grid.shape[2:4]))
        return tokens._replace(grid=grid, thw=thw)
    frames = None if tokens.frames is None else selector.apply_selection(tokens.frames, choice)
    thw = tokens.thw.keep_frames(choice.kept)
    return tokens._replace(grid=grid, thw=thw, frames=frames)


# Hooks are objects instead of closures, so that a model with selectors can be copied and pickled: a
# copied hook holds the copied selectors.


class Hook:
    """What all of our hooks on modules are.

    Args:
        host: of the model.
        model: that selectors are attached to. It is asked for them in each call: peft may have put
            a copy there, which it trains (``modules_to_save``).
    """

    def __init__(self, host: Host, model: nn.Module):
        self.host, self.model = host, model

    def __deepcopy__(self, memo) -> "Hook":
        # Its model is copied with it, but not by a copy of a block or of the selectors alone. A
        # wrapper's blocks may be copied before its model, whose own hooks then find those of them.
        hook = copy.copy(self)
        waiting = memo.setdefault((Hook, id(self.model)), [])
        waiting.append(hook)
        if (copied := memo.get(id(self.model))) is not None:
            while waiting:
                waiting.pop().model = copied
        return hook

    def selectors(self, module: nn.Module) -> Selectors:
        """The selectors in the call of a module, which in a traced graph are the module itself."""
        return module if isinstance(module, Selectors) else self.model.stts

    @property
    def __name__(self) -> str:
        # torch.jit.script asks hooks for it, and for their source, which it could not compile.
        raise AttributeError(
            "a model with selectors cannot be compiled by torch.jit.script: use torch.compile, "
            "torch.export or torch.jit.trace, or detach(model) first"
        )


class OpenCallHook(Hook):
    """Forward pre-hook on the model: a call begins."""

    def __call__(self, model: nn.Module, args: tuple) -> None:
        self.selectors(model).calls.open()


class CloseCallHook(Hook):
    """Forward hook on the model, called also after an error: a call has ended."""

    def __call__(self, model: nn.Module, args: tuple, output) -> None:
        self.selectors(model).calls.close()


class EnterClipHook(Hook):
    """Forward pre-hook on the module by which a clip enters: reads the clip's grid."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        stts = self.selectors(module)
        if tracer := tracer_of(args, kwargs):
            return _traced(tracer, _enter, stts, args, kwargs)
        stts.calls.start(self.host.call_grid(base_model(self.model), args, kwargs))
        return None


class SelectTokensHook(Hook):
    """Forward pre-hook that hands a block the tokens which its selectors keep.

    Args:
        host, model: see :class:`Hook`.
        number: of the block.
        behind, last: whether the block is behind a selection, and the last one.
    """

    def __init__(self, host: Host, model: nn.Module, number: int, behind: bool, last: bool):
        super().__init__(host, model)
        self.number, self.behind, self.last = number, behind, last

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        stts = self.selectors(block)
        if tracer := tracer_of(args, kwargs):
            return _traced(tracer, _select, stts, args, kwargs, self.number)
        host, calls = self.host, stts.calls
        thw = None
        if calls is not None:
            thw = calls.arrive(self.number, block, args, kwargs, self.behind)
            thw = host.default_grid() if thw is None else thw
        thw = host.incoming_grid(args, kwargs, thw)
        if self.behind and not (calls or (isinstance(thw, Grid) and thw.is_selected)):
            raise ValueError(
                f"the tokens that arrive at block {self.number} ({type(block).__name__}) do not "
                "say where they lie, though some were dropped before: something between two "
                "blocks made their grid anew"
            )
        selectors = getattr(block, "stts_replicas", None)
        if selectors is None:
            selectors = selectors_before(stts, self.number)
        if selectors:
            args, kwargs = _on_device_of(selectors, args, kwargs)
        if thw is not None:
            device = first_tensor(args, kwargs).device
            thw = thw.to(device) if isinstance(thw, Grid) else [grid.to(device) for grid in thw]
        if selectors:
            tokens = host.read(args, kwargs, thw)
            packed = isinstance(tokens, list)
            several = tokens if packed else [tokens]
            for selector in selectors:
                kept = []
                for i, clip in enumerate(several):
                    several[i] = select(selector, clip)
                    kept.append(selector.kept)
                if packed:
                    selector.kept = kept
            args, kwargs = host.write(several if packed else several[0], args, kwargs)
            thw = [clip.thw for clip in several] if packed else several[0].thw
        if calls is not None:
            calls.advance(self.number, thw, self.last)
        note(stts, thw)
        return host.adapt_call(block, thw, args, kwargs)


def _on_device_of(selectors: Sequence[Selector], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What arrives, on the device of a block's selectors.

    Of a model over several devices, accelerate moves it only when the block's forward begins.
    """
    weights = next((p for selector in selectors for p in selector.parameters()), None)
    device = first_tensor(args, kwargs).device
    if weights is None or weights.device == device:
        return args, kwargs
    return tree_map_only(Tensor, lambda x: x.to(weights.device), (args, kwargs))


class PropagateGridHook(Hook):
    """Forward hook that puts the grid which arrived at a block on what the block returns."""

    def __init__(self, host: Host, model: nn.Module, last: bool):
        super().__init__(host, model)
        self.last = last

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict, output, pooling=None):
        stts = self.selectors(block)
        pooling = pools(block) if pooling is None else pooling
        if tracer := tracer_of(args, kwargs):
            if self.last:
                return None
            traced = fx_tracing.call(tracer, _propagate, stts, args, kwargs, output, pooling)
            thw, x = traced[1], traced[0]  # tokens last: features of a block are its last node
            return x, thw
        thw = self.host.incoming_grid(args, kwargs, None)
        if thw is None:
            return None
        if pooling:
            thw = thw.pooled_by_unknown()
        marked = self.host.set_block_grid(output, thw)
        note(stts, self.host.incoming_grid(marked, {}, None) if isinstance(marked, tuple) else thw)
        return None if self.last else marked  # nothing of ours comes behind the last block


def pools(block: nn.Module) -> bool:
    """Whether a block makes the grid of its tokens smaller, in space."""
    pool = getattr(block, "pool_skip", None)  # as all MViTs call it
    strides = [getattr(m, "stride", 1) for m in pool.modules()] if pool is not None else []
    return any(isinstance(stride, (tuple, list)) and max(stride[1:]) > 1 for stride in strides)


# In a graph that torch.fx traced a node stands for each hook, and finds the hook in the selectors
# that the graph has, a copy or not.


def _traced(tracer, function, stts: Selectors, args: tuple, kwargs: dict, *more):
    traced = fx_tracing.call(tracer, function, stts, args, kwargs, *more)
    args = tuple(traced[0][i] for i in range(len(args)))
    return args, {name: traced[1][name] for name in kwargs}


def _enter(stts: Selectors, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    stts.hooks["entry"](stts, args, kwargs)
    return args, kwargs


def _select(stts: Selectors, args: tuple, kwargs: dict, number: int) -> tuple[tuple, dict]:
    return stts.hooks[number](stts, args, kwargs)


def note(stts: Selectors, thw) -> None:
    """Notes the grid of the last pass, as far as it came, for ``dense.positions``."""
    grids = thw if isinstance(thw, list) else [thw]
    if any(isinstance(grid, Grid) and grid.is_selected for grid in grids) and not in_backward():
        parts = [(tuple(g), g.frames, g.windows, g.tokens, g.whole) for g in grids]
        stts.reached = parts if isinstance(thw, list) else parts[0]


def _propagate(stts: Selectors, args: tuple, kwargs: dict, output, pooling: bool):
    return stts.hooks["grid"](stts, args, kwargs, output, pooling)


class DataParallelHook(Hook):
    """Forward pre-hook on the model: tells a replica's blocks of the replica's selectors.

    ``nn.DataParallel`` copies modules anew for every forward pass, but not the hooks on them.
    """

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if not getattr(model, "_is_replica", False):
            return
        for number, block in enumerate(self.host.blocks(base_model(model))):
            block.stts_replicas = selectors_before(model.stts, number)


def selectors_before(stts: Selectors, number: int) -> tuple[Selector, ...]:
    """The selectors in front of a block, in the order in which they run."""
    return tuple(selector for selector in stts.values() if selector.block == number)
