"""TimeSformer of transformers: tokens in the order (h, w, t), layers that read sizes from a config.

A layer with divided attention reads ``num_frames`` and the width of a frame from the config that
all layers share. After a selection fewer tokens arrive, so each such layer gets a config with two
sizes of its own, those of the thread's last call; the shared config, other models and what
``save_pretrained`` writes do not change.
"""

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts.hf_video import HFVideoHost
from stts_slowfast.hosts.host import Args, ForeignModule, Kwargs


class LayerConfig:
    """A config with the sizes of one layer's grid in its last call; the rest is shared."""

    def __init__(self, config: Any):
        self.shared, self.own = config, threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return LayerConfig, (self.shared,)

    def set(self, num_frames: int, image_size: int) -> None:
        self.own.num_frames, self.own.image_size = num_frames, image_size

    @property
    def num_frames(self) -> int:
        frames: int = getattr(self.own, "num_frames", self.shared.num_frames)
        return frames

    @property
    def image_size(self) -> int:
        side: int = getattr(self.own, "image_size", self.shared.image_size)
        return side

    def __getattr__(self, name: str) -> Any:
        if name in ("shared", "own") or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.shared, name)


class HFTimeSformer(HFVideoHost):
    """``TimesformerModel`` and ``TimesformerForVideoClassification``."""

    classes = ("TimesformerPreTrainedModel",)
    prefix = 1

    def __init__(self, model: ForeignModule):
        super().__init__(model)
        attention = model.config.attention_type
        # With attention in space only, each frame is an entry of the batch with its cls token.
        self.by_frame = attention == "space_only"
        self.divided = attention == "divided_space_time"
        self.side = self.patch[2] if self.patch else 1

    def selects_tokens_by_frame(self, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
        if self.divided:
            raise ValueError("its blocks attend over time at each position of a frame")
        return super().selects_tokens_by_frame(model, blocks)

    def prepare(self, model: nn.Module, blocks: Sequence[ForeignModule]) -> None:
        for block in blocks:
            block.config = LayerConfig(block.config)

    def restore(self, model: nn.Module, blocks: Sequence[ForeignModule]) -> None:
        for block in blocks:
            block.config = block.config.shared

    def call_grid(self, model: nn.Module, args: Args, kwargs: Kwargs) -> Grid | None:
        grid = super().call_grid(model, args, kwargs)
        if grid is not None and self.divided and grid[0] != self.sizes[0]:
            raise ValueError(
                f"this clip has {grid[0]} frames, but layers of TimeSformer with divided attention "
                f"assume config.num_frames ({self.sizes[0]}) frames in every clip, and would mix "
                "frames with positions: pass that many frames, or set config.num_frames "
                "before attach"
            )
        return grid

    def adapt_call(
        self, block: ForeignModule, thw: Grid, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        frames, _, width = thw
        block.config.set(frames, width * self.side)
        return args, kwargs

    def unflatten_grid(self, x: Tensor, thw: Grid) -> Tensor:
        frames, height, width = thw
        return x.unflatten(1, (height, width, frames)).permute(0, 3, 1, 2, 4)

    def flatten_grid(self, grid: Tensor) -> Tensor:
        return grid.permute(0, 2, 3, 1, 4).flatten(1, 3)
