"""Windows of a token grid: cropped, and their weighted sum without a copy of each."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from stts_slowfast.topk import autocast_disabled, is_cpu

# Height and width in tokens.
WindowSize = tuple[int, int]


def crop_windows(grid: Tensor, corners: Tensor, window: WindowSize) -> Tensor:
    """One window of each frame.

    Args:
        grid: ``(B, T, H, W, C)``.
        corners: LongTensor ``(B*T, 2)``, top and left of the window of each frame.
        window: its height and width.

    Returns:
        ``(B, T, h, w, C)``.
    """
    batch, frames = grid.shape[:2]
    device = grid.device
    # Four index tensors that broadcast to (B, T, h, w): one copy, whatever the strides.
    clips = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    times = torch.arange(frames, device=device).view(-1, 1, 1)
    top, left = corners.view(batch, frames, 2).unbind(2)
    rows = top[:, :, None] + torch.arange(window[0], device=device)  # (B, T, h)
    columns = left[:, :, None] + torch.arange(window[1], device=device)  # (B, T, w)
    return grid[clips, times, rows[..., None], columns[..., None, :]]


def mix_windows(grid: Tensor, weights: Tensor, window: WindowSize, steps: WindowSize) -> Tensor:
    """``sum_i weights[..., i] * window_i(grid)`` of each frame.

    Args:
        grid: (B, T, H, W, C).
        weights: (B, T, rows * columns), for windows row by row; dtype of the grid.
        window: a window's height and width.
        steps: tokens between two windows, down and to the right.

    Returns:
        (B, T, *window, C).
    """
    # On a CPU the convolution takes two to four times as long, and kernel launches are free.
    if is_cpu(grid):
        return _MixWindows.apply(grid, weights, window, steps)
    return _convolve(grid, weights, window, steps)


def _convolve(grid: Tensor, weights: Tensor, window: WindowSize, steps: WindowSize) -> Tensor:
    """The same as a depthwise convolution: frames are its channels, channels its batch, a frame's
    weights its kernel, and steps the dilation. One launch for each direction, however many windows.
    """
    batch, frames, *sizes, _ = grid.shape
    rows, columns = ((size - side) // step + 1 for size, side, step in zip(sizes, window, steps))
    height, width = (rows - 1) * steps[0] + window[0], (columns - 1) * steps[1] + window[1]
    covered = grid[:, :, :height, :width].permute(4, 0, 1, 2, 3).flatten(1, 2)  # (C, B*T, ...)
    kernels = weights.reshape(batch * frames, 1, rows, columns)
    with autocast_disabled(grid):
        mixed = F.conv2d(covered, kernels, dilation=steps, groups=batch * frames)
    return mixed.unflatten(1, (batch, frames)).permute(1, 2, 3, 4, 0)


class _MixWindows(torch.autograd.Function):
    """One window after the other into one output.

    Differentiating the plain sum would build a full-size gradient of the grid per window.
    """

    @staticmethod
    def forward(
        ctx: Any, grid: Tensor, weights: Tensor, window: WindowSize, steps: WindowSize
    ) -> Tensor:
        # grid (B, T, H, W, C), weights (B, T, rows * columns)
        ctx.save_for_backward(grid, weights)
        ctx.window, ctx.steps = window, steps
        batch, frames, _, _, channels = grid.shape
        mixed = grid.new_zeros(batch, frames, *window, channels)
        for i, (rows, columns) in enumerate(_windows(grid, window, steps)):
            mixed.addcmul_(grid[:, :, rows, columns], weights[:, :, i, None, None, None])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grid, weights = ctx.saved_tensors
        grad_grid = torch.zeros(grid.shape, dtype=grid.dtype, device=grid.device)
        grad_weights = []
        for i, (rows, columns) in enumerate(_windows(grid, ctx.window, ctx.steps)):
            grad_grid[:, :, rows, columns].addcmul_(grad_output, weights[:, :, i, None, None, None])
            overlap = grid[:, :, rows, columns] * grad_output
            dtype = torch.promote_types(overlap.dtype, torch.float32)
            grad_weights.append(overlap.sum(dim=(2, 3, 4), dtype=dtype))
        return grad_grid, torch.stack(grad_weights, dim=2).to(weights.dtype), None, None


def _windows(grid: Tensor, window: WindowSize, steps: WindowSize) -> Iterator[tuple[slice, slice]]:
    """The slices of rows and columns of every window, row by row."""
    (height, width), (side_h, side_w) = grid.shape[2:4], window
    for top in range(0, height - side_h + 1, steps[0]):
        for left in range(0, width - side_w + 1, steps[1]):
            yield slice(top, top + side_h), slice(left, left + side_w)
