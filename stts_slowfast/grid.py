"""Where the tokens that travel through a model lie, and where in the clip they come from."""

from collections.abc import Sequence

from torch import Tensor, cat, full_like, stack


class Grid(tuple):
    """Sizes ``(T, H, W)`` of a grid of tokens; equal to, and unpacked like, a plain tuple.

    It is the ``thw`` that a host hands from block to block, so what a selection did travels with
    the tokens: through threads, copies, and what activation checkpointing computes again. Both
    attributes count in tokens of the grid that would arrive here without selection; in training
    they say what the scores without noise keep.

    Attributes:
        frames: LongTensor ``(B, T)``: which frames the arriving ones are, ascending; None where
            all arrive.
        windows: LongTensor ``(B, T, 4)``: top, left, height and width of the part of each frame
            that arrives; None where whole frames arrive.
    """

    frames: Tensor | None
    windows: Tensor | None

    def __new__(
        cls, sizes: Sequence[int], frames: Tensor | None = None, windows: Tensor | None = None
    ) -> "Grid":
        # While a model is traced, sizes are tensors.
        grid = super().__new__(cls, [int(size) for size in sizes])
        grid.frames, grid.windows = frames, windows
        return grid

    def __reduce__(self):
        return Grid, (tuple(self), self.frames, self.windows)

    def keep_frames(self, kept: Tensor) -> "Grid":
        """The grid of the frames ``kept`` ``(B, k)``, indices into the frames of this one."""
        frames = kept if self.frames is None else self.frames.gather(1, kept)
        windows = self.windows
        if windows is not None:
            windows = windows.gather(1, kept[:, :, None].expand(-1, -1, 4))
        return Grid((kept.shape[1], *self[1:]), frames, windows)

    def crop(self, kept: Tensor, window: tuple[int, int]) -> "Grid":
        """The grid of the windows ``kept`` ``(B*T, 4)`` in this one, each of size ``window``."""
        windows = kept.unflatten(0, (-1, self[0]))
        if self.windows is not None:
            corners = windows[..., :2] + self.windows[..., :2]
            windows = cat([corners, windows[..., 2:]], dim=2)
        return Grid((self[0], *window), self.frames, windows)

    def pooled(self, sizes: Sequence[int]) -> "Grid":
        """The grid of ``sizes`` that a block makes of this one by pooling.

        A pooled frame or window lies where the middle of what it was pooled from lies, in tokens
        of the pooled grid.
        """
        sizes = Grid(sizes)
        if sizes == self:
            return self
        # Rounded up, so that as many frames are taken as there are: 5 pooled by 4 are 2.
        time, rows, columns = (-(-a // b) for a, b in zip(self, sizes))
        frames, windows = self.frames, self.windows
        if frames is not None and time > 1:
            frames = frames[:, ::time] // time
        if windows is not None:
            top, left = windows[:, ::time, :2].unbind(2)
            corners = [top // rows, left // columns]
            sides = [full_like(top, side) for side in sizes[1:]]
            windows = stack([*corners, *sides], dim=2)
        return Grid(sizes, frames, windows)
