"""Videos whose decoded frames are cached, for the same few that are read again and again."""

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np

from stts_slowfast.video.io import stat_key
from stts_slowfast.video.lru_cache import LRUCache
from stts_slowfast.video.reader import Video, frames_at

_cache = LRUCache(0)


@contextlib.contextmanager
def cache_frames(size: int) -> Iterator[None]:
    """Context in which `open_video` caches decoded frames, up to ``size`` bytes of those read last,
    in each process (each DataLoader worker has its own cache)."""
    _cache.limit = size
    try:
        yield
    finally:
        _cache.clear()
        _cache.limit = 0


def open_video(path: str, threads: int = 1, rotate: bool = True) -> "Video | CachedVideo":
    """The file as a `Video`; inside `cache_frames`, as a `CachedVideo`."""
    key = stat_key(path) if _cache.limit else None
    if key is None:
        return Video(path, threads=threads, rotate=rotate)
    key = *key, rotate
    return _cache.get(key) or CachedVideo(key, path, threads, rotate)


class CachedVideo:
    """Iterates as `Video` does; the file is opened only for frames that are not cached.

    Attributes:
        images: frames (H, W, 3) uint8 by index and short side.
        num_frames, fps, ticks, frame_times, damage: as of `Video`.
    """

    def __init__(self, key: tuple, path: str, threads: int, rotate: bool):
        self._key, self._file = key, (path, None, threads, rotate)
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.damage = ""
        with Video(*self._file) as video:
            self._copy_metadata(video)

    def __enter__(self) -> "CachedVideo":
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.images.values())

    def iter_frames(self, wanted: list[int], short_side: int = 0) -> list[np.ndarray]:
        """The frames ``wanted``, as `Video.iter_frames`."""
        missing = [index for index in wanted if (index, short_side) not in self.images]
        if missing:
            with Video(*self._file) as video:
                decoded = video.iter_frames(missing, short_side)
                for index, image in zip(missing, decoded, strict=True):
                    self.images[index, short_side] = image.copy()  # without the padding of its rows
                self._copy_metadata(video)
            _cache.put(self._key, self)
        return [self.images[index, short_side] for index in wanted]

    def frames_at(self, slots: Iterable[int]) -> list[int]:
        return frames_at(slots, self.frame_times, self.ticks)

    def _copy_metadata(self, video: Video) -> None:
        self.num_frames, self.fps, self.ticks = video.num_frames, video.fps, video.ticks
        self.frame_times = video.frame_times
        self.damage = self.damage or video.damage
