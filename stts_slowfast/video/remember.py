"""Videos whose frames are decoded once, where the same few are read again and again."""

import contextlib
from collections.abc import Iterator

import numpy as np

from stts_slowfast.video.files import identity
from stts_slowfast.video.reader import Video
from stts_slowfast.video.times import Memory

_memory = Memory(0)


@contextlib.contextmanager
def remembering(size: int) -> Iterator[None]:
    """Inside, `open_video` keeps the frames that it decodes, up to ``size`` bytes of those read
    last, in each process (a DataLoader's workers remember for themselves)."""
    _memory.limit = size
    try:
        yield
    finally:
        _memory.clear()
        _memory.limit = 0


def open_video(path: str, threads: int = 1, rotate: bool = True) -> "Video | RememberedVideo":
    """The file as a `Video`; inside of `remembering`, as one that remembers."""
    key = identity(path) if _memory.limit else None
    if key is None:
        return Video(path, threads=threads, rotate=rotate)
    return RememberedVideo((*key, rotate), path, threads, rotate)


class _Held:
    """What is known of a file: its frames by number and short side, and what `Video` tells."""

    def __init__(self, video: Video):
        self.images: dict[tuple[int, int], np.ndarray] = {}
        self.damage = ""
        self.update(video)

    def update(self, video: Video) -> None:
        self.num_frames, self.fps = video.num_frames, video.fps
        self.damage = self.damage or video.damage

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.images.values())


class RememberedVideo:
    """As `Video` for who iterates; the file is opened only for what is not in memory."""

    def __init__(self, key: tuple, path: str, threads: int, rotate: bool):
        self._key, self._file = key, (path, None, threads, rotate)
        self._held = _memory.get(key)
        if self._held is None:
            with Video(*self._file) as video:
                self._held = _Held(video)

    def __enter__(self) -> "RememberedVideo":
        return self

    def __exit__(self, *exc_info) -> None:
        pass

    @property
    def num_frames(self) -> int:
        return self._held.num_frames

    @property
    def fps(self) -> float:
        return self._held.fps

    @property
    def damage(self) -> str:
        return self._held.damage

    def iterate(self, wanted: list[int], short_side: int = 0) -> list[np.ndarray]:
        """The frames ``wanted``, as `Video.iterate` gives them."""
        images = self._held.images
        missing = [index for index in wanted if (index, short_side) not in images]
        if missing:
            with Video(*self._file) as video:
                decoded = video.iterate(missing, short_side)
                for index, image in zip(missing, decoded, strict=True):
                    images[index, short_side] = image.copy()  # without what lies beside it
            self._held.update(video)
            _memory.put(self._key, self._held)
        return [images[index, short_side] for index in wanted]
