"""How training is put on devices: it decides speed and memory, and results up to rounding."""

from dataclasses import dataclass
from typing import Literal

from sitlib.config.strict import Strict, require

Tracker = Literal[
    "tensorboard", "wandb", "trackio", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab"
]


@dataclass(frozen=True)
class EngineConfig(Strict):
    """Devices, precision and memory of training.

    It is no part of what names a run: a model trained on eight GPUs is found again by a notebook on one. Batches are split over processes
    and accumulated steps, so `batch_size` of an optimizer is always the number of samples of one update.
    """

    precision: Literal[
        "auto", "no", "bf16", "fp16"
    ]  # auto: bf16 on GPUs and CPUs (AMX) that have it, fp16 on other GPUs, no on other CPUs
    # single: one process. ddp: each process has a whole model and a part of the batch. fsdp: the weights, gradients and moments of
    # autoregressive models are sharded too; tokenizers, whose codebooks change between the steps, are trained as with ddp.
    strategy: Literal["single", "ddp", "fsdp"]
    processes: int  # on every machine, one for each GPU
    machines: int
    # Most samples that pass a model at a time in one process. Of a larger share of a batch the parts pass one after another, and their
    # gradients are accumulated before the update; 0 = the whole share at once.
    micro_batch_size: int
    data_workers: (
        int  # processes that make batches ahead, for each process that trains; 0 = a thread of it
    )
    activation_checkpointing: bool  # blocks compute their activations again on the way back: less memory, a third more work
    compile: bool  # torch.compile of the transformer blocks, on GPUs
    trackers: list[Tracker]  # besides the training curve's CSV file
    images_every: int  # steps between sample grids or reconstructions, under scratch/images and in trackers that show images; 0 = none

    def __post_init__(self):
        for name in ("processes", "machines"):
            require(
                getattr(self, name) > 0, f"{name} must be at least 1, it is {getattr(self, name)}"
            )
        require(
            self.micro_batch_size >= 0,
            f"micro_batch_size must be 0 (all) or more, it is {self.micro_batch_size}",
        )
        require(
            self.data_workers >= 0,
            f"data_workers must be 0 (a thread) or more processes, it is {self.data_workers}",
        )
        require(
            self.strategy != "single" or self.world_size == 1,
            f"{self.world_size} processes need strategy: ddp or fsdp, it is single",
        )
        require(
            self.strategy != "fsdp" or self.world_size > 1,
            "strategy: fsdp shards over several processes, and there is one: set single",
        )
        require(
            self.strategy != "fsdp" or not self.images_every,
            "images_every needs whole models, and strategy fsdp shards them: set images_every: 0",
        )
        require(
            self.images_every >= 0,
            f"images_every must be 0 (none) or more, it is {self.images_every}",
        )

    @property
    def world_size(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines

    def accumulation(self, batch_size: int) -> int:
        """Equal parts, as few as `micro_batch_size` permits, in which each process's share of a batch passes a model."""
        share = batch_size // self.world_size
        parts = -(-share // self.micro_batch_size) if self.micro_batch_size else 1
        while share % parts:
            parts += 1
        return parts
