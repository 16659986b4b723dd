"""The training loop: one for tokenizers and autoregressive models, resumable to the bit.

What is trained is a list of phases, each a set of parameters, its optimizer and a loss of a batch. A tokenizer has one phase, and its
discriminator is a second one. The engine supplies devices, processes and precision; `sitlib.train.checkpoint` what is resumed.
"""

import math
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from sitlib.files import Row
from sitlib.paths import resolve
from sitlib.train.checkpoint import States, locked
from sitlib.train.config import EngineConfig, OptimizerConfig
from sitlib.train.distributed import agreed, mean_over_processes, num_processes, process_index
from sitlib.train.engine import ONE_PROCESS, Engine, Part, on_device, to_host

Logged = Mapping[str, float | Tensor]
# After which a state is written, however far the next one is: a killed run loses no more, but for the steps up to a row of its curve.
STATE_SECONDS = 20 * 60


@dataclass
class Phase:
    """One update of every step.

    Attributes:
        module: whose parameters are updated.
        loss: (module, part of a batch, step) -> scalar to minimise, a mean over samples, and values to log, numbers or scalar tensors;
            None where the phase rests in this step.
        after_update: called with the optimizer after it has stepped (codebooks restart dead codes there).
        at_log: called before each row of the training curve is written; values of all steps and processes since the last row.
        optimizer: its own settings, where they differ from those of the run.
    """

    module: nn.Module
    loss: Callable[[nn.Module, Any, int], tuple[Tensor, Logged] | None]
    after_update: Callable[[torch.optim.Optimizer], Logged] | None = None
    at_log: Callable[[], Row] | None = None
    optimizer: OptimizerConfig | None = None


def learning_rate_factor(step: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then cosine decay to the final rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    floor = config.final_learning_rate / config.learning_rate
    cosine = (1 + torch.cos(torch.tensor(torch.pi * min(progress, 1.0))).item()) / 2
    return floor + (1 - floor) * cosine


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, while vectors (norms, biases), embeddings of positions and codebooks do not."""
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim >= 2 and not any(
                part in name for part in ("position", "codebooks", "embedding")
            )
            (decayed if is_matrix else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch: before a model is built, so that its initial weights follow from the seed."""
    set_seed(seed)


def train(
    phases: Sequence[Phase],
    batch_at: Callable[[int, Part], Any],
    config: OptimizerConfig,
    *,
    checkpoints: str | Path,
    engine: EngineConfig = ONE_PROCESS,
    start: Callable[[], None] | None = None,
    pictures: Callable[[], Tensor] | None = None,
    title: str = "training",
) -> list[Row]:
    """Trains every phase for `config.steps` steps and returns the training curve.

    A run that was killed goes on from its newest checkpoint and ends as if it had not been; so `batch_at` must be a pure function. The
    caller removes `checkpoints` once the result is safe (`forget_checkpoints`). With several processes all of them call this, and end with
    the same weights and curve.

    Args:
        phases: what is updated in each step, in this order.
        batch_at: step, part -> this part of the step's batch, CPU tensors (a tensor or a tuple of tensors). Called in another thread.
        checkpoints: folder for resumable states, named by everything that determines the run.
        engine: devices and processes.
        start: called once, by the first process, before the first step of a fresh run, after models have moved to their device (k-means
            start).
        pictures: images [M, 3, H, W] in [0, 1] that show what was learned so far; called by the first
            process every `engine.images_every` steps.
        title: shown beside the progress bar.

    Returns:
        Rows with `step`, `learning_rate`, `gradient_norm`, `seconds` and the logged values, averaged over `log_every` steps.

    Raises:
        FloatingPointError: a loss or a weight is not finite; the last good checkpoint stays.
        StateError: another process trains this run, or a checkpoint could not be written (a full disk); the last good one stays.
    """
    checkpoints = resolve(checkpoints)
    with locked(checkpoints):
        return _train(
            phases,
            batch_at,
            config,
            checkpoints,
            Engine(engine, config.batch_size),
            start,
            pictures,
            title,
        )


def _train(
    phases: Sequence[Phase],
    batch_at: Callable[[int, Part], Any],
    config: OptimizerConfig,
    checkpoints: Path,
    engine: Engine,
    start: Callable[[], None] | None,
    pictures: Callable[[], Tensor] | None,
    title: str,
) -> list[Row]:
    accelerator = engine.accelerator
    settings = [phase.optimizer or config for phase in phases]
    made = [make_optimizer(phase.module, own) for phase, own in zip(phases, settings, strict=True)]
    schedulers = [
        accelerator.prepare_scheduler(
            LambdaLR(optimizer, partial(learning_rate_factor, config=own))
        )
        for optimizer, own in zip(made, settings, strict=True)
    ]
    ready = [
        engine.prepare(phase.module.train(), own) for phase, own in zip(phases, made, strict=True)
    ]
    modules, optimizers = zip(*ready, strict=True)
    averages = [_average(phase.module, own) for phase, own in zip(phases, settings, strict=True)]
    accelerator.register_for_checkpointing(*filter(None, averages))

    store = States(checkpoints, accelerator, engine.config.strategy)
    first_step, rows = store.load()
    # Runs of other settings have the same title.
    name = re.sub(r"[^\w.]+", "-", f"{title} {checkpoints.name.partition('-')[0]}")
    engine.track(name, first_step)
    if first_step == 0 and start is not None:
        if process_index() == 0:
            start()
        for phase in phases:
            engine.share(phase.module)
    elapsed, began = (rows[-1]["seconds"] if rows else 0.0), time.perf_counter()
    saved = began
    pending: list[Logged] = []
    bar = tqdm(
        total=config.steps,
        initial=first_step,
        desc=title,
        unit="step",
        mininterval=5.0,
        dynamic_ncols=False,
        ncols=110,
        disable=process_index() > 0,
    )

    def parts_at(step: int) -> list[Any]:
        return [batch_at(step, part) for part in engine.parts]

    for step, parts in engine.made_ahead(parts_at, first_step, config.steps):
        parts = [on_device(part, engine.device) for part in parts]
        logged: dict[str, float | Tensor] = {}
        for index, phase in enumerate(phases):
            values = _accumulate(phase, modules[index], parts, step, engine)
            if values is None:
                continue
            norm = accelerator.clip_grad_norm_(
                modules[index].parameters(), settings[index].clip_norm
            )
            optimizers[index].step()
            # At once: with loss scaling, clipping touches the gradients of every phase.
            optimizers[index].zero_grad()
            schedulers[index].step()
            if phase.after_update is not None:
                values |= phase.after_update(optimizers[index])
            if (average := averages[index]) is not None:
                _follow(average, phase.module, settings[index].ema_decay)
            if index == 0:
                assert norm is not None
                values |= {
                    "gradient_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm
                }
            else:
                del values["loss"]
            logged |= values
        pending.append(logged)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            means = _means(pending, engine.device)
            for phase in phases:
                means |= phase.at_log() if phase.at_log is not None else {}
            pending = []
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{title}: the loss is not finite at step {done}: lower the learning rate or the clip_norm."
                )
            rate = config.learning_rate * learning_rate_factor(step, config)
            seconds = elapsed + time.perf_counter() - began
            rows.append(
                {"step": done, "learning_rate": rate, "seconds": round(seconds, 1), **means}
            )
            bar.set_postfix({name: f"{means[name]:.3f}" for name in list(means)[:2]}, refresh=False)
        is_last = (
            done == config.steps
        )  # its state stays until the model is written: there may be no room
        is_due = done % config.checkpoint_every == 0 or is_last
        if not pending and (is_due or agreed(time.perf_counter() - saved > STATE_SECONDS)):
            # Of gradients that are not finite only the next loss would tell, and a good state would be gone.
            if not _are_finite(modules):
                raise FloatingPointError(
                    f"{title}: weights are not finite after step {done}: lower the learning rate or the clip_norm."
                )
            store.save(done, rows)
            saved = time.perf_counter()
        if not pending:  # after the state, which no tracker or picture that fails shall cost
            engine.log(rows[-1])
        if (
            pictures is not None
            and engine.config.images_every
            and done % engine.config.images_every == 0
        ):
            _show(pictures, done, name, engine)
        bar.update()
    bar.close()
    engine.finish()
    for phase, module, average in zip(phases, modules, averages, strict=True):
        if average is not None:  # what is kept is the average
            for parameter, mean in zip(
                phase.module.parameters(), average.parameters(), strict=True
            ):
                parameter.data.copy_(mean)
        phase.module = engine.whole(phase.module, module)
    return rows


def _accumulate(
    phase: Phase, module: nn.Module, parts: list[Any], step: int, engine: Engine
) -> dict[str, float | Tensor] | None:
    """Adds up the gradients of a step's parts; what they log, with the loss, or None where the phase rests."""
    rows: list[dict[str, float | Tensor]] = []
    for number, part in enumerate(parts, 1):
        with engine.part_of_step(module, is_last=number == len(parts)):
            with engine.accelerator.autocast():
                result = phase.loss(module, part, step)
            if result is None:
                return None
            loss, values = result
            engine.accelerator.backward(loss / len(parts) if len(parts) > 1 else loss)
        rows.append({"loss": loss.detach(), **values})
    if len(rows) == 1:
        return rows[0]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _are_finite(modules: Sequence[nn.Module]) -> bool:
    """Whether all weights are, of sharded modules those that this process holds."""
    weights = [parameter.detach() for module in modules for parameter in module.parameters()]
    own = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    return bool(torch.stack([weight.isfinite().all() for weight in own]).all())


def _average(module: nn.Module, config: OptimizerConfig) -> AveragedModel | None:
    """The exponential moving average of a module's parameters, if the configuration asks for one."""
    if not config.ema_decay:
        return None
    return AveragedModel(module)


def _follow(average: AveragedModel, module: nn.Module, decay: float) -> None:
    """Moves the average of parameters: what its own `update_parameters` does with torch's moving average, which waits for the GPU at
    every step."""
    means, values = (
        [parameter.detach() for parameter in holder.parameters()] for holder in (average, module)
    )
    torch._foreach_lerp_(means, values, 1.0 - decay if average.n_averaged else 1.0)
    average.n_averaged += 1  # on the CPU


def _means(rows: list[Logged], device: torch.device) -> Row:
    """Mean of every value over the rows that have it and over processes, in the order of first appearance."""
    names = [name for row in rows for name in row]
    columns: dict[str, list[float]] = {name: [] for name in names}
    for name, value in zip(
        names, to_host([value for row in rows for value in row.values()]), strict=True
    ):
        columns[name].append(value)
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    if num_processes() == 1:
        return means
    shared = mean_over_processes(
        torch.tensor(list(means.values()), dtype=torch.float64, device=device)
    )
    return dict(zip(means, shared.tolist(), strict=True))


def _show(pictures: Callable[[], Tensor], step: int, name: str, engine: Engine) -> None:
    """Writes a row of pictures to scratch/images; drawing them leaves the random numbers of training as they are."""
    if process_index() > 0:
        return
    with torch.random.fork_rng(), torch.no_grad():
        images = pictures().float().clamp(0, 1).cpu()
    row_HWC = np.asarray((torch.cat(list(images), dim=2) * 255).round().byte().permute(1, 2, 0))
    path = resolve(f"scratch/images/{name}/step-{step:08d}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(row_HWC).save(path)
    engine.log_image(row_HWC, step)


def forget_checkpoints(folder: str | Path) -> None:
    """Removes the resumable states of a finished run."""
    shutil.rmtree(resolve(folder), ignore_errors=True)
