"""Prepare the next steps while the model trains on this one: in a thread, or in processes where decoding is the bottleneck."""

from collections.abc import Callable, Iterator
from multiprocessing import get_all_start_methods
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

Value = TypeVar("Value")
MANY_FILES = 2**16


def prefetch(
    fn: Callable[[int], Value], start_step: int, stop_step: int, depth: int = 2, workers: int = 0
) -> Iterator[tuple[int, Value]]:
    """Yield (step, fn(step)) for start_step <= step < stop_step, in order, computed some steps ahead.

    Args:
        fn: a pure function of the step, so that nothing depends on who computes it.
        depth: steps ahead in all (one thread), or of each worker.
        workers: processes that compute whole steps in turn; 0: one thread of this process. They are forked, so where that is not
            possible (Windows) the thread is used. Tensors come back through shared memory (/dev/shm), which must have room for
            workers * depth batches.

    An exception in `fn` is raised here, at its step. Threads and processes end when the loop over this iterator ends, is left by `break` or
    an exception, or when the iterator is closed.

    Raises:
        ValueError: no step ahead, or a negative number of workers.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; at least one step must be prepared ahead.")
    if workers < 0:
        raise ValueError(f"workers is {workers}; 0 means a thread, more are processes.")
    if workers and "fork" in get_all_start_methods():
        return _in_processes(fn, start_step, stop_step, depth, workers)
    return _in_a_thread(fn, start_step, stop_step, depth)


class _Steps(Dataset[tuple[int, Value | None, Exception | None]]):
    """A step's value, or what went wrong: DataLoader would wrap an exception in a text with the worker's traceback."""

    def __init__(self, fn: Callable[[int], Value]):
        self.fn = fn

    def __getitem__(self, index: int) -> tuple[int, Value | None, Exception | None]:
        try:
            return index, self.fn(index), None
        except Exception as error:
            return index, None, error


def _as_it_is(value: Value) -> Value:
    return value


def _in_processes(
    fn: Callable[[int], Value], start_step: int, stop_step: int, depth: int, workers: int
) -> Iterator[tuple[int, Value]]:
    _open_many_files()
    loader = DataLoader(
        _Steps(fn),
        batch_size=None,
        sampler=range(start_step, stop_step),
        num_workers=workers,
        prefetch_factor=depth,
        collate_fn=_as_it_is,  # the default makes lists of tuples
        generator=torch.Generator(),  # or it would draw a number from the one that training draws from
        multiprocessing_context="fork",  # `fn` and what it refers to need not be picklable
    )
    for step, value, error in loader:
        if error is not None:
            raise error
        yield step, value


def _open_many_files() -> None:
    """Every tensor on its way from a worker is an open file, thousands in all, and many systems permit 1,024 unless they are asked."""
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if most == resource.RLIM_INFINITY else min(MANY_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _in_a_thread(
    fn: Callable[[int], Value], start_step: int, stop_step: int, depth: int
) -> Iterator[tuple[int, Value]]:
    queue: Queue = Queue(maxsize=depth)
    stop = Event()

    def put(item: tuple) -> None:
        while not stop.is_set():  # a plain put would wait for ever once the consumer is gone
            try:
                return queue.put(item, timeout=0.1)
            except Full:
                continue

    def work() -> None:
        for step in range(start_step, stop_step):
            if stop.is_set():
                return
            try:
                value = fn(step)
            except BaseException as error:  # handed over to the consumer, whatever it is
                return put((step, None, error))
            put((step, value, None))

    thread = Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start_step, stop_step):
            step, value, error = queue.get()
            if error is not None:
                raise error
            yield step, value
    finally:
        stop.set()
        try:
            while True:  # let a waiting put return at once
                queue.get_nowait()
        except Empty:
            pass
        thread.join()
