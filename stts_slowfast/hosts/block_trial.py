"""Trials of blocks called as ``x, thw = block(x, thw)``: whether they need a grid of tokens."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from stts_slowfast.grid import Grid


def one_of_each(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """A block of each kind: equal in text and in the shapes of its parameters."""
    kinds = {(str(b), *(tuple(p.shape) for p in b.parameters())): b for b in blocks}
    return list(kinds.values())


@torch.no_grad()
def sees_frames_alone(block: nn.Module, channels: int) -> bool:
    """Whether a block computes each frame of tokens alone.

    Raises:
        ValueError: if its output depends on which tokens are neighbours, or it cannot be tried.
    """
    if any(p.is_meta or not p.is_floating_point() for p in block.parameters()):
        raise ValueError("its blocks cannot be tried with offloaded or quantised weights")
    trial, draw = copy.deepcopy(block).float().cpu().eval(), torch.Generator().manual_seed(0)
    for module in trial.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    for parameter in trial.parameters():  # weights of zero would hide what they multiply
        scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))
    tokens, other = torch.randn(2, 1, 8, channels, generator=draw)
    thw = Grid((2, 1, 3))
    for count in (8, 7, 6):  # 2 frames of 3 tokens; a cls token a frame, one, or none
        try:
            found = trial(tokens[:, :count], thw)[0]
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue
        if found.shape == tokens[:, :count].shape:
            break
    else:
        raise ValueError("its blocks pool, or attend in windows or by positions of a grid")
    first, second = slice(0, count // 2), slice(count - 3, count)
    order = torch.arange(count)
    order[second] = order[second].flip(0)
    moved = trial(tokens[:, :count][:, order], thw)[0]
    if not torch.allclose(moved, found[:, order], rtol=1e-3, atol=1e-4):
        raise ValueError("its blocks pool, or attend in windows or by positions of a grid")
    changed = tokens[:, :count].clone()
    changed[:, second] = other[:, second]
    return torch.allclose(trial(changed, thw)[0][:, first], found[:, first], rtol=1e-4, atol=1e-5)
