"""torchvision's ``SwinTransformer3d``: its blocks are the stages, its tokens a grid tensor."""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, Host, Kwargs, Tokens


class SwinHost(Host):
    """The stages of ``model.features``, each called with only a grid ``(B, T, H, W, C)``.

    Attention windows and patch merging take their sizes from the tensor.
    """

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        features = getattr(model, "features", None)
        patches = getattr(model, "patch_embed", None)
        if not isinstance(features, nn.Sequential) or not isinstance(patches, nn.Module):
            return ()
        if not any(isinstance(module, nn.Conv3d) for module in patches.modules()):
            return ()  # of images
        return [child for child in features if isinstance(child, nn.Sequential)]

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        raise ValueError("its blocks attend in windows of a grid and merge neighbouring tokens")

    def incoming_grid(self, args: Args, kwargs: Kwargs, thw: Grid | None) -> Grid | None:
        x = args[0]
        if x.dim() != 5:
            raise ValueError(f"tokens have shape {tuple(x.shape)}: give (B, T, H, W, C)")
        if thw is None:
            return Grid(x.shape[1:4])
        return thw.pooled_by_unknown().pooled(x.shape[1:4])  # patches were merged in between

    def unpack(self, args: Args, kwargs: Kwargs, thw: Grid | None) -> Tokens:
        return Tokens(args[0], Grid(args[0].shape[1:4]) if thw is None else thw)

    def pack(self, tokens: Tokens, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return (tokens.grid, *args[1:]), kwargs
