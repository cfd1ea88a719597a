"""The grid of a model's tokens, with their positions in the clip."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, arange, cat, full_like, stack


class Grid(tuple[int, int, int]):
    """Sizes ``(T, H, W)`` of a grid of tokens; equal to, and unpacked like, a plain tuple.

    It travels from block to block, as the ``thw`` of a call or in the context of the model's call
    (``call_context.Calls``). All attributes count in tokens of the whole grid, which would arrive
    without selection; in training they are what the scores without noise keep.

    A set of tokens that is not a grid has the sizes ``(1, 1, n)``, or ``(T, 1, n)`` with ``n``
    tokens of each frame, and ``tokens`` instead of frames and windows.

    Attributes:
        frames: LongTensor ``(B, T)``, ascending indices of the frames that arrive; None for all.
        windows: LongTensor ``(B, T, 4)``: top, left, height and width of the part of each frame
            that arrives; None for whole frames.
        tokens: LongTensor ``(B, T*H*W)``: flat indices of a set of tokens in the whole grid, row by
            row; None for frames and windows.
        whole: sizes ``(T, H, W)`` of the whole grid; None if the grid was made of frames or windows
            without it, or pooled by an unknown ratio.
    """

    frames: Tensor | None
    windows: Tensor | None
    tokens: Tensor | None
    whole: tuple[int, int, int] | None
    # By a table's length, what `frame_rows` returned; shared by grids of the same frames.
    _frame_rows: dict[int, Tensor]

    def __new__(
        cls,
        sizes: Iterable[int | Tensor],
        frames: Tensor | None = None,
        windows: Tensor | None = None,
        tokens: Tensor | None = None,
        whole: Iterable[int] | None = None,
    ) -> "Grid":
        # While a model is traced, sizes are tensors.
        time, height, width = [int(size) for size in sizes]
        grid = super().__new__(cls, (time, height, width))
        grid.frames, grid.windows, grid.tokens = frames, windows, tokens
        grid._frame_rows = {}
        if whole is None and not grid.is_selected:
            whole = grid
        grid.whole = None
        if whole is not None:
            time, height, width = whole
            grid.whole = time, height, width
        return grid

    def __reduce__(self) -> tuple[Any, ...]:
        return Grid, (tuple(self), self.frames, self.windows, self.tokens, self.whole)

    @property
    def is_selected(self) -> bool:
        """Whether tokens were dropped before."""
        return not (self.frames is None and self.windows is None and self.tokens is None)

    @property
    def is_whole(self) -> bool:
        """Whether all tokens arrive, in their order; selections may have kept all."""
        return tuple(self) == self.whole

    def to(self, device: torch.device) -> "Grid":
        """The same grid with its tensors on a device."""
        parts = [self.frames, self.windows, self.tokens]
        if all(part is None or part.device == device for part in parts):
            return self
        frames, windows, tokens = [part if part is None else part.to(device) for part in parts]
        return Grid(self, frames, windows, tokens, self.whole)

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
        cropped = Grid((self[0], *window), self.frames, windows, whole=self.whole)
        return self._of_same_frames(cropped)

    def keep_tokens(self, kept: Tensor, frames: int = 1) -> "Grid":
        """The set of the tokens ``kept``.

        Args:
            kept: LongTensor ``(B, n)``, flat indices into this grid ``(T, H, W)``, row by row.
            frames: number of frames with the same number of tokens; 1 for any tokens of a clip.
        """
        tokens = self.positions(len(kept), kept.device).gather(1, kept)
        sizes = (frames, 1, kept.shape[1] // frames)
        return Grid(sizes, tokens=tokens, whole=self.whole)

    def keep_all(self, kept: Tensor) -> "Grid":
        """This grid as a selected one; ``kept`` ``(B, T*H*W)`` are all of its tokens."""
        if self.is_selected:
            return self
        return self.keep_frames(arange(self[0], device=kept.device).expand(len(kept), -1))

    def positions(self, batch: int, device: torch.device | str | None = None) -> Tensor:
        """The position of each token: a flat index in the whole grid.

        Args:
            batch: number of clips ``B``; used only if no tokens were dropped.
            device: of the result; likewise.

        Returns:
            LongTensor ``(B, T*H*W)``, in the order of this grid, row by row.

        Raises:
            ValueError: if positions are unknown since a pooling.
        """
        if self.whole is None:
            raise ValueError(
                "the positions of these tokens are unknown: windows of one token were pooled, so "
                "the pooling's ratio cannot be read from their size; keep windows of two tokens or "
                "more"
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
            times = arange(frames, device=device).expand(batch, -1)
        rows = arange(height, device=device).expand(batch, frames, -1)
        columns = arange(width, device=device).expand(batch, frames, -1)
        if self.windows is not None:
            rows, columns = rows + self.windows[..., :1], columns + self.windows[..., 1:2]
        starts = (times[..., None] * all_rows + rows)[..., None] * all_columns
        return (starts + columns[:, :, None]).flatten(1)  # (B, T, H, W) -> (B, T*H*W)

    def pooled(self, sizes: Iterable[int | Tensor]) -> "Grid":
        """The grid of ``sizes`` that a block makes of this one by pooling.

        A pooled frame or window has the position of the middle of its inputs, in tokens of the
        pooled grid.
        """
        sizes = Grid(sizes)
        if sizes == self:
            return self
        self._check_no_set()
        # Rounded up, so that no frame is lost: 5 pooled by 4 gives 2.
        time, rows, columns = [-(-a // b) for a, b in zip(self, sizes)]
        if 1 in self[1:]:  # a side of one token stays one: the other side has the ratio
            rows = columns = max(rows, columns)
        ratios = time, rows, columns
        whole = None
        if self.whole is not None:
            whole = [-(-size // ratio) for size, ratio in zip(self.whole, ratios)]
        frames, windows = self.frames, self.windows
        if frames is not None and time > 1:
            frames = frames[:, ::time] // time
        if windows is not None:
            top, left = windows[:, ::time, :2].unbind(2)
            corners = [top // rows, left // columns]
            sides = [full_like(top, side) for side in sizes[1:]]
            windows = stack([*corners, *sides], dim=2)
        return self._of_same_frames(Grid(sizes, frames, windows, whole=whole))

    def pooled_by_unknown(self) -> "Grid":
        """``self``, or without :attr:`whole` if windows have one token, since their size does not
        show the pooling ratio."""
        if self.windows is None or tuple(self[1:]) != (1, 1) or self.whole is None:
            return self
        if self.whole[1:] == (1, 1):
            return self
        return self._of_same_frames(Grid(self, self.frames, self.windows))

    def frame_rows(self, length: int) -> Tensor:
        """Rows ``(B, T, T)`` of a table of ``length`` relative positions in time.

        Each is the distance of a query's frame from a key's, 0 in the middle of the table; beyond
        its ends, the row at the end. Computed once in a forward pass, however many blocks ask.
        """
        assert self.frames is not None, "all frames arrive"
        if torch.compiler.is_compiling():  # which finds the same expression in all blocks
            return _frame_rows(self.frames, length)
        if length not in self._frame_rows:
            self._frame_rows[length] = _frame_rows(self.frames, length)
        return self._frame_rows[length]

    def _of_same_frames(self, grid: "Grid") -> "Grid":
        """``grid``, which shares what this one computed of its frames if they are the same."""
        if grid.frames is self.frames:
            grid._frame_rows = self._frame_rows
        return grid

    def _check_no_set(self) -> None:
        if self.tokens is not None:
            raise ValueError(
                "frames and windows are selected from a grid, but a set of tokens arrives here: "
                "select frames and windows before single tokens, not after"
            )


def _frame_rows(frames: Tensor, length: int) -> Tensor:
    distances = frames[:, :, None] - frames[:, None, :] + length // 2
    return distances.clamp(0, length - 1)
