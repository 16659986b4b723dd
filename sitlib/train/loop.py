"""The training loop: models on devices, batches, curve, resumable states, trackers, pictures."""

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import recursively_apply, send_to_device
from PIL import Image
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from sitlib.data import prefetch
from sitlib.files import Row
from sitlib.model.block import Block
from sitlib.model.sequence import Transformer
from sitlib.model.transformer import ADTransformer
from sitlib.train.checkpoint import States, locked
from sitlib.train.config import ONE_PROCESS, EngineConfig, OptimizerConfig
from sitlib.train.distributed import broadcast_object, make_accelerator, rank, world_size
from sitlib.train.optim import ema_update, learning_rate_factor, make_optimizer

Logged = Mapping[str, float | Tensor]
Module = TypeVar("Module", bound=nn.Module)
STATE_SECONDS = 20 * 60  # max seconds between states, but for the steps to a row of the curve


class TrainLoop(AbstractContextManager):
    """One training run, resumable to the bit: killed, it ends as if it had not been.

    `train_module` shows its use. Of several processes all do this, and end with the same weights.
    The caller locks `folder`, which has the resumable states and, in `run.json`, the plain values
    `run` that determine the run. Trackers and pictures are written to `log_folder`.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        folder: Path,
        run: dict[str, Any],
        *,
        engine: EngineConfig = ONE_PROCESS,
        title: str = "training",
        log_folder: str | Path = "scratch",
    ):
        self.config, self.engine, self.title, self.log_folder = config, engine, title, log_folder
        # Runs of other settings may have the same title: the folder is named by them.
        self.name = re.sub(r"[^\w.]+", "-", f"{title} {folder.name.partition('-')[0]}")
        self.accelerator = make_accelerator(engine, Path(log_folder, "trackers"))
        self.device = self.accelerator.device
        self.states = States(folder, self.accelerator, run)
        self.first_step = 0
        self.rows: list[Row] = []
        self.prepared: dict[nn.Module, tuple[torch.optim.Optimizer, LRScheduler, float]] = {}
        self.averages: list[tuple[AveragedModel, nn.Module, float]] = []
        self.pending: list[Logged] = []  # of the steps since the last row
        self.float32_products = torch.get_float32_matmul_precision()
        if torch.cuda.is_available():  # in TF32, as convolutions are by default
            torch.set_float32_matmul_precision("high")
        if rank() > 0:  # models are built before, with the same seed; dropout differs
            torch.manual_seed(torch.initial_seed() + rank())

    def __exit__(self, *error: Any) -> None:
        torch.set_float32_matmul_precision(self.float32_products)  # for the extraction of codes
        for tracker in self.accelerator.trackers:  # `end_training` would end the processes too
            tracker.finish()

    def prepare(
        self, module: nn.Module, config: OptimizerConfig
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module and its optimizer, moved, wrapped and compiled as configured."""
        has_gpu = torch.cuda.is_available()
        for part in module.train().modules():
            if isinstance(part, (ADTransformer, Transformer)):
                part.gradient_checkpointing = self.engine.gradient_checkpointing
            if isinstance(part, Block) and self.engine.compile and has_gpu:
                part.compile()
        optimizer = make_optimizer(module, config)
        schedule = LambdaLR(optimizer, partial(learning_rate_factor, config=config))
        schedule = self.accelerator.prepare_scheduler(schedule)
        with warnings.catch_warnings():  # of torch, about a name that Accelerate still uses
            warnings.filterwarnings("ignore", ".*broadcast_buffers.*", FutureWarning)
            model, optimizer = self.accelerator.prepare(module, optimizer)
        self.prepared[model] = optimizer, schedule, config.clip_norm
        if config.ema_decay:
            average = AveragedModel(module)
            self.accelerator.register_for_checkpointing(average)
            self.averages.append((average, module, config.ema_decay))
        return model, optimizer

    def resume(self) -> int:
        """Restore the newest state of all prepared modules; the step at which training begins."""
        self.first_step, self.rows = self.states.load()
        if self.engine.trackers:
            Path(self.log_folder, "trackers").mkdir(parents=True, exist_ok=True)
            # Rows of later steps, told before a kill, are replaced.
            options: dict[str, dict] = {"tensorboard": {"purge_step": self.first_step + 1}}
            options["wandb"] = {"id": self.name, "resume": "allow"}
            self.accelerator.init_trackers(self.name, init_kwargs=options)
        return self.first_step

    def steps(
        self, share_at: Callable[[int], Any], pictures: Callable[[], Tensor] | None = None
    ) -> Iterator[tuple[int, list[Any]]]:
        """Yield (step, this process's microbatches); the body makes the step and logs its values.

        Then come the averages of the weights, the row of the curve and the state; or an error, when
        a number is not finite or a state could not be written, and the last good state stays.
        `share_at` gives this process's tensors of a step: a pure function, called in another thread
        or process. `pictures` gives images [M, 3, H, W] in [0, 1] of what was learned so far.
        """
        config, first, every = self.config, self.first_step, self.engine.images_every
        count, workers = self.engine.accumulation(config.batch_size), self.engine.data_workers
        batches = prefetch(lambda step: split(share_at(step), count), first, config.steps, workers)
        if torch.cuda.is_available():  # to memory from which a GPU copies while the CPU goes on
            pageable, pin = batches, partial(recursively_apply, Tensor.pin_memory)
            batches = prefetch(lambda _: pin(next(pageable)[1]), first, config.steps)
        began = saved = time.perf_counter()
        elapsed = self.rows[-1]["seconds"] if self.rows else 0.0
        options = {"unit": "step", "mininterval": 5.0, "ncols": 110, "disable": rank() > 0}
        bar = tqdm(total=config.steps, initial=first, desc=self.title, **options)
        for step, batch in batches:
            yield step, cast(list, send_to_device(batch, self.device, non_blocking=True))
            done = step + 1
            for average, module, decay in self.averages:
                ema_update(average, module, decay)
            if self.is_log_step(step):
                means = self.means()
                self.require_finite([torch.tensor(means["loss"])], f"the loss at step {done} is")
                rate = config.learning_rate * learning_rate_factor(step, config)
                seconds = round(elapsed + time.perf_counter() - began, 1)
                row = {"step": done, "learning_rate": rate, "seconds": seconds, **means}
                self.rows.append(row)
                shown = {name: f"{means[name]:.3f}" for name in list(means)[:2]}
                bar.set_postfix(shown, refresh=False)
                # The last state stays until the model is written: there may be no room for it.
                is_due = done % config.checkpoint_every == 0 or done == config.steps
                if is_due or broadcast_object(time.perf_counter() - saved > STATE_SECONDS):
                    # Only the next loss would tell of weights that this update spoiled.
                    weights = (p.detach() for model in self.prepared for p in model.parameters())
                    self.require_finite(weights, f"weights after step {done} are")
                    self.states.save(done, self.rows)
                    saved = time.perf_counter()
                # After the state: a tracker that fails shall not cost it.
                self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=done)
            if pictures is not None and every and done % every == 0 and rank() == 0:
                self.show(pictures, done)
            bar.update()
        bar.close()

    def accumulate(self, model: nn.Module, microbatches: Sequence[Any]) -> Iterator[Any]:
        """Yield microbatches; gradients of `model` are exchanged between processes at the last."""
        for number, microbatch in enumerate(microbatches, 1):
            is_last = number == len(microbatches)
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                yield microbatch

    def update(self, model: nn.Module) -> Tensor:
        """Clip the gradients of a prepared model, update it and its rate; their norm before."""
        optimizer, schedule, clip_norm = self.prepared[model]
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(model.parameters(), clip_norm))
        optimizer.step()
        optimizer.zero_grad()  # at once: loss scaling touches the gradients of all models
        schedule.step()
        return norm

    def is_log_step(self, step: int) -> bool:
        """True where a row of the curve ends: values that need the GPU to be waited for."""
        return (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps

    def log(self, values: Logged) -> None:
        """Take what a step has to say, numbers or scalar tensors; `loss` is one of them."""
        self.pending.append(values)

    def means(self) -> Row:
        """Means of the values of the pending steps, over the steps that have them and processes."""
        items = [item for values in self.pending for item in values.items()]
        self.pending.clear()
        # One transfer for all tensors.
        tensors = [x.detach().double() for _, x in items if isinstance(x, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        columns: dict[str, list[float]] = {}
        for name, x in items:
            number = next(numbers) if isinstance(x, Tensor) else float(x)
            columns.setdefault(name, []).append(number)
        means = [sum(column) / len(column) for column in columns.values()]
        total = torch.tensor(means, dtype=torch.float64, device=self.device)
        total = cast(Tensor, self.accelerator.reduce(total, reduction="mean"))
        return dict(zip(columns, total.tolist(), strict=True))

    def require_finite(self, values: Iterable[Tensor], what: str) -> None:
        """Raise FloatingPointError where a number is infinite or none."""
        if not torch.stack([x.isfinite().all() for x in values]).all():
            remedy = "lower the learning rate or the clip_norm"
            raise FloatingPointError(f"{self.title}: {what} not finite: {remedy}.")

    def show(self, pictures: Callable[[], Tensor], step: int) -> None:
        """Write a row of pictures; random numbers of training stay as they are."""
        with torch.random.fork_rng(), torch.no_grad():
            row_3HW = torch.cat(list(pictures().float().clamp(0, 1).cpu()), dim=2)
        row_HWC = np.asarray((row_3HW * 255).round().byte().permute(1, 2, 0))
        path = Path(self.log_folder, "images", self.name, f"step-{step:08d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row_HWC).save(path)
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"images": row_HWC[None]}, step=step, **layout)

    def take_averages(self) -> None:
        """Put the averaged weights into the modules, which are trained."""
        for average, averaged, _ in self.averages:
            for parameter, mean in zip(averaged.parameters(), average.parameters(), strict=True):
                parameter.data.copy_(mean)


def train_module(
    module: Module,
    loss_fn: Callable[[nn.Module, Any, int], tuple[Tensor, Logged]],
    batch_at: Callable[[int], Any],
    config: OptimizerConfig,
    folder: Path,
    run: dict[str, Any],
    *,
    after_update: Callable[[], None] | None = None,
    pictures: Callable[[], Tensor] | None = None,
    **options: Any,
) -> tuple[Module, list[Row]]:
    """Train one module with one loss; the module and its training curve.

    `loss_fn` takes prepared module, microbatch and step, and gives a scalar loss and values to log;
    `batch_at` gives the batch of a step for all processes. The rest is as for `TrainLoop`.
    """

    def share_at(step: int) -> Any:
        return split(batch_at(step), world_size())[rank()]

    with locked(folder), TrainLoop(config, folder, run, **options) as loop:
        model, _ = loop.prepare(module, config)
        loop.resume()
        for step, microbatches in loop.steps(share_at, pictures):
            # Forward, loss, backward. The gradients of the microbatches add up to the batch's.
            logged = []
            for microbatch in loop.accumulate(model, microbatches):
                with loop.accelerator.autocast():
                    loss, values = loss_fn(model, microbatch, step)
                loop.accelerator.backward(loss / len(microbatches))
                logged.append({"loss": loss.detach(), **values})

            # Clip, update, log.
            grad_norm = loop.update(model)
            if after_update is not None:
                after_update()
            loop.log({**mean_values(logged), "gradient_norm": grad_norm})
        loop.take_averages()
        return module, loop.rows


def split(batch: Any, count: int) -> list[Any]:
    """`count` equal parts of a tensor [B, ...], or of every tensor of a tuple."""
    if isinstance(batch, Tensor):
        # Copies: data workers send whole storages, of a view those of the whole batch.
        return [part.clone() for part in batch.chunk(count)]
    return list(zip(*(split(tensor, count) for tensor in batch), strict=True))


def mean_values(logged: Sequence[Logged]) -> dict[str, float | Tensor]:
    """Means of the values of a step's microbatches."""
    if len(logged) == 1:
        return dict(logged[0])
    return {name: sum(values[name] for values in logged) / len(logged) for name in logged[0]}
