"""Scorers of frames and windows: learned, uniform, random and change."""

from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

# By the names of STTS.TIME.SCORER and STTS.SPACE.SCORER: functions of ("TIME" or "SPACE", channels
# of a token) that make a scorer, a module called as
#   frame scorer:  (grid (B, T, H, W, C), keep) -> (B, T), where keep is the number of frames kept;
#   window scorer: (grid (B, T, H, W, C), window, stride) -> (B*T, rows * columns), one score per
#                  window position, row by row; window and stride are (height, width) in tokens.
# Scores are float32 and in any range: the selector normalises them.
SCORERS = Registry("SCORERS")


class ScoreNetwork(nn.Module):
    """The paper's lightweight scorer of tokens (arXiv 2111.11591, section 3.2).

    LayerNorm, Linear, GELU; half of the channels is then replaced by its mean over the tokens, so
    that each score depends on all tokens; three more linear layers give the score.

    Args:
        width: channels of a token, a multiple of 4.
    """

    def __init__(self, width: int):
        super().__init__()
        if width % 4:
            raise ValueError(
                f"a score network halves its width twice: {width} must be a multiple of 4"
            )
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 1),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores ``(N, n)`` in float32 of tokens ``(N, n, width)``."""
        norm: Any = self.embed[0]
        x = self.embed(tokens.to(norm.weight.dtype))  # linear layers may be quantised
        own, shared = x.chunk(2, dim=2)
        x = torch.cat([own, shared.mean(dim=1, keepdim=True).expand_as(own)], dim=2)
        return self.score(x).squeeze(2).float()


class LearnedFrameScorer(nn.Module):
    """A network scores each frame's descriptor, the mean and the maximum over its tokens.

    Args:
        channels: channels of a token.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.network = ScoreNetwork(2 * channels)

    def forward(self, grid: Tensor, keep: int) -> Tensor:
        """Scores ``(B, T)`` of the frames of ``(B, T, H, W, C)``."""
        tokens = grid.flatten(2, 3)  # (B, T, H*W, C)
        descriptors = torch.cat([tokens.mean(dim=2), tokens.amax(dim=2)], dim=2)  # (B, T, 2C)
        return self.network(descriptors)


class UniformFrameScorer(nn.Module):
    """Scores evenly spaced frames 1, each in the middle of an equal part of the clip; others 0."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, keep: int) -> Tensor:
        """Scores ``(B, T)`` of the frames of ``(B, T, H, W, C)``."""
        batch, frames = grid.shape[:2]
        marked = torch.arange(keep, device=grid.device) * 2 + 1
        marked = (marked * frames).div(2 * keep, rounding_mode="floor")
        scores = torch.zeros(frames, device=grid.device).index_fill(0, marked, 1.0)
        return scores.expand(batch, frames)


class RandomFrameScorer(nn.Module):
    """Samples every frame's score, also in evaluation."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, keep: int) -> Tensor:
        """Scores ``(B, T)`` of the frames of ``(B, T, H, W, C)``."""
        return torch.rand(grid.shape[:2], device=grid.device)


class LearnedWindowScorer(nn.Module):
    """A network scores every token of a frame; a window's score is the mean over its tokens.

    Args:
        channels: channels of a token.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.network = ScoreNetwork(channels)

    def forward(self, grid: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Scores ``(B*T, rows * columns)`` of the windows of ``(B, T, H, W, C)``."""
        batch, frames, height, width, channels = grid.shape
        tokens = grid.reshape(batch * frames, height * width, channels)
        scores = self.network(tokens).view(-1, 1, height, width)
        return F.avg_pool2d(scores, window, stride).flatten(1)


class UniformWindowScorer(nn.Module):
    """Scores a window by its nearness to the middle of the frame; of two, the upper left wins."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Scores ``(B*T, rows * columns)`` of the windows of ``(B, T, H, W, C)``."""
        distances = []
        for size, side, step in zip(grid.shape[2:4], window, stride):
            first = torch.arange(0, size - side + 1, step, device=grid.device)
            middle = (size - side) / 2
            distance = (first - middle).abs()
            if (size - side) % step == 0 and (size - side) // step % 2:  # two are equally near
                distance = distance + 0.25 * (first > middle)
            distances.append(distance)
        scores = -(distances[0][:, None] + distances[1]).flatten()
        return scores.expand(grid.shape[0] * grid.shape[1], -1)


class RandomWindowScorer(nn.Module):
    """Samples every window's score, also in evaluation."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Scores ``(B*T, rows * columns)`` of the windows of ``(B, T, H, W, C)``."""
        batch, frames, height, width = grid.shape[:4]
        rows, columns = (
            (size - side) // step + 1 for size, side, step in zip((height, width), window, stride)
        )
        return torch.rand(batch * frames, rows * columns, device=grid.device)


def frame_difference(grid: Tensor) -> Tensor:
    """Mean squared difference of each token from the same position one frame before:
    ``(B, T-1, H, W)``."""
    return (grid[:, 1:] - grid[:, :-1]).float().square().mean(dim=4)


class FrameDifferenceScorer(nn.Module):
    """Scores a frame by its difference from the one before; the first as the highest of them."""

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, keep: int) -> Tensor:
        """Scores ``(B, T)`` of the frames of ``(B, T, H, W, C)``."""
        if grid.shape[1] == 1:
            return torch.zeros(grid.shape[:2], device=grid.device)
        scores = frame_difference(grid).mean(dim=(2, 3))  # (B, T-1)
        return torch.cat([scores.amax(dim=1, keepdim=True), scores], dim=1)


class WindowDifferenceScorer(nn.Module):
    """Scores a window by its difference from the same window one frame before.

    In the first frame, from the same window one frame later.
    """

    def __init__(self, channels: int):
        super().__init__()

    def forward(self, grid: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        """Scores ``(B*T, rows * columns)`` of the windows of ``(B, T, H, W, C)``."""
        scores = torch.zeros(grid.shape[:4], device=grid.device)
        if grid.shape[1] > 1:
            scores = frame_difference(grid)
            scores = torch.cat([scores[:, :1], scores], dim=1)  # (B, T, H, W)
        return F.avg_pool2d(scores.flatten(0, 1)[:, None], window, stride).flatten(1)


@SCORERS.register()
def learned(dimension: str, channels: int) -> nn.Module:
    """Score networks, trained with the model."""
    return (LearnedFrameScorer if dimension == "TIME" else LearnedWindowScorer)(channels)


@SCORERS.register()
def uniform(dimension: str, channels: int) -> nn.Module:
    """Evenly spaced frames, or the window nearest to the middle."""
    return (UniformFrameScorer if dimension == "TIME" else UniformWindowScorer)(channels)


@SCORERS.register()
def random(dimension: str, channels: int) -> nn.Module:
    """Random scores."""
    return (RandomFrameScorer if dimension == "TIME" else RandomWindowScorer)(channels)


@SCORERS.register()
def change(dimension: str, channels: int) -> nn.Module:
    """Differences from the frame before."""
    return (FrameDifferenceScorer if dimension == "TIME" else WindowDifferenceScorer)(channels)


def minmax_normalize(scores: Tensor) -> Tensor:
    """Min-max normalises each row of ``scores`` ``(N, d)``: ``(s - min) / (max - min + 1e-5)``."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low + 1e-5)
