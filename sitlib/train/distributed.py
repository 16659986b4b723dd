"""Devices, processes, precision, sharding and compilation of training, by Accelerate.

The step (`sitlib.train.tokenizer`, `sitlib.train.generator`) sees prepared models and this
process's microbatches, and does not know how many processes there are.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    recursively_apply,
    send_to_device,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from sitlib.data import prefetch
from sitlib.files import Row
from sitlib.model.sequence import Block, ContextProjection, Transformer
from sitlib.model.transformer import ADBlock, ADTransformer
from sitlib.train.config import EngineConfig

Value = TypeVar("Value")
# Processes wait so long for rank 0 while it writes a state or runs k-means. One that fails ends
# the others at once.
TIMEOUT = timedelta(hours=2)
ONE_PROCESS = EngineConfig(precision="no")

# -- collective operations, no-ops in one process --------------------------------------------------


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


def broadcast_params(module: nn.Module) -> None:
    """Give every process the parameters and buffers of rank 0."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, src=0)


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


def join_processes() -> None:
    """Join the processes that a launcher started, before anything asks for a device."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)


# -- the engine ------------------------------------------------------------------------------------


def precision(
    wanted: Literal["auto", "no", "bf16", "fp16"] = "auto",
) -> Literal["no", "fp16", "bf16"]:
    """Mixed precision of training on this machine.

    "auto" is bf16 on GPUs and CPUs (AMX) that have it, fp16 with loss scaling on older GPUs.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if wanted == "fp16" and not torch.cuda.is_available():
        raise ValueError("engine.precision: fp16 needs a GPU; set auto, no or bf16.")
    if wanted != "auto":
        return wanted
    if not torch.cuda.is_available():
        return "bf16" if torch.cpu.get_capabilities().get("amx_bf16", False) else "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


@dataclass(frozen=True)
class Microbatch:
    """One of `count` equal parts of a batch: what passes a model at a time, in one process."""

    index: int
    count: int

    def of(self, batch: Any) -> Any:
        """This part of a tensor [B, ...], or of every tensor of a tuple; B a multiple of `count`."""
        if not isinstance(batch, Tensor):
            return tuple(self.of(tensor) for tensor in batch)
        size = len(batch) // self.count
        # A copy: data workers send whole storages, of a view those of the whole batch.
        return batch[self.index * size : (self.index + 1) * size].clone()


class Engine:
    """Devices and processes of one training run.

    Args:
        config: precision, strategy, processes, memory.
        batch_size: samples of one update, over all processes.
        log_folder: trackers write under it.

    Raises:
        ValueError: another number of processes, no such precision, or a tracker is not there.
    """

    def __init__(self, config: EngineConfig, batch_size: int, log_folder: Path):
        self.has_gpu = torch.cuda.is_available()
        if config.world_size != world_size():
            raise ValueError(
                f"the engine asks for {config.world_size} processes and there are {world_size()}: "
                "start as many with torchrun (docs/scale.md), or set processes and machines."
            )
        self.config = config
        self._tracker_folder = log_folder / "trackers"
        # Accelerate keeps settings in global state; the next run of this process may have others.
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        self._fsdp = _fsdp_plugin(config) if config.strategy == "fsdp" else None
        self.accelerator = Accelerator(
            mixed_precision=precision(config.precision),
            cpu=not self.has_gpu,
            step_scheduler_with_optimizer=False,  # the schedule counts updates, not samples
            log_with=list(config.trackers) or None,
            project_dir=str(self._tracker_folder),
            fsdp_plugin=self._fsdp,
            # Buffers are equal on all processes, because what changes them is.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if missing := set(config.trackers) - set(map(str, self.accelerator.log_with)):
            names = ", ".join(sorted(missing))
            raise ValueError(f"engine.trackers: {names}: install the package, or set [].")
        self.device = self.accelerator.device
        self._matmul_precision = torch.get_float32_matmul_precision()
        if self.has_gpu:  # float32 products in TF32, as convolutions are by default
            torch.set_float32_matmul_precision("high")
        if rank() > 0:  # models are built before, with the same seed; dropout differs
            torch.manual_seed(torch.initial_seed() + rank())
        count = config.accumulation(batch_size)
        first, total = rank() * count, config.world_size * count
        self.microbatches = [Microbatch(first + number, total) for number in range(count)]
        self._unsharded: dict[int, nn.Module] = {}

    def prefetch(
        self, batch_at: Callable[[int, Microbatch], Any], start_step: int, stop_step: int
    ) -> Iterator[tuple[int, Any]]:
        """Yield (step, this process's microbatches on the device), made ahead of time."""

        def make(step: int) -> list[Any]:
            return [batch_at(step, microbatch) for microbatch in self.microbatches]

        steps = prefetch(make, start_step, stop_step, workers=self.config.data_workers)
        if self.has_gpu:  # to memory from which a GPU copies while the CPU goes on
            pageable = steps
            pin = partial(recursively_apply, Tensor.pin_memory)
            steps = prefetch(lambda _: pin(next(pageable)[1]), start_step, stop_step)
        for step, batch in steps:
            yield step, send_to_device(batch, self.device, non_blocking=True)

    def prepare(
        self, module: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module and its optimizer, moved, wrapped, sharded and compiled as configured."""
        for part in module.modules():
            if isinstance(part, (ADTransformer, Transformer)):
                part.gradient_checkpointing = self.config.gradient_checkpointing
            if isinstance(part, (ADBlock, Block)) and self.config.compile and self.has_gpu:
                part.compile()
        if self._fsdp is not None:
            self._unsharded[id(module)] = copy.deepcopy(module)
            # Weights of these are gathered while they compute, and no longer.
            classes = {type(part) for part in module.modules()}
            units = [unit.__name__ for unit in (Block, ContextProjection) if unit in classes]
            self._fsdp.transformer_cls_names_to_wrap = units
            # Of the logits, which nobody changes in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            return self.accelerator.prepare(module, optimizer)
        with warnings.catch_warnings():  # of torch, about a name that Accelerate still uses
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            model = self.accelerator.prepare_model(module)
        return model, self.accelerator.prepare_optimizer(optimizer)

    def accumulate(self, model: nn.Module, microbatches: Sequence[Any]) -> Iterator[Any]:
        """Yield microbatches; gradients of `model` are exchanged between processes at the last."""
        for number, microbatch in enumerate(microbatches, 1):
            is_last = number == len(microbatches)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                yield microbatch

    def gather_params(self, module: nn.Module, model: nn.Module) -> nn.Module:
        """`module` with its trained weights; where `model` is sharded, a whole copy of it."""
        whole = self._unsharded.pop(id(module), None)
        if whole is None:
            return module
        weights = whole.state_dict()
        for name, weight in model.state_dict().items():
            # Gathered on the device: nccl cannot send what lies on the CPU, as this copy does.
            weights[name].copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        return whole

    def track(self, name: str, first_step: int) -> None:
        """Start the trackers of a run; rows after `first_step` of an earlier process are replaced."""
        if self.config.trackers:
            self._tracker_folder.mkdir(parents=True, exist_ok=True)
            options: dict[str, dict] = {"tensorboard": {"purge_step": first_step + 1}}
            options["wandb"] = {"id": name, "resume": "allow"}
            self.accelerator.init_trackers(name, init_kwargs=options)

    def log(self, row: Row) -> None:
        """Give a row of the training curve to the trackers."""
        values = {name: value for name, value in row.items() if name != "step"}
        self.accelerator.log(values, step=int(row["step"]))

    def log_image(self, image_HWC: Any, step: int) -> None:
        """Give a picture, uint8 [H, W, 3], to TensorBoard and Weights & Biases."""
        for tracker in self.accelerator.trackers if rank() == 0 else ():
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"images": image_HWC[None]}, step=step, **layout)

    def finish(self) -> None:
        """End the trackers; TF32 is off again, so that codes are extracted in float32."""
        torch.set_float32_matmul_precision(self._matmul_precision)
        # `end_training` would end the process group too, and the results are not written yet.
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _fsdp_plugin(config: EngineConfig) -> FullyShardedDataParallelPlugin:
    """FSDP2; gradients are summed in float32, over processes and over microbatches."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
    dtype = dtypes[precision(config.precision)]
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32),
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
