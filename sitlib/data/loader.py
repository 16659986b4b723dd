"""Order of an epoch, a pure function of seed and epoch; batches prepared ahead of their step."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

import numpy as np
import torch

Value = TypeVar("Value")
WINDOW = 32_768  # items shuffled together; smaller sets are shuffled whole


def random_generator(*counters: int) -> np.random.Generator:
    """Independent random numbers for every combination of counters."""
    return np.random.default_rng(np.random.SeedSequence(counters))


class EpochOrder:
    """Permutations of items that lie in shards one after the other.

    Item `i` of a run is element `i % n` of the permutation of epoch `i // n`, so that a run resumes
    at any item, and any number of processes share a batch. A set larger than `window` items has its
    shards shuffled, neighbors gathered in windows of whole shards, and each window shuffled: reads
    touch a few shards at a time, which stay in the page cache.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, window: int = WINDOW):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._window = window
        # A batch may lie in two epochs, and training and evaluation alternate.
        self.permutation = lru_cache(maxsize=3)(self._permutation)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def _permutation(self, *counters: int) -> np.ndarray:
        """Order of an epoch by seed, purpose and number: int64 [n], read-only by convention."""
        generator, count = random_generator(*counters), len(self)
        if count <= self._window:
            return generator.permutation(count)
        shards = generator.permutation(len(self._sizes))
        sizes, starts = self._sizes[shards], self._starts[shards]
        ends = np.cumsum(sizes)
        items = np.repeat(starts - (ends - sizes), sizes) + np.arange(count)
        begin = 0
        while begin < count:
            # The shard that fills the window is its last.
            last = np.searchsorted(ends, min(begin + self._window, count))
            generator.shuffle(items[begin : ends[last]])
            begin = int(ends[last])
        return items


def prefetch(
    make: Callable[[int], Value], first: int, last: int, depth: int = 2, workers: int = 0
) -> Iterator[tuple[int, Value]]:
    """Yield (step, make(step)) for first <= step < last, in order, computed some steps ahead.

    Args:
        make: a pure function of the step. Its exceptions are raised here, at their step.
        depth: steps ahead of one thread, or of each worker.
        workers: processes that compute whole steps in turn; 0: one thread of this process, also
            where processes cannot be forked (Windows). Tensors come back through shared memory
            (/dev/shm), which needs room for workers * depth batches.
    """
    if depth < 1 or workers < 0:
        raise ValueError(f"depth is {depth}, at least 1; workers is {workers}, at least 0.")
    pool, call = ThreadPoolExecutor(1, "prefetch"), make
    if workers and "fork" in get_all_start_methods():
        import resource  # not on Windows

        # Every tensor on its way from a worker is an open file, thousands in all: raise the limit.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = hard if 0 <= hard < 2**16 else 2**16  # a negative number: unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        # A forked process has `make` and what it refers to; they need not be picklable.
        pool = ProcessPoolExecutor(workers, get_context("fork"), _makes.append, (make,))
        call, depth = _in_worker, depth * workers
    try:
        ahead = deque(pool.submit(call, step) for step in range(first, min(first + depth, last)))
        for step in range(first, last):
            value = ahead.popleft().result()
            if step + depth < last:
                ahead.append(pool.submit(call, step + depth))
            yield step, value
    finally:  # also where the consumer leaves the loop
        pool.shutdown(cancel_futures=True)


_makes: list[Callable[[int], Any]] = []  # in a worker: what it was started for


def _in_worker(step: int) -> Any:
    torch.set_num_threads(1)  # the threads of the parent were not forked
    return _makes[-1](step)
