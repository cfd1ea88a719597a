"""The order of a split's items for one process in one epoch."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler):
    """``(epoch, item)`` of one process in one epoch, from the item ``start`` on. (It has no
    `set_epoch`, which Lightning would call with its own count.)"""

    def __init__(self, size: int, rank: int, world: int, shuffle_seed: int | None):
        self.size, self.rank, self.world = size, rank, world
        self.shuffle_seed = shuffle_seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start, self.start = self.start, 0
        order: Sequence[int] = range(self.rank, self.size, self.world)
        if self.shuffle_seed is not None:
            generator = torch.Generator().manual_seed(self.shuffle_seed + self.epoch)
            items = torch.randperm(self.size, generator=generator)
            # All processes have the same number: the first items come twice if they do not divide.
            items = torch.cat([items, items[: -self.size % self.world]])
            order = items[self.rank :: self.world].tolist()
        return ((self.epoch, item) for item in order[start:])

    def __len__(self) -> int:
        if self.shuffle_seed is None:
            return len(range(self.rank, self.size, self.world))
        return math.ceil(self.size / self.world)
