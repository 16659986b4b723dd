"""Where and how training computes: devices, processes, precision, sharding, compilation. Accelerate does it; this chooses.

The loop (`sitlib.train.loop`) asks for modules that are ready to train, and does not know how many processes there are.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from sitlib.data import prefetch
from sitlib.files import Row
from sitlib.model.precision import DTYPES, precision
from sitlib.model.sequence import Block, ContextProjection, Transformer
from sitlib.model.transformer import ADBlock, ADTransformer
from sitlib.paths import resolve
from sitlib.train.config import EngineConfig
from sitlib.train.distributed import num_processes, of_first_process, process_index

# How long processes wait for the first one while it writes a state or starts codebooks. One that fails ends the others at once.
PATIENCE = timedelta(hours=2)
ONE_PROCESS = EngineConfig("no", "single", 1, 1, 0, 0, False, False, [], 0)


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a batch; those of a process are neighbours."""

    index: int
    count: int

    def of(self, batch: Any) -> Any:
        """This part of a tensor [B, ...], or of every tensor of a tuple; B a multiple of `count`.

        It is a copy: processes that make batches ahead send whole storages, of a view those of all parts.
        """
        if not isinstance(batch, Tensor):
            return tuple(self.of(tensor) for tensor in batch)
        size = len(batch) // self.count
        return batch[self.index * size : (self.index + 1) * size].clone()


class Engine:
    """Devices and processes of one training run.

    Args:
        config: what is asked for.
        batch_size: samples of one update, over all processes.

    Raises:
        ValueError: there are not as many processes as the configuration says, or a precision that this device does not have.
    """

    def __init__(self, config: EngineConfig, batch_size: int):
        has_gpu = torch.cuda.is_available()
        if config.world_size != num_processes():
            raise ValueError(
                f"the engine asks for {config.world_size} processes and there are {num_processes()}: `trained_tokenizer` and "
                "`trained_generator` start them, and so does python -m workbook.launch."
            )
        self.config, self._batch_size = config, batch_size
        _forget_earlier_runs()
        self._plugin = plugin = _sharding(config) if config.strategy == "fsdp" else None
        mixed_precision = precision(config.precision)
        with _told(config.trackers):
            self.accelerator = Accelerator(
                mixed_precision=mixed_precision,
                cpu=not has_gpu,
                step_scheduler_with_optimizer=False,  # the schedule counts updates, not samples
                log_with=list(config.trackers) or None,
                project_dir=str(resolve("scratch/trackers")),
                fsdp_plugin=plugin,
                # Buffers are the same on all processes because what changes them is.
                kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            )
        if plugin is not None and not has_gpu:  # Accelerate shards on GPUs only; tests have none
            _shard_on_cpu(plugin)
        self._products = torch.get_float32_matmul_precision()
        if has_gpu:  # float32 products in TF32, as convolutions are by default
            torch.set_float32_matmul_precision("high")
        if process_index() > 0:  # dropout of its own
            torch.manual_seed(torch.initial_seed() + process_index())
        self._spare: dict[int, nn.Module] = {}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def parts(self) -> list[Part]:
        """The parts of every batch that this process computes, one after another."""
        own = self.config.accumulation(self._batch_size)
        return [
            Part(process_index() * own + number, self.config.world_size * own)
            for number in range(own)
        ]

    def made_ahead(
        self, fn: Callable[[int], list[Any]], start_step: int, stop_step: int
    ) -> Iterator[tuple[int, list[Any]]]:
        """(step, parts of its batch) for every step, made ahead by `data_workers`, in memory from which the device copies at once."""
        steps = prefetch(fn, start_step, stop_step, workers=self.config.data_workers)
        if not torch.cuda.is_available():
            return steps
        return prefetch(lambda step: list(map(_pinned, next(steps)[1])), start_step, stop_step)

    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """A module and its optimizer, ready to train: moved, wrapped, sharded, compiled as the configuration says."""
        for part in module.modules():
            if isinstance(part, (ADTransformer, Transformer)):
                part.gradient_checkpointing = self.config.activation_checkpointing
            if (
                isinstance(part, (ADBlock, Block))
                and self.config.compile
                and torch.cuda.is_available()
            ):
                part.compile()
        if self._plugin is not None:
            self._spare[id(module)] = copy.deepcopy(module)
            self._plugin.transformer_cls_names_to_wrap = _sharded_by_itself(module)
            warnings.filterwarnings(
                "ignore", "FSDP2-wrapped module .* returned a view"
            )  # logits: never changed
            return self.accelerator.prepare(module, optimizer)
        with warnings.catch_warnings():  # of torch, about a name that Accelerate still uses
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            ready = self.accelerator.prepare_model(module)
        return ready, self.accelerator.prepare_optimizer(optimizer)

    def share(self, module: nn.Module) -> None:
        """Gives every process the first one's weights and buffers."""
        for tensor in (*module.parameters(), *module.buffers()):
            of_first_process(tensor.data)

    def part_of_step(self, module: nn.Module, is_last: bool) -> AbstractContextManager:
        """Around forward and backward of one part: gradients are exchanged with those of the last one only."""
        return nullcontext() if is_last else self.accelerator.no_sync(module)

    def whole(self, module: nn.Module, prepared: nn.Module) -> nn.Module:
        """`module` itself, or where it is sharded one like it that holds its weights."""
        spare = self._spare.pop(id(module), None)
        if spare is None:
            return module
        weights = spare.state_dict()
        for name, weight in prepared.state_dict().items():
            # Gathered where the shards are: between GPUs (nccl) nothing can be sent that lies on a CPU, as this copy does.
            weights[name].copy_(weight.full_tensor() if isinstance(weight, DTensor) else weight)
        return spare

    def track(self, name: str, first_step: int) -> None:
        """Starts the trackers of a run; what an earlier process has told them of steps after `first_step` is told again.

        Raises:
            ValueError: a tracker that is not installed, or that does not start.
        """
        if not self.config.trackers:
            return
        resolve("scratch/trackers").mkdir(parents=True, exist_ok=True)
        own = {
            "tensorboard": {"purge_step": first_step + 1},
            "wandb": {"id": name, "resume": "allow"},
        }
        with _told(self.config.trackers):
            self.accelerator.init_trackers(name, init_kwargs=own)

    def log(self, row: Row) -> None:
        """Gives a row of the training curve to the trackers."""
        if self.config.trackers:
            step = int(row["step"])
            self.accelerator.log(
                {name: value for name, value in row.items() if name != "step"}, step=step
            )

    def log_image(self, image_HWC: Any, step: int) -> None:
        """Gives a picture, uint8 [H, W, 3], to those trackers that show any."""
        for tracker in self.accelerator.trackers if process_index() == 0 else ():
            if hasattr(tracker, "log_images"):
                takes_one = tracker.name in ("aim", "clearml")  # the others take several
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images(
                    {"images": image_HWC if takes_one else image_HWC[None]}, step=step, **layout
                )

    def finish(self) -> None:
        """Ends the trackers; `end_training` of Accelerate would end the process group too, and the results are not written yet.

        What is computed in float32 after this, the codes of trained tokenizers above all, is not in TF32.
        """
        torch.set_float32_matmul_precision(self._products)
        for tracker in self.accelerator.trackers:
            tracker.finish()


@contextmanager
def _told(trackers: Sequence[str]) -> Iterator[None]:
    """Around the start of trackers: says which of the settings asks for them."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if not trackers:
            raise
        raise ValueError(
            f"engine.trackers: {', '.join(trackers)} could not be started ({error}): install the package, or set []."
        ) from None


def join_processes() -> None:
    """Makes this process one of those that a launcher started, if it did: before anything asks for a device."""
    PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def _pinned(batch: Any) -> Any:
    """A batch in memory from which a GPU copies while the CPU goes on; without a GPU as it is."""
    if not torch.cuda.is_available():
        return batch
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    return tuple(map(_pinned, batch))


def on_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(map(partial(on_device, device=device), batch))


def to_host(values: Sequence[Any]) -> list[float]:
    """Numbers and scalar tensors as numbers, in one transfer."""
    tensors = [value.detach().double() for value in values if isinstance(value, Tensor)]
    numbers = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(numbers) if isinstance(value, Tensor) else float(value) for value in values]


def _forget_earlier_runs() -> None:
    """Accelerate's settings outlive an accelerator; the next run of this process may have others."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.FSDP:
        has_gpu = torch.cuda.is_available()
        state["distributed_type"] = (
            DistributedType.MULTI_GPU if has_gpu else DistributedType.MULTI_CPU
        )


def _shard_on_cpu(plugin: FullyShardedDataParallelPlugin) -> None:
    AcceleratorState._shared_state |= {
        "distributed_type": DistributedType.FSDP,
        "fsdp_plugin": plugin,
    }
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _sharded_by_itself(module: nn.Module) -> list[str]:
    """Names of the classes of a module's parts whose weights are gathered when they compute, and no longer."""
    classes = {type(part) for part in module.modules()}
    return [unit.__name__ for unit in (Block, ContextProjection) if unit in classes]


def _sharding(config: EngineConfig) -> FullyShardedDataParallelPlugin:
    """How models are sharded. Gradients are added up in float32, over processes and over the parts of a batch."""
    computed = DTYPES.get(precision(config.precision))
    return FullyShardedDataParallelPlugin(
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=computed, reduce_dtype=torch.float32
        ),
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
