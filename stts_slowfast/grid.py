"""Where the tokens that travel through a model lie, and where in the clip they come from."""

from collections.abc import Sequence

from torch import Tensor


class Grid(tuple):
    """Sizes ``(T, H, W)`` of a grid of tokens; equal to, and unpacked like, a plain tuple.

    It is the ``thw`` that a host hands from block to block, so what a selection did travels with
    the tokens: through threads, copies, and what activation checkpointing computes again.

    Attributes:
        frames: LongTensor ``(B, T)``: which frames of the clip (token frames of the grid before any
            selection) the arriving frames are, ascending; None where all arrive.
        windows: LongTensor ``(B, T, 4)``: top, left, height and width of the part of each frame
            that arrives, in tokens of the grid that would arrive here without selection; None where
            whole frames arrive.
    """

    frames: Tensor | None
    windows: Tensor | None

    def __new__(
        cls, sizes: Sequence[int], frames: Tensor | None = None, windows: Tensor | None = None
    ) -> "Grid":
        grid = super().__new__(cls, sizes)
        grid.frames, grid.windows = frames, windows
        return grid
