"""The context of a model's call: what its blocks have to know of one another's tokens."""

import threading

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from stts_slowfast.grid import Grid

# When there are as many records, dead ones are dropped.
MANY_RECORDS = 256


class Call:
    """How far one call of a model has come.

    Attributes:
        grid: of the tokens that arrive at the next block; None while only the blocks' calls can
            say it. Of packed clips, a list of grids.
        next_block: the number of the next block at the earliest; None before the clip is known,
            and behind the last block.
        task: the backward pass in which the call runs, -1 outside of any.
        node: where a block runs again for a backward pass, the node that wants it.
        grids: what each block so far got.
    """

    def __init__(self, grid=None, next_block: int | None = None, task: int = -1, node=None):
        self.grid, self.next_block, self.task, self.node = grid, next_block, task, node
        self.grids: dict[int, object] = {}

    def comes_to(self, number: int, task: int) -> bool:
        return self.task == task and self.next_block is not None and self.next_block <= number


class Calls:
    """The calls of one model that are running, in whichever threads, and those to be run again.

    ``open`` and ``close`` frame a call of the model, ``start`` begins it when its clip is known,
    ``arrive`` and ``advance`` are for each block. A thread has its own stack of calls: replicas of
    ``nn.DataParallel``, threads that share a model, and a model that calls itself do not meet.

    Activation checkpointing runs blocks again in a backward pass, when their call has ended, in
    the thread of the autograd engine, and with tensors that may be new objects. But the memory of
    what it gives a checkpointed function is that of the first time, kept alive as long as it may
    be wanted. So the grid that arrives at a block is recorded with the storage of the tokens that
    arrived, and a block that runs in a backward pass finds it there; blocks behind it in the same
    checkpoint continue from it. A storage is identified by its control block, which a weak
    reference keeps from being reused, so that no other tensor can be taken for it. What is found
    in neither way is an error, never a guess.
    """

    def __init__(self):
        self._local = threading.local()
        self._records: dict[tuple, tuple[StorageWeakRef, object]] = {}
        self._many = MANY_RECORDS
        self._started: set[tuple] = set()  # sizes of all clips so far

    def __getstate__(self) -> dict:
        return {}  # a copy has calls of its own

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def open(self) -> Call:
        """A call of the model begins in this thread."""
        call = Call()
        self._local.stack = (*self._stack(), call)
        return call

    def open_call(self) -> Call:
        """The innermost call of the model in this thread."""
        return self._stack()[-1]

    def close(self) -> None:
        """The innermost call of the model in this thread has ended, by an error or not."""
        self._local.stack = self._stack()[:-1]

    def start(self, grid) -> None:
        """The clip of the innermost call is known to make a ``grid`` of tokens.

        Outside of any call (of a method of the model, or of its ``forward``) it begins one.
        """
        if not self._stack():
            self.open()
        call = self._stack()[-1]
        call.grid, call.next_block, call.task = grid, 0, _backward()
        if isinstance(grid, Grid) and not torch.compiler.is_compiling():
            self._started.add(tuple(grid))

    def arrive(self, number: int, block: nn.Module, args: tuple, kwargs: dict, behind: bool):
        """The grid of the tokens that arrive at a block.

        Args:
            number: of the block.
            block: for what is raised.
            args, kwargs: of the block's call, tokens first.
            behind: whether tokens may have been dropped before.

        Returns:
            What ``start`` or ``advance`` was given; None for a block that is called outside of
            a call of its model, if nothing can have been dropped before.

        Raises:
            ValueError: if it is not known what arrives.
        """
        task = _backward()
        call = self._find(number, task)
        if call is not None:
            grid = call.grid
        elif task != -1:
            grid = self._recall(number, block, first_tensor(args, kwargs), behind)
            self._local.again = Call(grid, number, task, _node())
        elif behind:
            raise ValueError(
                f"block {number} ({type(block).__name__}) was called outside of a call of its "
                "model, so it is not known which tokens arrive, and some may have been dropped "
                "before: call the model, or its blocks in order from the first"
            )
        else:
            grid = None
            self.start(grid)
        self._record(number, first_tensor(args, kwargs), grid)
        return grid

    def advance(self, number: int, grid, last: bool) -> None:
        """A block gets tokens of this ``grid``, and so do those behind it."""
        call = self._find(number, _backward())
        call.grid, call.next_block = grid, None if last else number + 1
        call.grids[number] = grid

    def _stack(self) -> tuple[Call, ...]:
        return getattr(self._local, "stack", ())

    def _find(self, number: int, task: int) -> Call | None:
        """The call in this thread that comes to a block."""
        stack = self._stack()
        if stack and stack[-1].comes_to(number, task):
            return stack[-1]
        if task == -1:
            return None
        again = getattr(self._local, "again", None)
        found = again is not None and again.comes_to(number, task) and again.node is _node()
        return again if found else None

    def _record(self, number: int, x: Tensor, grid) -> None:
        key = None if torch.compiler.is_compiling() else _key(number, x)
        if key is None:
            return
        if len(self._records) >= self._many:
            for old, (storage, _) in list(self._records.items()):
                if storage.expired():
                    self._records.pop(old, None)
            self._many = max(MANY_RECORDS, 2 * len(self._records))
        self._records[key] = (StorageWeakRef(x.untyped_storage()), grid)

    def _recall(self, number: int, block: nn.Module, x: Tensor, behind: bool):
        key = _key(number, x)
        if key in self._records:
            return self._records[key][1]
        if not behind and len(self._started) <= 1:
            return next((Grid(sizes) for sizes in self._started), None)
        raise ValueError(
            f"block {number} ({type(block).__name__}) runs again for a backward pass, with tokens "
            "in other memory than in the forward pass, so it is not known which they are: make "
            "the checkpoint begin at a block, cast and offload outside of it (checkpoint_wrapper "
            "before fully_shard), or not at all"
        )


def first_tensor(args: tuple, kwargs: dict) -> Tensor:
    """The first tensor among the arguments of a call."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def in_backward() -> bool:
    """Whether this thread computes a backward pass, so that what runs may be running again."""
    return _backward() != -1


def _backward() -> int:
    """The number of the backward pass that this thread computes; -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _node():
    return torch._C._current_autograd_node()


def _key(number: int, x: Tensor) -> tuple | None:
    """What tells tokens that arrive at a block from all others that are alive.

    None for tensors that have no memory of their own (traced, transformed).
    """
    try:
        storage = x.untyped_storage()
        return number, storage._cdata, x.storage_offset(), tuple(x.shape)
    except (RuntimeError, NotImplementedError):
        return None
