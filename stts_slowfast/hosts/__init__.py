"""How a model's tokens lie: finds its selectable blocks, and turns tokens into a grid and back.

Four layouts are known, told apart by the number of tokens that arrive with a grid ``(T, H, W)``:

====================  =====================  ============================================
tokens                shape                  who
====================  =====================  ============================================
plain                 ``(B, T*H*W, C)``      ViT with mean pooling
one cls token         ``(B, 1+T*H*W, C)``    MViT, ViT, TimeSformer (divided, joint)
a cls token a frame   ``(B, T*(1+H*W), C)``  TimeSformer (space only)
the grid              ``(B, T, H, W, C)``    Video Swin
====================  =====================  ============================================
"""

from torch import Tensor, cat, nn


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model before which tokens can be selected, in order.

    ``model.blocks`` where there is one (MViT, TimeSformer, ViT); the stages of ``model.features``
    of torchvision's ``SwinTransformer3d``.

    Raises:
        ValueError: where the model has neither.
    """
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.ModuleList, nn.Sequential)) and len(blocks):
        return list(blocks)
    features = getattr(model, "features", None)
    if isinstance(features, nn.Sequential):
        stages = [child for child in features if isinstance(child, nn.Sequential)]
        if stages:
            return stages
    raise ValueError(
        f"{type(model).__name__} has no blocks to select tokens before: STTS works on models with "
        "`blocks` called as x, thw = block(x, thw) (MViT, TimeSformer, ViT), and on Video Swin"
    )


def input_channels(block: nn.Module) -> int:
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


def select(selector: nn.Module, x: Tensor, thw=None):
    """Runs a selector on tokens in any of the layouts.

    Args:
        selector: a ``TemporalSelector`` or ``SpatialSelector``.
        x: tokens, see the table above.
        thw: tuple or list of the grid's ``T, H, W``; None where ``x`` is the grid.

    Returns:
        The tokens that go on, and their ``thw``, of the type that came in (None for a grid).

    Raises:
        ValueError: where the number of tokens fits none of the layouts.
    """
    if thw is None:
        if x.dim() != 5:
            raise ValueError(f"without thw tokens must be (B, T, H, W, C), not {tuple(x.shape)}")
        return selector(x), None
    frames, height, width = (int(size) for size in thw)
    extra = x.shape[1] - frames * height * width
    if x.dim() != 3 or extra not in (0, 1, frames):
        raise ValueError(
            f"tokens of shape {tuple(x.shape)} do not make a grid of {frames}x{height}x{width}, "
            "with or without cls token"
        )
    if extra <= 1:
        cls, grid = x[:, :extra], x[:, extra:].unflatten(1, (frames, height, width))
        grid = selector(grid)
        x = grid.flatten(1, 3)
        x = cat([cls, x], dim=1) if extra else x
    else:
        x = x.unflatten(1, (frames, 1 + height * width))
        cls, grid = x[:, :, :1], x[:, :, 1:].unflatten(2, (height, width))
        choice = selector.choose(grid)
        grid = selector.take(grid, choice)
        cls = selector.take(cls, choice) if selector.dimension == "TIME" else cls
        x = cat([cls, grid.flatten(2, 3)], dim=2).flatten(1, 2)
    return x, type(thw)(grid.shape[1:4])
