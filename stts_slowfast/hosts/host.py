"""What a host is: how one kind of model calls its blocks, and its tokens in that call."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.old_names import adopt_old_methods

Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]
# A model or block of another library, whose attributes have no types here.
ForeignModule: TypeAlias = Any
# The grid of a call's tokens, a list for packed clips; a host knows which of the two it has.
AnyGrid: TypeAlias = Any


class Tokens(NamedTuple):
    """The tokens that arrive at a block.

    Attributes:
        grid: ``(B, T, H, W, C)``.
        thw: sizes of the grid, with its positions in the clip.
        cls: ``(B, n, C)``, cls tokens of the whole clip; None without.
        frame_cls: ``(B, T, n, C)``, cls tokens of each frame, selected with their frame; None
            without.
        clip, frames: the names of ``cls`` and ``frame_cls`` before 0.2, only for old hosts.
    """

    grid: Tensor
    thw: Grid
    cls: Tensor | None = None
    frame_cls: Tensor | None = None
    clip: Tensor | None = None
    frames: Tensor | None = None


class Host:
    """Base class of hosts; an instance serves one model.

    How a block knows which tokens arrive: if a block's call has an argument for their grid
    (``thw``), the ``Grid`` is passed there (a host with :meth:`set_block_grid`). Otherwise it is in
    the context of the model's call (``call_context.Calls``), so that nothing is lost if wrappers,
    FSDP or offloading make new tensors:

    1. ``entry(model)`` is the module that receives the clip, the embeddings or the model
       itself. Before its call, :meth:`call_grid` reads the true sizes from the arguments.
    2. Before each block's call, :meth:`incoming_grid` returns the grid of its tokens; if selectors
       are in front of it, :meth:`unpack` and :meth:`pack` replace the tokens by fewer; then
       :meth:`adapt_call` fits other arguments of the block (positions, masks) to the grid.

    If a call packs clips of several sizes into one sequence, a method that takes or returns a
    ``Grid`` takes or returns a list of them, and ``unpack`` and ``pack`` a list of
    :class:`Tokens`. A host has numbers as attributes and no modules, so that it is copied and
    pickled with the model.

    Args:
        model: that selectors are attached to.
    """

    def __init__(self, model: nn.Module):
        pass

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt_old_methods(cls)

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        """The blocks before which tokens can be selected, in order; none in a foreign model.

        Raises:
            ValueError: for a known model that cannot be served, with the reason.
        """
        raise NotImplementedError

    def channels(self, block: nn.Module) -> int:
        """Channels of the tokens that arrive at a block: the width of its first norm.

        Raises:
            ValueError: if the block has no LayerNorm, RMSNorm or BatchNorm1d.
        """
        for module in block.modules():
            if isinstance(module, nn.BatchNorm1d):
                return module.num_features
            if shape := getattr(module, "normalized_shape", None):
                width: int = shape[-1]
                return width
        raise ValueError(
            f"cannot find the width of the tokens that arrive at {type(block).__name__}: "
            "it has no LayerNorm"
        )

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        """Whether single tokens are selected frame by frame, because blocks see each frame alone.

        Called only if single tokens are to be selected: a host overrides it if its blocks compute
        the same for any set of tokens whose positions they get.

        Raises:
            ValueError: if blocks need a grid, with the reason; always, in this base class.
        """
        raise ValueError(f"its host {type(self).__name__} does not support it")

    def entry(self, model: nn.Module) -> nn.Module:
        """The module that receives the clip, once in each forward pass.

        Embeddings are better than the model itself, which adapters and methods such as
        ``forward_features`` do not call.
        """
        return model

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> AnyGrid:
        """The grid of the clip in a call.

        Args:
            model: of this host.
            args, kwargs: of the call of ``entry(model)``.

        Returns:
            The grid; None if only the blocks' calls have it.

        Raises:
            ValueError: for sizes that the model, or selection in it, cannot take.
        """
        return self.default_grid()

    def default_grid(self) -> Grid | None:
        """The grid of a block that is called outside of a call of its model; None if unknown."""
        return None

    def incoming_grid(self, args: Args, kwargs: Kwargs, thw: AnyGrid) -> AnyGrid:
        """The grid of the tokens of a block's call.

        Args:
            args, kwargs: of the block's call.
            thw: the grid of the tokens of the block before, or of the clip; None if unknown.
        """
        return thw

    def unpack(self, args: Args, kwargs: Kwargs, thw: AnyGrid) -> Tokens | list[Tokens]:
        """The tokens of a block's call, whose grid is ``thw``, from :meth:`incoming_grid`.

        Raises:
            ValueError: if they do not fit the grid.
        """
        raise NotImplementedError

    def pack(self, tokens: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of the call with these tokens instead."""
        raise NotImplementedError

    def adapt_call(
        self, block: nn.Module, thw: AnyGrid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The arguments of a block's call, with all that depends on the grid fitted to it.

        It is called before every block, with or without selectors: masks and positions that were
        made once for all blocks are cut here, and a grid that a block reads from itself is set.
        """
        return args, kwargs

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Changes in a model that selectors need."""

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Undoes :meth:`prepare`."""

    def set_block_grid(self, output: Any, thw: Grid) -> Any:
        """The output of a block with the grid ``thw`` (the block's own, before pooling) in it.

        Only for hosts whose blocks' calls have an argument for the grid.
        """
        return output


def is_instance_of(model: nn.Module, library: str, *names: str) -> bool:
    """Whether a model's class, or a base class of it, is one of ``names`` in a library.

    The library is not imported, and need not be installed.
    """
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == library
        for kind in type(model).__mro__
    )
