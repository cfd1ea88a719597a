"""Video transformers of research code with ``x = block(x)``, such as VideoMAE, VideoMAE v2 and UMT.

They are recognised by their structure: ``patch_embed.proj`` makes tubelets of clips
``(B, 3, T, H, W)``, there is no cls token, blocks take only ``x``, and a block computes the same
for tokens in any order and number (checked when selectors are attached), so that it does not depend
on positions.
"""

import copy
from collections.abc import Sequence
from inspect import signature

import torch
from torch import nn

from stts_slowfast.call_context import first_tensor
from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs
from stts_slowfast.hosts.token_sequence import TokenSequenceHost


class PlainVideoViT(TokenSequenceHost):
    """``model.blocks`` behind ``model.patch_embed``, a convolution whose patches do not overlap."""

    def __init__(self, model: ForeignModule):
        time, rows, columns = model.patch_embed.proj.stride
        self.patch = time, rows, columns
        if getattr(model, "stts", None) is None:
            for block in {type(block): block for block in model.blocks}.values():
                _check_order_is_free(block, self.channels(block))

    @staticmethod
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        blocks = getattr(model, "blocks", None)
        projection = getattr(getattr(model, "patch_embed", None), "proj", None)
        if not isinstance(blocks, nn.ModuleList) or not isinstance(projection, nn.Conv3d):
            return ()
        if any(len(signature(type(block).forward).parameters) != 2 for block in blocks):
            return ()  # not only self and x
        if projection.kernel_size != projection.stride or any(projection.padding):
            return ()
        for name, value in {**vars(model), **model._parameters}.items():
            if "cls" in name and "token" in name and value is not None:
                raise ValueError(
                    f"tokens of this {type(model).__name__} cannot be selected: it has a {name}, "
                    "whose index among the tokens only its code defines: write a host for it "
                    "(projects/stts/extending.md)"
                )
        return list(blocks)

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return self.by_frame

    def entry(self, model: ForeignModule) -> nn.Module:
        embeddings: nn.Module = model.patch_embed
        return embeddings

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Grid:
        sizes = first_tensor(args, kwargs).shape[2:]
        return Grid(size // side for size, side in zip(sizes, self.patch or ()))

    def default_grid(self) -> Grid | None:
        return None


@torch.no_grad()
def _check_order_is_free(block: nn.Module, channels: int) -> None:
    """Raises if a block's output depends on the order of tokens, or it takes no few tokens."""
    trial = copy.deepcopy(block)
    if any(p.is_meta or not p.is_floating_point() for p in trial.parameters()):
        return  # offloaded or quantised weights: the check cannot run
    for module in trial.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    trial = trial.eval().float()
    device = next(trial.parameters()).device
    x = torch.arange(6.0 * channels, device=device).mul(0.7).sin().view(1, 6, channels)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=device)
    why = "depend on the order of tokens"
    try:
        forward, shuffled = trial(x), trial(x[:, order])
        same = isinstance(forward, torch.Tensor) and forward.shape == x.shape
        same = same and torch.allclose(forward[:, order], shuffled, rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        same, why = False, f"do not take 6 tokens ({error})"
    if not same:
        raise ValueError(
            f"tokens of a model with {type(block).__name__} cannot be selected: its blocks {why}, "
            "so they need the kept positions: write a host for it (projects/stts/extending.md)"
        )
