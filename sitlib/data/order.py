"""The order of an epoch: a pure function of seed and epoch that keeps reads together.

Item `i` of a run is element `i % n` of the permutation of epoch `i // n`, so a run that goes on at any item neither repeats nor skips
one, and the items of a batch can be shared out to any number of processes and workers. A set that fits one window is shuffled whole. A
larger one has its shards shuffled, neighbours gathered in windows, and each window shuffled: within about `WINDOW` items, reads touch a
few shards only, which the page cache of a machine holds.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

WINDOW = 32_768  # items; more than the sets that travel with the repository have, which are shuffled whole


def random_generator(*counters: int) -> np.random.Generator:
    """Independent random numbers for every combination of counters."""
    return np.random.default_rng(np.random.SeedSequence(counters))


class EpochOrder:
    """Permutations of items that lie in shards one after the other.

    Args:
        shard_sizes: items of every shard, in the order of the items.
        window: items that are shuffled together, rounded up to whole shards.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, window: int = WINDOW):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._window = window
        self._of_epoch = lru_cache(maxsize=3)(
            self._permutation
        )  # of neighbouring epochs, as a batch may have

    @classmethod
    def of_shards(cls, shard_of: np.ndarray) -> "EpochOrder":
        """Of items [n] that tell their shard by its number; those of a shard must lie together."""
        borders = np.flatnonzero(np.diff(shard_of)) + 1
        return cls(np.diff(np.concatenate([[0], borders, [len(shard_of)]])))

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def permutation(self, *counters: int) -> np.ndarray:
        """int64 [n], the order of the epoch that the counters name: seed, purpose and number of the epoch. Not to be changed."""
        return self._of_epoch(*counters)

    def _permutation(self, *counters: int) -> np.ndarray:
        generator, count = random_generator(*counters), len(self)
        if count <= self._window:
            return generator.permutation(count)
        shards = generator.permutation(len(self._sizes))
        sizes, starts = self._sizes[shards], self._starts[shards]
        ends = np.cumsum(sizes)
        items = np.repeat(starts - (ends - sizes), sizes) + np.arange(count)
        begin = 0
        while begin < count:
            last = np.searchsorted(
                ends, min(begin + self._window, count)
            )  # the shard that fills the window
            generator.shuffle(items[begin : ends[last]])
            begin = int(ends[last])
        return items
