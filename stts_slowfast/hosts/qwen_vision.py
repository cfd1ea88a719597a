"""The vision towers of Qwen's video language models in transformers: clips of any sizes, packed.

A call takes the patches of all clips in one sequence ``(N, C)`` and their sizes in ``grid_thw``.
A merger after the last block makes one token of ``m*m`` patches, which are consecutive in the
sequence, so selection takes such units: a cell of the grid has ``m*m*C`` channels. Blocks attend
within each frame by ``cu_seqlens``, and get rotary positions that were made once for all patches.
An image is a clip of one frame.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, cat, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.host import Args, ForeignModule, Host, Kwargs, Tokens, is_instance_of

NAMES = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
    "Qwen3VLMoeVisionModel",
    "Qwen3_5VisionModel",
    "Qwen3_5MoeVisionModel",
)


class CutDeepstack:
    """The tower's ``forward`` after a selection: features of earlier blocks, cut to output tokens.

    The language model adds them to the tokens of the last block.
    """

    def __init__(self, model: ForeignModule):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original method."""
        model = self.model
        output = type(model).forward(model, *args, **kwargs)
        if features := getattr(output, "deepstack_features", None):
            grids = model.stts.calls.open_call().grids
            last = grids[max(grids)]
            for i, number in enumerate(model.deepstack_visual_indexes):
                index = _among(last, grids[number], features[i].device)
                features[i] = features[i][index]
        return output


class QwenVision(Host):
    """The towers of Qwen2-VL, Qwen3-VL and Qwen3.5, dense and with experts."""

    def __init__(self, model: ForeignModule):
        self.merge: int = model.spatial_merge_size
        self.unit = self.merge**2

    @staticmethod
    def blocks(model: ForeignModule) -> Sequence[nn.Module]:
        if is_instance_of(model, "transformers", "Qwen2_5_VisionTransformerPretrainedModel"):
            raise ValueError(
                "tokens of Qwen2.5-VL's vision tower cannot be selected: its blocks attend in "
                "windows of whole frames, and it reorders tokens by their index among all; the "
                "towers of Qwen2-VL, Qwen3-VL and Qwen3.5 can be served"
            )
        return list(model.blocks) if is_instance_of(model, "transformers", *NAMES) else ()

    def channels(self, block: nn.Module) -> int:
        return super().channels(block) * self.unit

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        return True

    def prepare(self, model: ForeignModule, blocks: Sequence[nn.Module]) -> None:
        if hasattr(model, "deepstack_visual_indexes"):
            model.forward = CutDeepstack(model)

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        vars(model).pop("forward", None)

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> list[Grid]:
        sizes = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        return [Grid((t, h // self.merge, w // self.merge)) for t, h, w in sizes.tolist()]

    def unpack(self, args: Args, kwargs: Kwargs, thw: list[Grid] | None) -> list[Tokens]:
        if thw is None:
            raise ValueError("a block was called outside of a call of its model: call the model")
        counts = [prod(grid) * self.unit for grid in thw]
        if args[0].dim() != 2 or len(args[0]) != sum(counts):
            raise ValueError(
                f"tokens of shape {tuple(args[0].shape)} do not make grids of "
                f"{', '.join('x'.join(map(str, grid)) for grid in thw)} times {self.unit} patches"
            )
        clips = args[0].split(counts)
        return [Tokens(x.reshape(1, *grid, -1), grid) for x, grid in zip(clips, thw)]

    def pack(self, tokens: list[Tokens], args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        width = args[0].shape[1]
        return (cat([clip.grid.reshape(-1, width) for clip in tokens]), *args[1:]), kwargs

    def adapt_call(
        self, block: nn.Module, thw: list[Grid], args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        if not any(grid.is_selected for grid in thw):
            return args, kwargs
        device = args[0].device
        patches = torch.arange(self.unit, device=device)
        cells = _positions(thw, device)
        index = (cells[:, None] * self.unit + patches).flatten()
        lengths = [height * width * self.unit for time, height, width in thw for _ in range(time)]
        ends = torch.tensor([0, *lengths], device=device).cumsum(0)
        changed: Kwargs = {
            "cu_seqlens": ends.to(kwargs["cu_seqlens"].dtype),
            "position_embeddings": tuple(part[index] for part in kwargs["position_embeddings"]),
        }
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = max(lengths)
        return args, {**kwargs, **changed}


def _positions(thw: list[Grid], device: torch.device) -> Tensor:
    """The position of each cell of packed clips, ``(N,)``, among all cells of all clips."""
    starts = [sum(prod(grid.whole or ()) for grid in thw[:i]) for i in range(len(thw))]
    return cat([grid.positions(1, device)[0] + start for grid, start in zip(thw, starts)])


def _among(few: list[Grid], many: list[Grid], device: torch.device) -> Tensor:
    """Indices in ``many`` of the cells of ``few``, ``(n,)``; both are in ascending order."""
    return torch.searchsorted(_positions(many, device), _positions(few, device))
