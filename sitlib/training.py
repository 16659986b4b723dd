"""The training loop: one for tokenizers and autoregressive models, resumable to the bit.

What is trained is a list of phases, each a set of parameters, its optimiser and a loss of a batch. A tokenizer has one phase, and its
discriminator is a second one. Accelerate supplies device, precision and exact checkpoints (weights, optimiser, scheduler, random state).
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from sitlib.config import OptimiserConfig
from sitlib.data import prefetch
from sitlib.paths import resolve
from sitlib.results import Row


@dataclass
class Phase:
    """One update of every step.

    Attributes:
        module: whose parameters are updated.
        loss: (module, batch, step) -> scalar to minimise, and values to log; None where the phase rests in this step.
        after_update: called with the optimiser after it has stepped (codebooks restart dead codes there).
        at_log: called before each row of the training curve is written; values of all steps since the last row.
        optimiser: its own settings, where they differ from those of the run.
    """

    module: nn.Module
    loss: Callable[[nn.Module, Any, int], tuple[Tensor, Row] | None]
    after_update: Callable[[torch.optim.Optimizer], Row] | None = None
    at_log: Callable[[], Row] | None = None
    optimiser: OptimiserConfig | None = None


def learning_rate_factor(step: int, config: OptimiserConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then cosine decay to the final rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    floor = config.final_learning_rate / config.learning_rate
    cosine = (1 + torch.cos(torch.tensor(torch.pi * min(progress, 1.0))).item()) / 2
    return floor + (1 - floor) * cosine


def make_optimiser(module: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
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
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch: before a model is built, so that its initial weights follow from the seed."""
    set_seed(seed)


def train(
    phases: Sequence[Phase],
    batch_at: Callable[[int], Any],
    config: OptimiserConfig,
    *,
    checkpoints: str | Path,
    start: Callable[[], None] | None = None,
    title: str = "training",
) -> list[Row]:
    """Trains every phase for `config.steps` steps and returns the training curve.

    A run that was killed goes on from its newest checkpoint and ends as if it had not been; so `batch_at` must be a pure function of the
    step. The caller removes `checkpoints` once the result is safe (`forget_checkpoints`).

    Args:
        phases: what is updated in each step, in this order.
        batch_at: step -> batch of CPU tensors (a tensor or a tuple of tensors).
        checkpoints: folder for resumable states, named by everything that determines the run.
        start: called once before the first step of a fresh run, after models have moved to their device (k-means start).
        title: shown beside the progress bar.

    Returns:
        Rows with `step`, `learning_rate`, `gradient_norm`, `seconds` and the logged values, averaged over `log_every` steps.

    Raises:
        FloatingPointError: a loss is not finite; the last good checkpoint stays.
    """
    accelerator = Accelerator(mixed_precision=precision(), cpu=not torch.cuda.is_available())
    settings = [phase.optimiser or config for phase in phases]
    optimisers = [make_optimiser(phase.module, own) for phase, own in zip(phases, settings, strict=True)]
    schedulers = [
        LambdaLR(optimiser, partial(learning_rate_factor, config=own))
        for optimiser, own in zip(optimisers, settings, strict=True)
    ]
    modules = [accelerator.prepare_model(phase.module.train()) for phase in phases]
    optimisers = [accelerator.prepare_optimizer(optimiser) for optimiser in optimisers]
    schedulers = [accelerator.prepare_scheduler(scheduler) for scheduler in schedulers]
    averages = [_average(phase.module, own) for phase, own in zip(phases, settings, strict=True)]
    accelerator.register_for_checkpointing(*filter(None, averages))

    store = _Checkpoints(resolve(checkpoints), accelerator)
    first_step, rows = store.load()
    if first_step == 0 and start is not None:
        start()
    elapsed, began = (rows[-1]["seconds"] if rows else 0.0), time.perf_counter()
    pending: list[Row] = []
    bar = tqdm(
        total=config.steps,
        initial=first_step,
        desc=title,
        unit="step",
        mininterval=5.0,
        dynamic_ncols=False,
        ncols=110,
    )
    for step, batch in prefetch(batch_at, first_step, config.steps):
        batch = _to(batch, accelerator.device)
        logged: Row = {}
        for index, phase in enumerate(phases):
            with accelerator.autocast():
                result = phase.loss(modules[index], batch, step)
            if result is None:
                continue
            loss, values = result
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(modules[index].parameters(), settings[index].clip_norm)
            optimisers[index].step()
            optimisers[
                index
            ].zero_grad()  # at once: with loss scaling, clipping touches the gradients of every phase
            schedulers[index].step()
            if phase.after_update is not None:
                values = {**values, **phase.after_update(optimisers[index])}
            if averages[index] is not None:
                averages[index].update_parameters(phase.module)
            logged |= {"loss": loss.detach(), **values, "gradient_norm": norm} if index == 0 else values
        pending.append(logged)
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            means = _means(pending)
            for phase in phases:
                means |= phase.at_log() if phase.at_log is not None else {}
            pending = []
            if not torch.isfinite(torch.tensor(means["loss"])):
                raise FloatingPointError(
                    f"{title}: the loss is not finite at step {done}: lower the learning rate or the clip_norm."
                )
            rate = config.learning_rate * learning_rate_factor(step, config)
            seconds = elapsed + time.perf_counter() - began
            rows.append({"step": done, "learning_rate": rate, "seconds": round(seconds, 1), **means})
            bar.set_postfix({name: f"{means[name]:.3f}" for name in list(means)[:2]}, refresh=False)
        if done % config.checkpoint_every == 0 and done < config.steps and not pending:
            store.save(done, rows)
        bar.update()
    bar.close()
    for phase, average in zip(phases, averages, strict=True):
        if average is not None:  # what is kept is the average
            for parameter, mean in zip(phase.module.parameters(), average.parameters(), strict=True):
                parameter.data.copy_(mean)
    return rows


def precision() -> Literal["no", "fp16", "bf16"]:
    """Mixed precision by device: bf16 on GPUs that have it, fp16 with loss scaling on older ones, none on a CPU."""
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _average(module: nn.Module, config: OptimiserConfig) -> AveragedModel | None:
    """The exponential moving average of a module's parameters, if the configuration asks for one."""
    if not config.ema_decay:
        return None
    return AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))


def _means(rows: list[Row]) -> Row:
    """Mean of every value over the rows that have it, in the order of first appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [float(row[name]) for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def forget_checkpoints(folder: str | Path) -> None:
    """Removes the resumable states of a finished run."""
    shutil.rmtree(resolve(folder), ignore_errors=True)


class _Checkpoints:
    """Resumable states in a folder: written beside, then renamed, so that a half-written one is never found."""

    def __init__(self, folder: Path, accelerator: Accelerator):
        self.folder = folder
        self.accelerator = accelerator

    def load(self) -> tuple[int, list[Row]]:
        """Restores the newest state; (its step, its curve), or (0, []) where there is none."""
        states = sorted(self.folder.glob("step-*"))
        if not states:
            return 0, []
        self.accelerator.load_state(str(states[-1]))
        progress = json.loads((states[-1] / "progress.json").read_text())
        return progress["step"], progress["rows"]

    def save(self, step: int, rows: list[Row]) -> None:
        partial, final = self.folder / "partial", self.folder / f"step-{step:08d}"
        shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.save_state(str(partial))
        (partial / "progress.json").write_text(json.dumps({"step": step, "rows": rows}))
        older = list(self.folder.glob("step-*"))
        os.replace(partial, final)
        for state in older:
            shutil.rmtree(state)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return tuple(_to(part, device) for part in batch)
