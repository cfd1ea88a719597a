"""torchvision's ``SwinTransformer3d``: its blocks are the stages, the tokens lie on their grid."""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, Host, Tokens


class SwinHost(Host):
    """The stages of ``model.features``, each called with a grid ``(B, T, H, W, C)`` alone.

    Windows of attention and patch merging need no grid but the one that arrives.
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

    def incoming_grid(self, args: tuple, kwargs: dict, thw: Grid | None) -> Grid | None:
        x = args[0]
        if x.dim() != 5:
            raise ValueError(f"without thw tokens must be (B, T, H, W, C), not {tuple(x.shape)}")
        if thw is None:
            return Grid(x.shape[1:4])
        return thw.pooled_by_unknown().pooled(x.shape[1:4])  # patches were merged in between

    def read(self, args: tuple, kwargs: dict, thw: Grid | None) -> Tokens:
        return Tokens(args[0], thw)

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (tokens.grid, *args[1:]), kwargs


HOSTS._do_register("StagesOfGrids", SwinHost)  # its name before 0.2
