"""Prepare the next steps in a thread while the model trains on this one."""

from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

Value = TypeVar("Value")


def prefetch(
    fn: Callable[[int], Value], start_step: int, stop_step: int, depth: int = 2
) -> Iterator[tuple[int, Value]]:
    """Yield (step, fn(step)) for start_step <= step < stop_step, computed `depth` steps ahead in one thread.

    An exception in `fn` is raised here, at its step. The thread ends when the loop over this iterator ends,
    is left by `break` or an exception, or when the iterator is closed.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; at least one step must be prepared ahead.")
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
