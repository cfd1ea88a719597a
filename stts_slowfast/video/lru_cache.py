"""A cache bounded by bytes: of the indices of files, and of decoded frames."""

from collections import OrderedDict

DEFAULT_BYTES = 32 * 2**20


class LRUCache:
    """The items used last, up to ``limit`` bytes in all; the last one is kept whatever its size.

    Items have ``nbytes``; a key of None is not kept.
    """

    def __init__(self, limit: int = DEFAULT_BYTES):
        self.limit = limit
        self.clear()

    def clear(self) -> None:
        self.items, self.sizes, self.size = OrderedDict(), {}, 0

    def get(self, key):
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key, item) -> None:
        if key is None:
            return
        self._remove(key)
        self.items[key], self.sizes[key] = item, item.nbytes + 500
        self.size += self.sizes[key]
        while self.size > self.limit and len(self.items) > 1:
            self._remove(next(iter(self.items)))

    def _remove(self, key) -> None:
        if self.items.pop(key, None) is not None:
            self.size -= self.sizes.pop(key)
