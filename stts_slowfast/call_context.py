"""The context of a model's call, by which its blocks know which tokens arrive."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from stts_slowfast.grid import Grid

# With so many records, those of freed tensors are dropped.
MANY_RECORDS = 256


# The grid of the tokens of a call; a list for packed clips; None if it is not known.
CallGrid = Grid | list[Grid] | None


class Call:
    """The progress of one call of a model.

    Attributes:
        grid: of the tokens that arrive at the next block; None if only the blocks' calls have it.
        next_block: the lowest number that the next block may have; None before the clip is known,
            and after the last block.
        task: the backward pass in which the call runs, -1 outside of any.
        node: if a block runs again for a backward pass, the autograd node that runs it.
        grids: of the tokens that each block so far received.
    """

    def __init__(
        self,
        grid: CallGrid = None,
        next_block: int | None = None,
        task: int = -1,
        node: object = None,
    ):
        self.grid, self.next_block, self.task, self.node = grid, next_block, task, node
        self.grids: dict[int, CallGrid] = {}

    def may_reach(self, number: int, task: int) -> bool:
        return self.task == task and self.next_block is not None and self.next_block <= number


class Calls:
    """The running calls of one model, in all threads, and records of ended ones for recomputation.

    ``open`` and ``close`` enclose a call of the model, ``start`` is for when its clip is known,
    ``arrive`` and ``advance`` are for each block. Each thread has its own stack of calls, so that
    replicas of ``nn.DataParallel``, threads that share a model, and a model that calls itself do
    not mix.

    Activation checkpointing runs blocks again in a backward pass: after their call has ended, in
    the thread of the autograd engine, and with tensors that may be new objects. But the inputs of a
    checkpointed function have the memory of the first time, which is kept alive for it. So the grid
    that arrives at a block is recorded with the storage of its tokens, and a block that runs in a
    backward pass finds it there; later blocks of the same checkpoint continue from it. A storage is
    identified by its control block, which a weak reference keeps from being reused, so no other
    tensor can have it. If neither way finds a grid, that is an error, never a guess.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._local = threading.local()
        self._records: dict[tuple[Any, ...], tuple[StorageWeakRef, CallGrid]] = {}
        self._max_records = MANY_RECORDS
        self._started: set[tuple[int, int, int]] = set()  # sizes of all clips so far

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has calls of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._reset()

    def open(self) -> Call:
        """Begins a call of the model in this thread."""
        call = Call()
        self._local.stack = (*self._stack(), call)
        return call

    def open_call(self) -> Call:
        """The innermost call of the model in this thread."""
        return self._stack()[-1]

    def close(self) -> None:
        """Ends the innermost call of the model in this thread, after an error too."""
        self._local.stack = self._stack()[:-1]

    def start(self, grid: CallGrid) -> None:
        """Sets the grid of the clip of the innermost call.

        Outside of any call (in a method of the model, or in its ``forward``) it begins one.
        """
        if not self._stack():
            self.open()
        call = self._stack()[-1]
        call.grid, call.next_block, call.task = grid, 0, _backward()
        if isinstance(grid, Grid) and not torch.compiler.is_compiling():
            time, height, width = grid
            self._started.add((time, height, width))

    def arrive(self, number: int, block: nn.Module, x: Tensor, after_selection: bool) -> CallGrid:
        """The grid of the tokens ``x`` that arrive at a block.

        Args:
            number: of the block.
            block: for error messages.
            x: its first argument.
            after_selection: whether tokens may have been dropped before.

        Returns:
            The grid that ``start`` or ``advance`` set; None for a block that is called outside of a
            call of its model, if nothing can have been dropped before.

        Raises:
            ValueError: if the grid is not known.
        """
        task = _backward()
        call = self._find(number, task)
        if call is not None:
            grid = call.grid
        elif task != -1:
            grid = self._recall(number, block, x, after_selection)
            self._local.recomputed = Call(grid, number, task, _node())
        elif after_selection:
            raise ValueError(
                f"block {number} ({type(block).__name__}) was called outside of a call of its "
                "model, so it is not known which tokens arrive, and some may have been dropped "
                "before: call the model, or its blocks in order from the first"
            )
        else:
            grid = None
            self.start(grid)
        self._record(number, x, grid)
        return grid

    def advance(self, number: int, grid: CallGrid, last: bool) -> None:
        """Sets the grid of the tokens that a block, and those after it, receive."""
        call = self._find(number, _backward())
        assert call is not None, "arrive comes first"
        call.grid, call.next_block = grid, None if last else number + 1
        call.grids[number] = grid

    def _stack(self) -> tuple[Call, ...]:
        stack: tuple[Call, ...] = getattr(self._local, "stack", ())
        return stack

    def _find(self, number: int, task: int) -> Call | None:
        """The call in this thread that may reach a block next."""
        stack = self._stack()
        if stack and stack[-1].may_reach(number, task):
            return stack[-1]
        if task == -1:
            return None
        call: Call | None = getattr(self._local, "recomputed", None)
        found = call is not None and call.may_reach(number, task) and call.node is _node()
        return call if found else None

    def _record(self, number: int, x: Tensor, grid: CallGrid) -> None:
        key = None if torch.compiler.is_compiling() else _key(number, x)
        if key is None:
            return
        if len(self._records) >= self._max_records:
            for old, (storage, _) in list(self._records.items()):
                if storage.expired():
                    self._records.pop(old, None)
            self._max_records = max(MANY_RECORDS, 2 * len(self._records))
        self._records[key] = (StorageWeakRef(x.untyped_storage()), grid)

    def _recall(self, number: int, block: nn.Module, x: Tensor, after_selection: bool) -> CallGrid:
        key = _key(number, x)
        if key is not None and key in self._records:
            return self._records[key][1]
        if not after_selection and len(self._started) <= 1:
            return next((Grid(sizes) for sizes in self._started), None)
        raise ValueError(
            f"block {number} ({type(block).__name__}) runs again for a backward pass, with tokens "
            "in other memory than in the forward pass, so it is not known which they are: make "
            "the checkpoint begin at a block, and cast or offload outside of it "
            "(checkpoint_wrapper before fully_shard), or not at all"
        )


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among the arguments of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def in_backward() -> bool:
    """Whether this thread computes a backward pass, in which checkpointed code runs again."""
    return _backward() != -1


def _backward() -> int:
    """The number of the backward pass that this thread computes; -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _node() -> object:
    return torch._C._current_autograd_node()


def _key(number: int, x: Tensor) -> tuple[Any, ...] | None:
    """Identifies the tokens that arrive at a block among all live tensors.

    None for tensors without memory of their own (traced, transformed).
    """
    try:
        storage = x.untyped_storage()
        return number, storage._cdata, x.storage_offset(), tuple(x.shape)
    except (RuntimeError, NotImplementedError):
        return None
