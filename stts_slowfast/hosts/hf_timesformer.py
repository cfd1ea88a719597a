"""TimeSformer of transformers: tokens in the order (h, w, t), layers that ask the config for it.

A layer with divided attention reads ``num_frames`` and the width of a frame from the config that
all layers share. Behind a selection fewer arrive, so each such layer gets a view of the config with
its own two numbers, those of the thread's last call; the config itself, other models and what is
saved stay as they are.
"""

import threading
from collections.abc import Sequence

from torch import Tensor, nn

from stts_slowfast.grid import Grid
from stts_slowfast.hosts import HOSTS, is_instance_of
from stts_slowfast.hosts.token_sequence import TokenSequenceHost, inner, pair, patches


class LayerConfig:
    """A view of a config that has the sizes of one layer's grid as of its last call."""

    def __init__(self, config):
        self.shared, self.own = config, threading.local()

    def __reduce__(self):
        return LayerConfig, (self.shared,)

    def set(self, num_frames: int, image_size: int) -> None:
        self.own.num_frames, self.own.image_size = num_frames, image_size

    @property
    def num_frames(self) -> int:
        return getattr(self.own, "num_frames", self.shared.num_frames)

    @property
    def image_size(self) -> int:
        return getattr(self.own, "image_size", self.shared.image_size)

    def __getattr__(self, name: str):
        if name in ("shared", "own") or name.startswith("__"):  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.shared, name)


@HOSTS.register()
class HFTimeSformer(TokenSequenceHost):
    """``TimesformerModel`` and ``TimesformerForVideoClassification``."""

    prefix = 1

    def __init__(self, model: nn.Module):
        config = model.config
        self.patch = (1, *pair(config.patch_size))
        self.sizes = patches(config.num_frames, config.image_size, self.patch)
        # With attention in space only, each frame is an entry of the batch with its cls token.
        self.by_frame = config.attention_type == "space_only"
        self.divided = config.attention_type == "divided_space_time"

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        if not is_instance_of(model, "transformers", "TimesformerPreTrainedModel"):
            return ()
        return inner(model).encoder.layer

    def entry(self, model: nn.Module) -> nn.Module:
        return inner(model).embeddings

    def prepare(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for block in blocks:
            block.config = LayerConfig(block.config)

    def restore(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        for block in blocks:
            block.config = block.config.shared

    def call_grid(self, model: nn.Module, args: tuple, kwargs: dict) -> Grid:
        grid = super().call_grid(model, args, kwargs)
        if self.divided and grid[0] != self.sizes[0]:
            raise ValueError(
                f"this clip has {grid[0]} frames, but layers of TimeSformer with divided attention "
                f"take every clip for config.num_frames ({self.sizes[0]}) frames, and would mix "
                "frames with places: give as many, or set config.num_frames before attach"
            )
        return grid

    def adapt_call(self, block: nn.Module, thw: Grid, args: tuple, kwargs: dict):
        frames, _, width = thw
        block.config.set(frames, width * self.patch[2])
        return args, kwargs

    def unfold(self, x: Tensor, thw: Grid) -> Tensor:
        frames, height, width = thw
        return x.unflatten(1, (height, width, frames)).permute(0, 3, 1, 2, 4)

    def fold(self, grid: Tensor) -> Tensor:
        return grid.permute(0, 2, 3, 1, 4).flatten(1, 3)
