"""Where the tokens that travel through a model lie, and where in the clip they come from."""

from collections.abc import Sequence

import torch
from torch import Tensor, cat, full_like, stack


class Grid(tuple):
    """Sizes ``(T, H, W)`` of a grid of tokens; equal to, and unpacked like, a plain tuple.

    It travels from block to block, as the ``thw`` of a call or in the context of the model's call
    (``calls.Calls``). All attributes count in tokens of the grid that would arrive here without
    selection; in training they say what the scores without noise keep.

    A set of tokens that makes no grid has the sizes ``(1, 1, n)``, or ``(T, 1, n)`` with as many
    of each frame, and ``tokens`` instead of frames and windows.

    Attributes:
        frames: LongTensor ``(B, T)``: which frames the arriving ones are, ascending; None where
            all arrive.
        windows: LongTensor ``(B, T, 4)``: top, left, height and width of the part of each frame
            that arrives; None where whole frames arrive.
        tokens: LongTensor ``(B, T*H*W)``: flat indices of a set of tokens into a grid of the sizes
            ``whole``, row by row; None for frames and windows.
        whole: sizes ``(T, H, W)`` of the grid that would arrive here without selection; None if
            the grid was made of frames or windows without it, or pooled and no size tells by how
            much.
    """

    frames: Tensor | None
    windows: Tensor | None
    tokens: Tensor | None
    whole: tuple[int, int, int] | None

    def __new__(
        cls,
        sizes: Sequence[int],
        frames: Tensor | None = None,
        windows: Tensor | None = None,
        tokens: Tensor | None = None,
        whole: Sequence[int] | None = None,
    ) -> "Grid":
        # While a model is traced, sizes are tensors.
        grid = super().__new__(cls, [int(size) for size in sizes])
        grid.frames, grid.windows, grid.tokens = frames, windows, tokens
        if whole is None and not grid.is_selected:
            whole = grid
        grid.whole = None if whole is None else tuple(whole)
        return grid

    def __reduce__(self):
        return Grid, (tuple(self), self.frames, self.windows, self.tokens, self.whole)

    @property
    def is_selected(self) -> bool:
        """Whether a selection was made before."""
        return not (self.frames is None and self.windows is None and self.tokens is None)

    @property
    def is_whole(self) -> bool:
        """Whether all tokens arrive, in their order, though there may have been selections."""
        return tuple(self) == self.whole

    def to(self, device: torch.device) -> "Grid":
        """The same grid, whose tensors are on a device."""
        parts = [self.frames, self.windows, self.tokens]
        if all(part is None or part.device == device for part in parts):
            return self
        parts = [None if part is None else part.to(device) for part in parts]
        return Grid(self, *parts, whole=self.whole)

    def keep_frames(self, kept: Tensor) -> "Grid":
        """The grid of the frames ``kept`` ``(B, k)``, indices into the frames of this one."""
        self._check_no_set()
        frames = kept if self.frames is None else self.frames.gather(1, kept)
        windows = self.windows
        if windows is not None:
            windows = windows.gather(1, kept[:, :, None].expand(-1, -1, 4))
        return Grid((kept.shape[1], *self[1:]), frames, windows, whole=self.whole)

    def crop(self, kept: Tensor, window: tuple[int, int]) -> "Grid":
        """The grid of the windows ``kept`` ``(B*T, 4)`` in this one, each of size ``window``."""
        self._check_no_set()
        windows = kept.unflatten(0, (-1, self[0]))
        if self.windows is not None:
            corners = windows[..., :2] + self.windows[..., :2]
            windows = cat([corners, windows[..., 2:]], dim=2)
        return Grid((self[0], *window), self.frames, windows, whole=self.whole)

    def keep_tokens(self, kept: Tensor, frames: int = 1) -> "Grid":
        """The set of the tokens ``kept``, of ``frames`` frames as many each, 1 for any of a clip.

        Args:
            kept: LongTensor ``(B, n)``, flat indices into this grid ``(T, H, W)``, row by row.
            frames: in how many equal parts the set is divided by frames.
        """
        tokens = self.positions(len(kept), kept.device).gather(1, kept)
        sizes = (frames, 1, kept.shape[1] // frames)
        return Grid(sizes, tokens=tokens, whole=self.whole)

    def positions(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """Where each token comes from: flat indices into the grid of the sizes ``whole``.

        Args:
            batch: number of clips ``B``, if no selection was made before.
            device: of the result, likewise.

        Returns:
            LongTensor ``(B, T*H*W)``, in the order of this grid, row by row.

        Raises:
            ValueError: if that is not known any more.
        """
        if self.whole is None:
            raise ValueError(
                "where these tokens are from is not known any more: windows of one token were "
                "pooled, which does not tell by how much; keep windows of two tokens or more"
            )
        if self.tokens is not None:
            return self.tokens
        frames, height, width = self
        _, all_rows, all_columns = self.whole
        for selected in (self.windows, self.frames):
            if selected is not None:
                batch, device = len(selected), selected.device
        times = self.frames
        if times is None:
            times = torch.arange(frames, device=device).expand(batch, -1)
        rows = torch.arange(height, device=device).expand(batch, frames, -1)
        columns = torch.arange(width, device=device).expand(batch, frames, -1)
        if self.windows is not None:
            rows, columns = rows + self.windows[..., :1], columns + self.windows[..., 1:2]
        places = (times[..., None] * all_rows + rows)[..., None] * all_columns
        return (places + columns[:, :, None]).flatten(1)  # (B, T, H, W) -> (B, T*H*W)

    def pooled(self, sizes: Sequence[int]) -> "Grid":
        """The grid of ``sizes`` that a block makes of this one by pooling.

        A pooled frame or window lies where the middle of what it was pooled from lies, in tokens
        of the pooled grid.
        """
        sizes = Grid(sizes)
        if sizes == self:
            return self
        self._check_no_set()
        # Rounded up, so that as many frames are taken as there are: 5 pooled by 4 are 2.
        time, rows, columns = [-(-a // b) for a, b in zip(self, sizes)]
        if 1 in self[1:]:  # a side of one token stays one: the other side tells
            rows = columns = max(rows, columns)
        ratios = time, rows, columns
        whole = self.whole
        if whole is not None:
            whole = [-(-size // ratio) for size, ratio in zip(whole, ratios)]
        frames, windows = self.frames, self.windows
        if frames is not None and time > 1:
            frames = frames[:, ::time] // time
        if windows is not None:
            top, left = windows[:, ::time, :2].unbind(2)
            corners = [top // rows, left // columns]
            sides = [full_like(top, side) for side in sizes[1:]]
            windows = stack([*corners, *sides], dim=2)
        return Grid(sizes, frames, windows, whole=whole)

    def pooled_by_unknown(self) -> "Grid":
        """This grid before pooling in space: of windows of one token, which do not tell its ratio,
        without :attr:`whole`."""
        if self.windows is None or tuple(self[1:]) != (1, 1) or self.whole is None:
            return self
        return self if self.whole[1:] == (1, 1) else Grid(self, self.frames, self.windows)

    def _check_no_set(self) -> None:
        if self.tokens is not None:
            raise ValueError(
                "frames and windows are selected of a grid, but a set of tokens arrives here: "
                "select them before single tokens, not behind"
            )
