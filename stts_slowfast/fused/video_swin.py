"""Replacement of Video Swin's window attention: true distances, and no padding in time."""

import torch
from torch import Tensor, cat, nn
from torch.nn import functional as F
from torchvision.models.video import swin_transformer
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from stts_slowfast import fx_tracing
from stts_slowfast.fused.pooling import find_with
from stts_slowfast.fused.replacement import FuseOptions, Replacement, call_forward
from stts_slowfast.fx_tracing import tracer_of


class SwinAttention(Replacement):
    """Replaces ``ShiftedWindowAttention3d``.

    Behind a selection of windows its relative positions stay true if the grid is smaller than an
    attention window. The original, like Video Swin, then uses the first rows of its index, which
    belong to other positions unless only frames are missing.

    The fused implementation is for clips that are padded in time, as after a selection that leaves
    9 to 15 frames for windows of 8. The original pads tokens by zeros, whose queries are discarded,
    but whose keys and values, the biases of their projections, take part in the attention. Here
    they are one key: since all are equal, its position term is the logarithm of the sum of theirs.

    Args:
        original: the module to replace.
        fuse: whether to use the fused implementation if the clip is padded in time.
        true_distances: whether to keep relative positions true.

    Shapes: tokens ``(B, T, H, W, C)`` in and out.
    """

    def __init__(self, original: nn.Module, fuse: bool = True, true_distances: bool = True):
        super().__init__(original, fuse, true_distances=true_distances)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, ShiftedWindowAttention3d)

    @classmethod
    def build(cls, original: nn.Module, options: FuseOptions) -> "SwinAttention | None":
        fuse = options.fuse and type(original.qkv) is type(original.proj) is nn.Linear
        fuse = fuse and original.attention_dropout == 0.0
        true_distances = options.true_distances and original in options.cropped
        return cls(original, fuse, true_distances) if fuse or true_distances else None

    def sample_inputs(self, generator: torch.Generator) -> list[tuple]:
        whole, channels = self.window_size, find_with(self.qkv, "in_features").in_features
        time, *space = whole
        grids = [whole, [1, *space], [size + 1 for size in whole]]
        grids += [[2 * time - 1, *space]] if time > 1 else []
        return [(torch.randn(1, *grid, channels, generator=generator),) for grid in grids]

    def implementations(self) -> list:
        return [self.forward]

    def forward(self, x: Tensor) -> Tensor:
        if tracer := tracer_of(x):
            return fx_tracing.call(tracer, call_forward, self, x)
        time = self.window_size[0]
        if x.shape[1] > time and x.shape[1] % time and self.is_fused():
            return self.fused(x)
        return type(self.original).forward(self, x)

    def get_relative_position_bias(self, window_size: list[int]) -> Tensor:
        """The bias (1, heads, N, N) of a window of N tokens, (frames, rows, columns)."""
        if not self.true_distances:
            return self.original.get_relative_position_bias(window_size)
        t, h, w = window_size
        index = self.relative_position_index.view(*self.window_size, *self.window_size)
        index = index[:t, :h, :w, :t, :h, :w].reshape(t * h * w, t * h * w)
        return self.relative_position_bias_table[index].permute(2, 0, 1)[None]

    def fused(self, x: Tensor) -> Tensor:
        """As the original, of a clip that it pads in time."""
        _, frames, height, width, _ = x.shape
        window, shift = swin_transformer._get_window_and_shift_size(
            list(self.shift_size), [frames, height, width], list(self.window_size)
        )
        x = F.pad(x, (0, 0, 0, -width % window[2], 0, -height % window[1]))
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias).roll([-size for size in shift], (1, 2, 3))
        qkv = qkv.unflatten(3, (-1, window[2])).unflatten(2, (-1, window[1]))
        # (B, T, rows, columns, h, w, 3, heads, D)
        qkv = qkv.transpose(3, 4).unflatten(-1, (3, self.num_heads, -1))
        # Windows in the last row, or column, contain both ends of the shifted grid.
        sides = [
            [length - 1, 1] if size else [length] for length, size in zip(qkv.shape[2:4], shift[1:])
        ]
        kinds = [len(each) for each in sides]
        out = []
        steps = self._biases(x, frames, window, shift, kinds)
        for step, biases in zip(qkv.split([count for count, _ in steps], 1), steps):
            rows = zip(step.split(sides[0], 2), biases[1].unflatten(0, kinds))
            parts = [
                cat([self._attend(*one) for one in zip(row.split(sides[1], 3), bias)], dim=3)
                for row, bias in rows
            ]
            out.append(cat(parts, dim=2))
        out = cat(out, dim=1).transpose(3, 4).flatten(4, 5).flatten(2, 3)  # (B, T, H, W, C)
        out = F.linear(out, self.proj.weight, self.proj.bias)
        out = F.dropout(out, self.dropout, self.training).roll(shift, (1, 2, 3))
        return out[:, :, :height, :width].contiguous()

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        """Attention of windows of one step in time.

        Args:
            qkv: ``(B, T, rows, columns, h, w, 3, heads, D)``.
            bias: ``(heads, T*h*w, T*h*w [+ 1])``, with a column for the padding if any.

        Returns:
            ``(B, T, rows, columns, h, w, heads*D)``.
        """
        batch, frames, rows, columns, height, width, _, heads, _ = qkv.shape
        qkv = qkv.permute(6, 0, 2, 3, 7, 1, 4, 5, 8).flatten(5, 7).flatten(1, 3)
        q, k, v = qkv.unbind()  # (B * rows * columns, heads, T*h*w, D)
        if bias.shape[2] > k.shape[2]:
            pad = self._padding(q).unflatten(0, (3, 1, heads, 1, -1)).expand(-1, len(q), -1, -1, -1)
            k, v = cat([k, pad[1]], dim=2), cat([v, pad[2]], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, bias[None].to(q.dtype))
        out = out.unflatten(2, (frames, height, width)).unflatten(0, (batch, rows, columns))
        return out.permute(0, 4, 1, 2, 5, 6, 3, 7).flatten(6)

    def _padding(self, like: Tensor) -> Tensor:
        """The projection ``(3C,)`` of a padded token."""
        bias = self.qkv.bias
        return like.new_zeros(self.qkv.out_features) if bias is None else bias.to(like.dtype)

    def _biases(
        self, x: Tensor, frames: int, window: list[int], shift: list[int], kinds: list[int]
    ) -> list[tuple[int, Tensor]]:
        """By step of the windows in time, the frames that are not padding, and what is added to the
        products of queries and keys in each kind of window: ``(kinds, heads, N, N [+ 1])``.
        """
        time, space = window[0], window[1] * window[2]
        bias = self.get_relative_position_bias(window)  # (1, heads, N, N)
        steps, masks = -(-frames // time), None
        if any(shift):
            sizes = steps * time, kinds[0] * window[1], kinds[1] * window[2]
            masks = swin_transformer._compute_attention_mask_3d(x, sizes, window, shift)
            masks = masks.unflatten(0, (steps, -1)).unsqueeze(2)  # (steps, kinds, 1, N, N)
        found = []
        for step in range(steps):
            whole = bias if masks is None else bias + masks[step]
            first = step * time + shift[0]
            real = [(first + i) % (steps * time) < frames for i in range(time)]
            rows = _take(whole, real, True, 2, space)
            columns = [_take(rows, real, True, 3, space)]
            if not all(real):
                padding = _take(rows, real, False, 3, space)
                columns.append(padding.logsumexp(3, keepdim=True))
            found.append((sum(real), cat(columns, dim=3)))
        return found


def _take(x: Tensor, flags: list[bool], flag: bool, dim: int, size: int) -> Tensor:
    """The parts of an axis whose flag it is; each flag is of ``size`` rows."""
    parts = x.split(size, dim)
    return cat([part for part, found in zip(parts, flags) if found is flag], dim=dim)
