"""Videos whose frames are decoded once, where the same few are read again and again."""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from stts_slowfast.video.frame_index import LRUCache
from stts_slowfast.video.io import stat_key
from stts_slowfast.video.reader import Video, frames_at

_memory = LRUCache(0)


@contextlib.contextmanager
def cache_frames(size: int) -> Iterator[None]:
    """Inside, `open_video` keeps the frames that it decodes, up to ``size`` bytes of those read
    last, in each process (a DataLoader's workers remember for themselves)."""
    _memory.limit = size
    try:
        yield
    finally:
        _memory.clear()
        _memory.limit = 0


def open_video(path: str, threads: int = 1, rotate: bool = True) -> "Video | CachedVideo":
    """The file as a `Video`; inside of `cache_frames`, as one that remembers."""
    key = stat_key(path) if _memory.limit else None
    if key is None:
        return Video(path, threads=threads, rotate=rotate)
    key = *key, rotate
    return _memory.get(key) or CachedVideo(key, path, threads, rotate)


class CachedVideo:
    """As `Video` for who iterates; the file is opened only for what is not in memory.

    Attributes:
        images: frames (H, W, 3) uint8 by number and short side.
        num_frames, fps, ticks, frames_at, damage: as `Video` tells them.
    """

    def __init__(self, key: tuple, path: str, threads: int, rotate: bool):
        self._key, self._file = key, (path, None, threads, rotate)
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.damage = ""
        with Video(*self._file) as video:
            self._ask(video)

    def __enter__(self) -> "CachedVideo":
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.images.values())

    def iter_frames(self, wanted: list[int], short_side: int = 0) -> list[np.ndarray]:
        """The frames ``wanted``, as `Video.iterate` gives them."""
        missing = [index for index in wanted if (index, short_side) not in self.images]
        if missing:
            with Video(*self._file) as video:
                decoded = video.iter_frames(missing, short_side)
                for index, image in zip(missing, decoded, strict=True):
                    self.images[index, short_side] = image.copy()  # without what lies beside it
                self._ask(video)
            _memory.put(self._key, self)
        return [self.images[index, short_side] for index in wanted]

    def frames_at(self, slots: Iterable[int]) -> list[int]:
        return frames_at(slots, self.clock, self.ticks)

    def _ask(self, video: Video) -> None:
        self.num_frames, self.fps, self.ticks = video.num_frames, video.fps, video.ticks
        self.clock = video.clock
        self.damage = self.damage or video.damage
