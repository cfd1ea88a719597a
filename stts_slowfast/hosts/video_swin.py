"""torchvision's ``SwinTransformer3d``: its blocks are the stages, the tokens lie on their grid."""

from collections.abc import Sequence

from torch import nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, Host, Tokens


@HOSTS.register()
class StagesOfGrids(Host):
    """The stages of ``model.features``, each called with a grid ``(B, T, H, W, C)`` alone.

    Windows of attention and patch merging need no grid but the one that arrives, so none travels.
    """

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        features = getattr(model, "features", None)
        if not isinstance(features, nn.Sequential):
            return ()
        return [child for child in features if isinstance(child, nn.Sequential)]

    def read(self, args: tuple, kwargs: dict) -> Tokens:
        x = args[0]
        if x.dim() != 5:
            raise ValueError(f"without thw tokens must be (B, T, H, W, C), not {tuple(x.shape)}")
        return Tokens(x, Grid(x.shape[1:4]))

    def write(self, tokens: Tokens, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (tokens.grid, *args[1:]), kwargs
