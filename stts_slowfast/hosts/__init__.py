"""How a model's tokens lie, a file a host: where its blocks are, its grid read and written back.

A host knows one way in which blocks are called. Selection sits between the tokens that arrive at
a block and the call: ``read`` turns the call's arguments into :class:`Tokens`, selectors make them
fewer, ``write`` makes the arguments of the smaller call. See :class:`Host` for how a block knows
which tokens arrive. Others register theirs with ``@HOSTS.register()``; the one that was registered
last and finds blocks in a model is its host.
"""

from collections.abc import Sequence
from typing import NamedTuple

from fvcore.common.registry import Registry
from torch import Tensor, nn

from stts_slowfast.grid import Grid
from stts_slowfast.plugins import load_extensions

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

    How a block knows which tokens arrive: where a block's call has a place for their grid
    (``thw``), the ``Grid`` travels there (a host with ``set_block_grid``). Everywhere else it travels in
    the context of the model's call (``calls.Calls``), so nothing is lost when wrappers, FSDP or
    offloading make new tensors:

    1. ``entry(model)``: the module by whose call a clip enters, the embeddings or the model
       itself. Before its call ``call_grid`` reads the true sizes from the arguments.
    2. Before each block's call ``arrived`` gives the grid that comes with the tokens; if selectors
       are before it, ``read`` and ``write`` make the call smaller; then ``adapt_call`` makes
       what else the block reads (positions, masks) fit the grid, before every block.

    A method that takes or gives a ``Grid`` takes or gives a list of them if a call packs clips of
    several sizes into one sequence; ``read`` and ``write`` then do so with :class:`Tokens`. A host
    holds numbers and no modules, so that it is copied and pickled with the model.

    Args:
        model: what selection is attached to.
    """

    def __init__(self, model: nn.Module):
        pass

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        """The blocks before which tokens can be selected, in order; none in a foreign model.

        Raises:
            ValueError: for a model that is known, with the reason why it cannot be served.
        """
        raise NotImplementedError

    def channels(self, block: nn.Module) -> int:
        """Channels of the tokens that arrive at a block: the width of its first norm.

        Raises:
            ValueError: where the block has no LayerNorm, RMSNorm or BatchNorm1d.
        """
        for module in block.modules():
            if isinstance(module, nn.BatchNorm1d):
                return module.num_features
            if shape := getattr(module, "normalized_shape", None):
                return shape[-1]
        raise ValueError(
            f"cannot tell the width of the tokens that arrive at {type(block).__name__}: "
            "it has no LayerNorm"
        )

    def entry(self, model: nn.Module) -> nn.Module:
        """The module by whose call a clip enters the model, once in each forward pass.

        Embeddings are better than the model itself, which is left out by adapters and by methods
        such as ``forward_features``.
        """
        return model

    def call_grid(self, model: nn.Module, args: tuple, kwargs: dict) -> Grid | None:
        """The grid that the clip of a call makes.

        Args:
            model: what the host was made for.
            args, kwargs: of the call of ``entry(model)``.

        Returns:
            The grid; None if only the blocks' calls say it.

        Raises:
            ValueError: for sizes that the model, or selection in it, cannot take.
        """
        return self.default_grid()

    def default_grid(self) -> Grid | None:
        """The grid of a block that is called outside of a call of its model; None: unknown."""
        return None

    def incoming_grid(self, args: tuple, kwargs: dict, thw: Grid | None) -> Grid | None:
        """The grid of the tokens of a block's call.

        Args:
            args, kwargs: of the block's call.
            thw: the grid of the tokens that the block before got, or of the clip; None: unknown.
        """
        return thw

    def read(self, args: tuple, kwargs: dict, thw: Grid | None) -> Tokens:
        """The tokens of a block's call, whose grid is ``thw``, as :meth:`incoming_grid` gave it.

        Raises:
            ValueError: where they do not fit the grid.
        """
        raise NotImplementedError

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of the call with these tokens instead."""
        raise NotImplementedError

    def adapt_call(
        self, block: nn.Module, thw: Grid, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """The arguments of a block's call, with all that depends on the grid made to fit it.

        Called before every block, with or without selectors: masks and positions that were made
        once for all blocks are cut here, and a block that reads its grid from itself is given it.
        """
        return args, kwargs

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """What a host must change in a model before selectors stand in front of its blocks."""

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Takes back what :meth:`normalize_clips` did."""

    def set_block_grid(self, output, thw: Grid):
        """What a block returns, with the grid ``thw`` (the block's own, before pooling) on it.

        For hosts whose calls have a place for the grid, and no others.
        """
        return output


def is_instance_of(model: nn.Module, library: str, *names: str) -> bool:
    """Whether a model's class, or one it comes from, is one of ``names`` in a library.

    A library that nobody uses need not be imported, nor installed, to be told from the others.
    """
    return any(
        kind.__name__ in names and kind.__module__.partition(".")[0] == library
        for kind in type(model).__mro__
    )


def base_model(model: nn.Module) -> nn.Module:
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


def resolve_host(model: nn.Module) -> tuple[Host, list[nn.Module]]:
    """The host of a model, and the model's blocks.

    Raises:
        ValueError: where no host finds blocks in it.
    """
    load_extensions()
    model = base_model(model)
    if not is_instance_of(model, "peft", "PeftModel"):  # it passes its model's attributes on
        for _, host in reversed(list(HOSTS)):
            blocks = list(host.blocks(model))
            if blocks:
                return host(model), blocks
    raise ValueError(
        f"{type(model).__name__} has no blocks to select tokens before{_hint_at_inner_model(model)}: STTS works "
        "on models with `blocks` called as x, thw = block(x, thw) (MViT, TimeSformer, ViT), on "
        "Video Swin, on VideoMAE, ViViT, V-JEPA 2, TimeSformer, VideoPrism, SigLIP, CLIP, DINOv2, "
        "DINOv3 and Qwen's vision towers of transformers, on timm's VisionTransformer and Eva, and "
        "on what is registered in stts_slowfast.hosts.HOSTS"
    )


def _hint_at_inner_model(model: nn.Module) -> str:
    """In words, which module inside of a model has blocks; empty if none has."""
    if is_instance_of(model, "peft", "PeftModel"):
        return ", but what it adapts may have: attach(model.get_base_model(), ...)"
    for path, module in model.named_modules():
        if path:
            for _, host in reversed(list(HOSTS)):
                try:
                    found = len(host.blocks(module))
                except ValueError:
                    found = 0
                if found:
                    kind = type(module).__name__
                    return f", but its {path} ({kind}) has: attach(model.{path}, ...)"
    return ""


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model before which tokens can be selected, in order.

    Raises:
        ValueError: where no host finds blocks in it.
    """
    return resolve_host(model)[1]


# They register themselves.
from stts_slowfast.hosts import thw_blocks  # noqa: E402, F401  the last that is asked

# isort: split
from stts_slowfast.hosts import (  # noqa: E402, F401
    hf_images,
    hf_timesformer,
    plain_video_vit,
    qwen_vision,
    timm_eva,
    timm_vit,
    video_swin,
    videomae,
    videoprism,
    vivit,
    vjepa2,
    vjepa2_official,
)
