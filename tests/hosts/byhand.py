"""Selection by hand, for comparison: the tokens that ``selections`` says were kept."""

import torch


def frames(grid, kept):
    """The frames ``kept`` (B, k) of a grid (B, T, H, W, C)."""
    return torch.stack([clip[index] for clip, index in zip(grid, kept)])


def windows(grid, kept):
    """The windows ``kept`` (B*T, 4) of a grid (B, T, H, W, C)."""
    crops = [
        frame[top : top + height, left : left + width]
        for frame, (top, left, height, width) in zip(grid.flatten(0, 1), kept.tolist())
    ]
    return torch.stack(crops).unflatten(0, grid.shape[:2])
