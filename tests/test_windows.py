"""The weighted sum of windows is the sum as it is written down, with its gradients."""

import pytest
import torch

from stts_slowfast import windows

# Sizes, window and steps; of the last the windows do not reach the edge.
CASES = [((7, 7), (6, 6), (1, 1)), ((8, 6), (4, 3), (1, 1)), ((9, 8), (4, 4), (2, 3))]


def spelled_out(grid, weights, window, steps):
    total, number = 0.0, 0
    for top in range(0, grid.shape[2] - window[0] + 1, steps[0]):
        for left in range(0, grid.shape[3] - window[1] + 1, steps[1]):
            part = grid[:, :, top : top + window[0], left : left + window[1]]
            total = total + weights[:, :, number, None, None, None] * part
            number += 1
    assert number == weights.shape[2]
    return total


@pytest.mark.parametrize("sizes, window, steps", CASES)
@pytest.mark.parametrize("device", ["cpu", "other"])
def test_windows_are_summed_with_their_weights(monkeypatch, device, sizes, window, steps):
    monkeypatch.setattr(windows, "is_cpu", lambda tensor: device == "cpu")
    counts = [(s - w) // step + 1 for s, w, step in zip(sizes, window, steps)]
    grid = torch.randn(2, 3, *sizes, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, counts[0] * counts[1], dtype=torch.float64, requires_grad=True)
    expected = spelled_out(grid, weights, window, steps)
    mixed = windows.mix_windows(grid, weights, window, steps)
    torch.testing.assert_close(mixed, expected)
    up = torch.randn_like(mixed)
    for ours, theirs in zip(
        torch.autograd.grad(mixed, (grid, weights), up),
        torch.autograd.grad(expected, (grid, weights), up),
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_does_not_round_the_grid(monkeypatch):
    monkeypatch.setattr(windows, "is_cpu", lambda tensor: False)
    grid, weights = torch.randn(1, 2, 4, 4, 3), torch.rand(1, 2, 4)
    plain = windows.mix_windows(grid, weights, (3, 3), (1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(windows.mix_windows(grid, weights, (3, 3), (1, 1)), plain)
