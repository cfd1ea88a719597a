"""How a model's tokens lie, a file a host: where its blocks are, its grid read and written back.

A host knows one way in which blocks are called. Selection sits between the tokens that arrive at
a block and the call: ``read(args, kwargs)`` turns the call's arguments into :class:`Tokens`,
selectors make them fewer, ``write(tokens, args, kwargs)`` makes the arguments of the smaller call.
Where the tokens lie travels with them as a ``grid.Grid``: in an argument, where the call has one
for it (``thw``), else as :func:`remember`'s mark on the tensor; a host whose calls say nothing of
the grid starts from the model's config, which it reads in ``__init__``. Behind the first selection,
``hand_on`` puts the grid on what a stock block returns, since that knows nothing of it; and a host
with ``tells_every_block`` has ``write`` and ``tell`` called at each later block as well, to tell it
the places that are left (a ``position_mask``, say). A host holds numbers and no modules, so that it
is copied and pickled with the model. Others register theirs with ``@HOSTS.register()``; the one
that was registered last and finds blocks in a model is its host.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fvcore.common.registry import Registry
from torch import Tensor, nn

from stts_slowfast.extensions import load_extensions
from stts_slowfast.grid import Grid

HOSTS = Registry("HOSTS")


class Tokens(NamedTuple):
    """The tokens that arrive at a block.

    Attributes:
        grid: ``(B, T, H, W, C)``.
        thw: sizes of the grid, and where it comes from.
        clip: ``(B, n, C)``, cls tokens of the whole clip; None without.
        frames: ``(B, T, n, C)``, cls tokens of each frame, which go with their frame; None without.
    """

    grid: Tensor
    thw: Grid
    clip: Tensor | None = None
    frames: Tensor | None = None


class Host:
    """What all hosts share; a host is made for one model.

    Args:
        model: what selection is attached to.
    """

    tells_every_block = False

    def __init__(self, model: nn.Module):
        pass

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        """The blocks before which tokens can be selected, in order; none in a foreign model."""
        raise NotImplementedError

    def channels(self, block: nn.Module) -> int:
        """Channels of the tokens that arrive at a block: the width of its first LayerNorm.

        Raises:
            ValueError: where the block has no LayerNorm.
        """
        for module in block.modules():
            if isinstance(module, nn.LayerNorm):
                return module.normalized_shape[-1]
        raise ValueError(
            f"cannot tell the width of the tokens that arrive at {type(block).__name__}: "
            "it has no LayerNorm"
        )

    def read(self, args: tuple, kwargs: dict) -> Tokens:
        """The tokens of a block's call.

        Raises:
            ValueError: where they do not fit the grid.
        """
        raise NotImplementedError

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the call with these tokens instead."""
        raise NotImplementedError

    def prepare(self, blocks: Sequence[nn.Module]) -> None:
        """What a host must change in a model's blocks before selectors stand in front of them."""

    @staticmethod
    def restore(blocks: Sequence[nn.Module]) -> None:
        """Takes back what :meth:`prepare` did."""

    def tell(self, block: nn.Module, thw: Grid) -> None:
        """Tells a block that reads its grid from itself which one its call will bring."""

    def arrived(self, args: tuple, kwargs: dict) -> Grid | None:
        """The grid that travelled to a block's call; None where nothing was selected before."""
        return None

    def hand_on(self, output, thw: Grid):
        """What a block returns, with the grid ``thw`` (the block's own, before pooling) on it."""
        return output


def remember(x: Tensor, thw: Grid) -> Tensor:
    """Marks a tensor of tokens with its grid, for hosts whose calls have no place for it."""
    x.stts_grid = thw
    return x


def remembered(x: Tensor) -> Grid | None:
    """What :func:`remember` marked a tensor with; None where it did not."""
    return getattr(x, "stts_grid", None)


def is_a(model: nn.Module, library: str, *names: str) -> bool:
    """Whether a model's class, or one it comes from, is one of ``names`` in a library.

    A library that nobody uses need not be imported, nor installed, to be told from the others.
    """
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == library
        for kind in type(model).__mro__
    )


def hosted(model: nn.Module) -> nn.Module:
    """The model that has the blocks: ``model.hosted`` where it wraps another, else itself."""
    return getattr(model, "hosted", model)


def modules_with_selectors(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model to which selectors are attached, by their path; ``""`` is the model.

    They may be anywhere: inside DDP, ``torch.compile``, an adapter, a wrapper of the user's.
    """
    return {
        path: module
        for path, module in model.named_modules()
        if hasattr(module._modules.get("stts"), "settings")  # wrappers pass attributes on
    }


def unwrap(model: nn.Module) -> nn.Module:
    """The module to which selectors are attached, wherever in a model it is; without any, the
    model inside ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        ValueError: if several modules of the model have selectors.
    """
    found = modules_with_selectors(model)
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} modules of this {type(model).__name__} have selectors "
            f"({', '.join(path or 'itself' for path in found)}): give one of them"
        )
    if found:
        return next(iter(found.values()))
    while isinstance(
        inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module
    ):
        model = inner
    return model


def find(model: nn.Module) -> tuple[Host, list[nn.Module]]:
    """The host of a model, and the model's blocks.

    Raises:
        ValueError: where no host finds blocks in it.
    """
    load_extensions()
    model = hosted(model)
    for _, host in reversed(list(HOSTS)):
        blocks = list(host.blocks(model))
        if blocks:
            return host(model), blocks
    raise ValueError(
        f"{type(model).__name__} has no blocks to select tokens before: STTS works on models with "
        "`blocks` called as x, thw = block(x, thw) (MViT, TimeSformer, ViT), on Video Swin, on "
        "VideoMAE, ViViT, V-JEPA 2 and TimeSformer of transformers, on timm's VisionTransformer, "
        "and on what is registered in stts_slowfast.hosts.HOSTS"
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model before which tokens can be selected, in order.

    Raises:
        ValueError: where no host finds blocks in it.
    """
    return find(model)[1]


# They register themselves.
from stts_slowfast.hosts import (  # noqa: E402, F401
    blocks_with_grid,
    hf_timesformer,
    timm_vit,
    video_swin,
    videomae,
    vivit,
    vjepa2,
)
