"""Processes that train one model together: what they have to agree on. With one process all of it does nothing."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def num_processes() -> int:
    return dist.get_world_size() if _is_shared() else 1


def process_index() -> int:
    """0 for the process that writes files."""
    return dist.get_rank() if _is_shared() else 0


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of every process's tensor, of one shape, in place and on all of them."""
    if _is_shared():
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of every process's tensor, of one shape, in place and on all of them."""
    return sum_over_processes(x).div_(num_processes()) if _is_shared() else x


def of_first_process(x: Tensor) -> Tensor:
    """The first process's tensor, in place on all of them: of what was drawn or measured by each, one holds."""
    if _is_shared():
        dist.broadcast(x, src=0)
    return x


def agreed(value: Value) -> Value:
    """The first process's value, any that can be pickled."""
    if not _is_shared():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def wait_for_all() -> None:
    if _is_shared():
        dist.barrier()


def _is_shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
