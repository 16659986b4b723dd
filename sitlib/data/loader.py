"""Order of an epoch, a pure function of seed and epoch; batches prepared ahead of their step."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from multiprocessing import get_all_start_methods
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

Value = TypeVar("Value")
WINDOW = 32_768  # items shuffled together; smaller sets are shuffled whole
MAX_OPEN_FILES = 2**16


def random_generator(*counters: int) -> np.random.Generator:
    """Independent random numbers for every combination of counters."""
    return np.random.default_rng(np.random.SeedSequence(counters))


class EpochOrder:
    """Permutations of items that lie in shards one after the other.

    Item `i` of a run is element `i % n` of the permutation of epoch `i // n`. So a run that resumes
    at any item neither repeats nor skips one, and the items of a batch can be shared out to any
    number of processes. A set larger than a window has its shards shuffled, neighbors gathered in
    windows, and each window shuffled: within about `window` items, reads touch a few shards only,
    which the page cache of a machine holds.

    Args:
        shard_sizes: items of every shard, in the order of the items.
        window: items that are shuffled together, rounded up to whole shards.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, window: int = WINDOW):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._window = window
        # A batch may lie in two epochs, and training and evaluation alternate.
        self._cached = lru_cache(maxsize=3)(self._permutation)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def permutation(self, *counters: int) -> np.ndarray:
        """Order of an epoch, int64 [n], read-only by convention.

        Args:
            counters: seed, purpose and number of the epoch.
        """
        return self._cached(*counters)

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
        make: a pure function of the step, so that nothing depends on who computes it. Its
            exceptions are raised here, at their step.
        depth: steps ahead in all (one thread), or of each worker.
        workers: processes that compute whole steps in turn; 0: one thread of this process. They
            are forked; where that is impossible (Windows) the thread is used. Tensors come back
            through shared memory (/dev/shm), which needs room for workers * depth batches.

    Raises:
        ValueError: no step ahead, or a negative number of workers.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; at least one step must be prepared ahead.")
    if workers < 0:
        raise ValueError(f"workers is {workers}; 0 means a thread, more are processes.")
    if workers and "fork" in get_all_start_methods():
        return _in_processes(make, first, last, depth, workers)
    return _in_a_thread(make, first, last, depth)


def _in_a_thread(
    make: Callable[[int], Value], first: int, last: int, depth: int
) -> Iterator[tuple[int, Value]]:
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(pool.submit(make, step) for step in range(first, min(first + depth, last)))
        for step in range(first, last):
            value = ahead.popleft().result()
            if step + depth < last:
                ahead.append(pool.submit(make, step + depth))
            yield step, value
    finally:  # also where the consumer leaves the loop
        pool.shutdown(cancel_futures=True)


class _Steps(Dataset[tuple[Value | None, Exception | None]]):
    """Values of steps. Exceptions are values too: DataLoader would turn them into text."""

    def __init__(self, make: Callable[[int], Value]):
        self.make = make

    def __getitem__(self, index: int) -> tuple[Value | None, Exception | None]:
        try:
            return self.make(index), None
        except Exception as error:
            return None, error


def _identity(value: Value) -> Value:
    return value


def _in_processes(
    make: Callable[[int], Value], first: int, last: int, depth: int, workers: int
) -> Iterator[tuple[int, Value]]:
    _allow_open_files()
    loader = DataLoader(
        _Steps(make),
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        prefetch_factor=depth,
        collate_fn=_identity,  # the default makes lists of tuples
        generator=torch.Generator(),  # else a number is drawn from the generator of training
        multiprocessing_context="fork",  # `make` and what it refers to need not be picklable
    )
    for step, (value, error) in zip(range(first, last), loader, strict=True):
        if error is not None:
            raise error
        yield step, value


def _allow_open_files() -> None:
    """Raise the limit: every tensor on its way from a worker is an open file, thousands in all."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(MAX_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
