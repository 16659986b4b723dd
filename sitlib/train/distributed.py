"""Processes and devices of training: ranks, precision, and Accelerate as configured."""

from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from sitlib.train.config import EngineConfig, Precision

Value = TypeVar("Value")
TIMEOUT = timedelta(hours=2)  # of processes that wait for rank 0 to write a state or run k-means


def join_processes() -> None:
    """Join the processes that a launcher started, before anything asks for a device."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


def world_size() -> int:
    """Number of processes, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce(x: Tensor) -> Tensor:
    """Sum of every process's tensor, of one shape, in place and on all of them."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def broadcast_object(value: Value) -> Value:
    """The value of rank 0, any that can be pickled."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


def precision(wanted: Precision) -> Literal["no", "fp16", "bf16"]:
    """Mixed precision of training on this machine, see `EngineConfig`."""
    has_gpu = torch.cuda.is_available()
    if wanted == "fp16" and not has_gpu:
        raise ValueError("engine.precision: fp16 needs a GPU; set auto, no or bf16.")
    if wanted != "auto":
        return wanted
    if not has_gpu:
        can = torch.cpu.get_capabilities()
        return "bf16" if can.get("amx_bf16") or can.get("avx512_bf16") else "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def make_accelerator(config: EngineConfig, tracker_folder: Path) -> Accelerator:
    """Accelerate as configured; ValueError for what this machine or this start does not give."""
    if config.world_size != world_size():
        counts = f"{config.world_size} processes and there are {world_size()}"
        remedy = "start as many with torchrun (docs/scale.md), or set processes and machines."
        raise ValueError(f"the engine asks for {counts}: {remedy}")
    # Accelerate keeps settings in global state; the next run of this process may have others.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision(config.precision),
        cpu=not torch.cuda.is_available(),
        step_scheduler_with_optimizer=False,  # the schedule counts updates, not samples
        log_with=list(config.trackers) or None,
        project_dir=str(tracker_folder),
        # Buffers are equal on all processes, because what changes them is.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if missing := set(config.trackers) - set(map(str, accelerator.log_with)):
        names = ", ".join(sorted(missing))
        raise ValueError(f"engine.trackers: {names}: install the package, or set [].")
    return accelerator
