"""Moves all frames of a clip by one affine map, with the pixels that PIL would give.

A map is the same for all frames, so it is made once, as a sparse matrix from input to output pixels
(4 or 16 weights in a row), and multiplied with all frames and channels at a time. Neither PIL's
bicubic kernel (a = -1) nor its border is that of ``torch.nn.functional.grid_sample``.
"""

import warnings

import torch
from torch import Tensor

GREY = 128
Box = tuple[int, int, int, int]  # top, left, height, width


def warp(clip: Tensor, matrix: tuple[float, ...], bicubic: bool, box: Box | None = None) -> Tensor:
    """Frames (T, 3, H, W) uint8 as ``Image.transform`` with ``Image.AFFINE`` and grey outside; of
    the result the part ``box``.

    Args:
        matrix: (a, b, c, d, e, f): the output pixel (x, y) shows the input at
            (a x + b y + c, d x + e y + f), all at the middle of pixels.
        bicubic: else bilinear.
    """
    frames, channels, height, width = clip.shape
    top, left, out_height, out_width = box or (0, 0, height, width)
    y, x = torch.meshgrid(
        torch.arange(top, top + out_height, dtype=torch.float64) + 0.5,
        torch.arange(left, left + out_width, dtype=torch.float64) + 0.5,
        indexing="ij",
    )
    a, b, c, d, e, f = matrix
    from_x, from_y = (a * x + b * y + c).flatten(), (d * x + e * y + f).flatten()
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    columns, across = _taps(from_x[inside], width, bicubic)  # (taps, N)
    rows, down = _taps(from_y[inside], height, bicubic)
    places = (rows[:, None] * width + columns[None]).flatten(0, 1)  # (taps^2, N)
    weights = (down[:, None] * across[None]).flatten(0, 1)
    ends = torch.zeros(len(inside) + 1, dtype=torch.int32)  # rows outside have no weights
    torch.cumsum(inside, 0, out=ends[1:]).mul_(len(places))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        sampler = torch.sparse_csr_tensor(
            ends,
            places.T.flatten().int(),
            weights.T.flatten(),
            (len(inside), height * width),
            check_invariants=False,
        )
    pixels = torch.empty(height, width, frames, channels).copy_(clip.permute(2, 3, 0, 1))
    out = sampler @ pixels.view(height * width, frames * channels)
    out = out.round_().clamp_(0, 255).to(torch.uint8)
    out.index_fill_(0, (~inside).nonzero()[:, 0], GREY)
    return out.view(out_height, out_width, frames, channels).permute(2, 3, 0, 1)


def _taps(position: Tensor, size: int, bicubic: bool) -> tuple[Tensor, Tensor]:
    """Which pixels along one axis make up the value at each position (N,), those beyond the border
    being the border's, and with what weights: (taps, N) int32 and float32."""
    position = position - 0.5
    before = position.floor()
    t = (position - before).float()
    if bicubic:  # cubic convolution with a = -1
        weights = [
            t * (t * (2 - t) - 1),
            1 + t * t * (t - 2),
            t * (1 + t * (1 - t)),
            t * t * (t - 1),
        ]
    else:
        weights = [1 - t, t]
    weights = torch.stack(weights)
    offsets = torch.arange(len(weights), dtype=torch.int32)[:, None] - int(bicubic)
    used = weights.any(1)  # along the axis that a shear or shift leaves alone it is one pixel
    return (before.int() + offsets[used]).clamp(0, size - 1), weights[used]
