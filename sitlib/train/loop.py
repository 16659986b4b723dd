"""The training loop around a step: data, curve, resumable states, progress, trackers, pictures.

`sitlib.train.tokenizer` and `sitlib.train.generator` write the step itself.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from sitlib.files import Row
from sitlib.train.checkpoint import States, locked
from sitlib.train.config import EngineConfig, OptimizerConfig
from sitlib.train.distributed import (
    ONE_PROCESS,
    Engine,
    Microbatch,
    all_reduce,
    broadcast_object,
    rank,
    world_size,
)
from sitlib.train.optim import ema_update, learning_rate_factor, make_optimizer

Logged = Mapping[str, float | Tensor]
Module = TypeVar("Module", bound=nn.Module)
STATE_SECONDS = 20 * 60  # max seconds between states, but for the steps to a row of the curve


class TrainLoop:
    """One training run, resumable to the bit: killed, it ends as if it had not been.

    `train_module` shows its use. With several processes all of them do this, and end with the same
    weights and curve.

    Args:
        config: steps, batch size, rows of the curve and states.
        engine: devices and processes.
        folder: of resumable states. The caller removes it once the result is safe.
        run: plain values that determine the run; kept as `run.json` in the folder.
        title: shown beside the progress bar.
        log_folder: trackers write to `trackers`, pictures to `images` in it.

    Raises:
        StateError: another process trains in this folder, or it holds another run.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        engine: EngineConfig,
        folder: str | Path,
        run: dict[str, Any],
        title: str = "training",
        log_folder: str | Path = "scratch",
    ):
        self.config, self.engine_config, self.run = config, engine, run
        self.folder, self.log_folder, self.title = Path(folder), Path(log_folder), title
        # Runs of other settings may have the same title: the folder is named by them.
        self.name = re.sub(r"[^\w.]+", "-", f"{title} {self.folder.name.partition('-')[0]}")
        self.rows: list[Row] = []
        self.first_step = 0
        self._models: list[nn.Module] = []
        self._pending: list[Logged] = []  # of the steps since the last row
        self._exit = ExitStack()

    def __enter__(self) -> "TrainLoop":
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            self.engine = Engine(self.engine_config, self.config.batch_size, self.log_folder)
            stack.callback(self.engine.finish)
            self._exit = stack.pop_all()
        self.accelerator, self.device = self.engine.accelerator, self.engine.device
        sharded = self.engine_config.strategy == "fsdp"
        self._states = States(self.folder, self.accelerator, self.run, sharded)
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.close()

    def prepare(
        self, module: nn.Module, config: OptimizerConfig
    ) -> tuple[nn.Module, torch.optim.Optimizer, LRScheduler, AveragedModel | None]:
        """The wrapped module, its optimizer, its schedule, and the average of its weights, if any."""
        adamw = make_optimizer(module, config)
        schedule = LambdaLR(adamw, partial(learning_rate_factor, config=config))
        schedule = self.accelerator.prepare_scheduler(schedule)
        model, optimizer = self.engine.prepare(module.train(), adamw)
        self._models.append(model)
        ema = AveragedModel(module) if config.ema_decay else None
        if ema is not None:
            self.accelerator.register_for_checkpointing(ema)
        return model, optimizer, schedule, ema

    def resume(self) -> int:
        """Restore the newest state of all prepared modules; the step at which training begins."""
        self.first_step, self.rows = self._states.load()
        self.engine.track(self.name, self.first_step)
        return self.first_step

    def steps(
        self,
        batch_at: Callable[[int, Microbatch], Any],
        pictures: Callable[[], Tensor] | None = None,
    ) -> Iterator[tuple[int, list[Any]]]:
        """Yield (step, this process's microbatches); the body logs one step's values each time.

        Args:
            batch_at: part of a step's batch, a tensor or a tuple of tensors on the CPU; a pure
                function of the step, called in another thread or process.
            pictures: images [M, 3, H, W] in [0, 1] that show what was learned so far, called by
                rank 0 every `images_every` steps.

        Raises:
            FloatingPointError: a loss or a weight is not finite; the last good state stays.
            StateError: a state could not be written; the last good one stays.
        """
        config, every = self.config, self.engine_config.images_every
        began, saved = time.perf_counter(), time.perf_counter()
        elapsed = self.rows[-1]["seconds"] if self.rows else 0.0
        options = {"unit": "step", "mininterval": 5.0, "ncols": 110, "disable": rank() > 0}
        bar = tqdm(total=config.steps, initial=self.first_step, desc=self.title, **options)
        for step, microbatches in self.engine.prefetch(batch_at, self.first_step, config.steps):
            yield step, microbatches
            done = step + 1
            if self.is_log_step(step):
                means = self._means()
                self._require_finite(math.isfinite(means["loss"]), f"the loss at step {done} is")
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
                    self._require_finite(
                        self._weights_are_finite(), f"weights after step {done} are"
                    )
                    self._states.save(done, self.rows)
                    saved = time.perf_counter()
                self.engine.log(row)  # after the state: a tracker that fails shall not cost it
            if pictures is not None and every and done % every == 0 and rank() == 0:
                self._show(pictures, done)
            bar.update()
        bar.close()

    def is_log_step(self, step: int) -> bool:
        """True where a row of the curve ends: values that need the GPU to be waited for."""
        return (step + 1) % self.config.log_every == 0 or step + 1 == self.config.steps

    def log(self, values: Logged) -> None:
        """Take what a step has to say, numbers or scalar tensors; `loss` is one of them."""
        self._pending.append(values)

    def clip_grad_norm(self, model: nn.Module, clip_norm: float) -> Tensor:
        """Scale the gradients of `model` to a norm of at most `clip_norm`; the norm before."""
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(model.parameters(), clip_norm))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def trained(self, module: Module, model: nn.Module, ema: AveragedModel | None) -> Module:
        """The trained module: its averaged weights, gathered from all processes."""
        if ema is not None:
            for parameter, mean in zip(module.parameters(), ema.parameters(), strict=True):
                parameter.data.copy_(mean)
        return cast(Module, self.engine.gather_params(module, model))

    def _means(self) -> Row:
        """Means of the values of the pending steps, over the steps that have them and processes."""
        columns: dict[str, list[float]] = {}
        items = [item for values in self._pending for item in values.items()]
        self._pending = []
        # One transfer for all tensors.
        tensors = [x.detach().double() for _, x in items if isinstance(x, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        for name, x in items:
            number = next(numbers) if isinstance(x, Tensor) else float(x)
            columns.setdefault(name, []).append(number)
        means = {name: sum(column) / len(column) for name, column in columns.items()}
        if world_size() == 1:
            return means
        total = torch.tensor(list(means.values()), dtype=torch.float64, device=self.device)
        return dict(zip(means, all_reduce(total).div_(world_size()).tolist(), strict=True))

    def _require_finite(self, is_finite: bool, what: str) -> None:
        if not is_finite:
            remedy = "lower the learning rate or the clip_norm"
            raise FloatingPointError(f"{self.title}: {what} not finite: {remedy}.")

    def _weights_are_finite(self) -> bool:
        weights = [p.detach() for model in self._models for p in model.parameters()]
        shards = [w.to_local() if isinstance(w, DTensor) else w for w in weights]
        return bool(torch.stack([shard.isfinite().all() for shard in shards]).all())

    def _show(self, pictures: Callable[[], Tensor], step: int) -> None:
        """Write a row of pictures; random numbers of training stay as they are."""
        with torch.random.fork_rng(), torch.no_grad():
            row_3HW = torch.cat(list(pictures().float().clamp(0, 1).cpu()), dim=2)
        row_HWC = np.asarray((row_3HW * 255).round().byte().permute(1, 2, 0))
        path = self.log_folder / "images" / self.name / f"step-{step:08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(row_HWC).save(path)
        self.engine.log_image(row_HWC, step)


def train_module(
    module: Module,
    loss_fn: Callable[[nn.Module, Any, int], tuple[Tensor, Logged]],
    batch_at: Callable[[int, Microbatch], Any],
    config: OptimizerConfig,
    *,
    folder: str | Path,
    run: dict[str, Any],
    after_update: Callable[[], None] | None = None,
    engine: EngineConfig = ONE_PROCESS,
    title: str = "training",
    log_folder: str | Path = "scratch",
) -> tuple[Module, list[Row]]:
    """Train one module with one loss: the plain step, for models without a step of their own.

    `loss_fn(prepared module, microbatch, step)` gives a scalar loss and values to log. Other
    arguments are those of `TrainLoop` and `TrainLoop.steps`.

    Returns:
        The trained module and its training curve.
    """
    with TrainLoop(config, engine, folder, run, title, log_folder) as loop:
        model, optimizer, schedule, ema = loop.prepare(module, config)
        loop.resume()
        for step, microbatches in loop.steps(batch_at):
            logged = []
            for microbatch in loop.engine.accumulate(model, microbatches):
                with loop.accelerator.autocast():
                    loss, values = loss_fn(model, microbatch, step)
                loop.accelerator.backward(loss / len(microbatches))
                logged.append({"loss": loss.detach(), **values})
            grad_norm = loop.clip_grad_norm(model, config.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if after_update is not None:
                after_update()
            if ema is not None:
                ema_update(ema, module, config.ema_decay)
            loop.log({**mean_values(logged), "gradient_norm": grad_norm})
        return loop.trained(module, model, ema), loop.rows


def mean_values(logged: Sequence[Logged]) -> dict[str, float | Tensor]:
    """Means of the values of a step's microbatches."""
    if len(logged) == 1:
        return dict(logged[0])
    return {name: sum(values[name] for values in logged) / len(logged) for name in logged[0]}
