"""Collective operations of processes that train one model together; no-ops in one process."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")


def world_size() -> int:
    """Number of processes, on all machines."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(x: Tensor) -> Tensor:
    """Sum of every process's tensor, of one shape, in place and on all of them."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast(x: Tensor) -> Tensor:
    """The tensor of rank 0, in place on all processes."""
    if world_size() > 1:
        dist.broadcast(x, src=0)
    return x


def broadcast_params(module: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0."""
    for tensor in (*module.parameters(), *module.buffers()):
        broadcast(tensor.data)


def broadcast_object(value: Value) -> Value:
    """The value of rank 0, any that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()
