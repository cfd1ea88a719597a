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
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        qkv = _partition(qkv.roll([-size for size in shift], (1, 2, 3)), window[1:])
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        biases = self._biases(x, frames, window, shift, q.dtype)
        counts = [bias.shape[2] // (window[1] * window[2]) for bias in biases]
        parts = [
            self._attend(*one, bias)
            for *one, bias in zip(*(each.split(counts, dim=1) for each in (q, k, v)), biases)
        ]
        out = F.linear(cat(parts, dim=1).flatten(-2), self.proj.weight, self.proj.bias)
        out = F.dropout(out, self.dropout, self.training)
        out = _merge(out, x.shape[3] // window[2], window[2]).roll(shift, (1, 2, 3))
        return out[:, :, :height, :width].contiguous()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention inside the windows of one step in time, ``(B, T, windows, S, heads, D)``.

        Args:
            bias: ``(1 or windows, heads, T*S, T*S [+ 1])``, with a column for the padding if any.
        """
        batch, frames, windows, _, heads, width = q.shape
        # (B, windows * heads, T*S, D)
        q, k, v = (t.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2) for t in (q, k, v))
        if bias.shape[3] > k.shape[2]:
            pad = self._padding(q).unflatten(0, (3, heads, 1, width))
            pad = pad.repeat(1, windows, 1, 1)[:, None].expand(-1, batch, -1, -1, -1)
            k, v = cat([k, pad[1]], dim=2), cat([v, pad[2]], dim=2)
        bias = bias.expand(windows, -1, -1, -1).flatten(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, bias)
        out = out.unflatten(2, (frames, -1)).unflatten(1, (windows, heads))
        return out.permute(0, 3, 1, 4, 2, 5)

    def _padding(self, like: Tensor) -> Tensor:
        """The projection ``(3C,)`` of a padded token."""
        bias = self.qkv.bias
        return like.new_zeros(self.qkv.out_features) if bias is None else bias.to(like.dtype)

    def _biases(
        self, x: Tensor, frames: int, window: list[int], shift: list[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """By step of the windows in time, what is added to the products of queries and keys."""
        time, space = window[0], window[1] * window[2]
        bias = self.get_relative_position_bias(window)  # (1, heads, N, N)
        steps = -(-frames // time)
        masks = None
        if any(shift):
            sizes = steps * time, *x.shape[2:4]
            masks = swin_transformer._compute_attention_mask_3d(x, sizes, window, shift)
            masks = masks.unflatten(0, (steps, -1)).unsqueeze(2)  # (steps, windows, 1, N, N)
        found = []
        for step in range(steps):
            whole = bias if masks is None else bias + masks[step]
            first = step * time + shift[0]
            real = [(first + i) % (steps * time) < frames for i in range(time)]
            if not any(real):
                continue
            rows = _take(whole, real, True, 2, space)
            columns = [_take(rows, real, True, 3, space)]
            if not all(real):
                padding = _take(rows, real, False, 3, space).float()
                columns.append(padding.logsumexp(3, keepdim=True))
            found.append(cat([part.to(dtype) for part in columns], dim=3))
        return found


def _take(x: Tensor, flags: list[bool], flag: bool, dim: int, size: int) -> Tensor:
    """The parts of an axis whose flag it is; each flag is of ``size`` rows."""
    parts = x.split(size, dim)
    return cat([part for part, found in zip(parts, flags) if found is flag], dim=dim)


def _partition(x: Tensor, window: list[int]) -> Tensor:
    """``(B, T, H, W, C)`` to windows in space: ``(B, T, windows, S, C)``."""
    height, width = window
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, T, rows, h, columns, w, C)
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _merge(x: Tensor, columns: int, width: int) -> Tensor:
    """The inverse of :func:`_partition`, of windows in rows of ``columns``, each ``width`` wide."""
    x = x.unflatten(3, (-1, width)).unflatten(2, (-1, columns))  # (B, T, rows, columns, h, w, C)
    return x.transpose(3, 4).flatten(4, 5).flatten(2, 3)
