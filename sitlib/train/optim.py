"""Optimizers, their learning rate schedule, and the moving average of the weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sitlib.train.config import OptimizerConfig


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW; matrices decay; vectors (norms, biases), embeddings and codebooks do not."""
    decayed, exempt = [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = any(part in name for part in ("position", "pos_emb", "codebooks", "embedding"))
        (decayed if parameter.ndim >= 2 and not is_table else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def learning_rate_factor(step: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, cosine decay to the final rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    floor = config.final_learning_rate / config.learning_rate
    cosine = (1 + torch.cos(torch.tensor(math.pi * min(progress, 1.0))).item()) / 2
    return floor + (1 - floor) * cosine


@torch.no_grad()
def ema_update(average: AveragedModel, module: nn.Module, decay: float) -> None:
    """Move the exponential moving average of the parameters of `module` by one step."""
    means = [parameter.detach() for parameter in average.parameters()]
    values = [parameter.detach() for parameter in module.parameters()]
    # AveragedModel.update_parameters does the same, but waits for the GPU at every step.
    torch._foreach_lerp_(means, values, 1.0 - decay if average.n_averaged else 1.0)
    average.n_averaged += 1  # on the CPU


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer, weight: Tensor, rows: Tensor) -> None:
    """Set Adam's moments of the rows [K] bool of `weight` [K, D] to zero."""
    for moment in ("exp_avg", "exp_avg_sq"):
        if weight in optimizer.state:
            optimizer.state[weight][moment].masked_fill_(rows[:, None], 0.0)
