"""Optimizers, the learning rate and the average of the weights."""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.optim.swa_utils import AveragedModel

from sitlib.train.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: brings singular values near 1
NS_STEPS = 3


def make_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or Adafactor; with `muon`, Muon for the matrices of the transformer blocks.

    Matrices decay; vectors (norms, biases), embeddings and codebooks do not.
    """
    hidden, decayed, exempt = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = any(part in name for part in ("position", "pos_emb", "codebooks", "embedding"))
        if config.algorithm == "muon" and ".blocks." in name and parameter.ndim == 2:
            hidden.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 and not is_table else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    betas = config.beta1, config.beta2
    if config.algorithm == "adafactor":
        return Adafactor(groups, {"lr": config.learning_rate, "betas": betas})
    options = {"lr": config.learning_rate, "betas": betas, "fused": True}
    if config.algorithm == "adamw":
        return torch.optim.AdamW(groups, **options)
    matrices = {"params": hidden, "orthogonal": True, "lr": config.muon_learning_rate}
    return Muon([*groups, matrices | {"weight_decay": config.weight_decay}], **options)


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal=True` hold matrices [R, C] that Muon updates instead.

    Momentum, Nesterov's, made orthogonal (Jordan et al., 2024), all matrices of one shape in one
    batched product. The update is scaled to the size of Adam's, 0.2 sqrt(max(R, C)) (arXiv
    2502.16982), so that decay and schedule mean the same in all groups.
    """

    def __init__(self, groups: ParamsT, momentum: float = 0.95, **adamw):
        super().__init__(groups, **adamw)
        self.momentum = momentum
        # So that torch's GradScaler skips whole steps, and leaves nothing of them to the kernels.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._update_matrices(group)
        return super().step(closure)

    def _update_matrices(self, group: dict) -> None:
        by_shape = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is not None:
                by_shape[weight.shape].append(weight)
        for shape, weights in by_shape.items():
            grads = torch.stack([weight.grad for weight in weights])
            for weight in weights:
                weight.grad = None  # or AdamW would move it, too
                if not self.state[weight]:  # the step is asked for by AdamW when it loads states
                    zero = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
                    self.state[weight] |= zero
            means = [self.state[weight]["exp_avg"] for weight in weights]
            torch._foreach_lerp_(means, list(grads), 1 - self.momentum)
            update = orthogonalize(grads.lerp(torch.stack(means), self.momentum), NS_STEPS)
            scale = 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, list(update), alpha=-group["lr"] * scale)


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """Matrices [N, R, C] with the same singular vectors, and singular values nearer to 1.

    After three steps 0.7 to 1.2 for four times as many columns as rows; of square Gaussian ones the
    smallest stay small (0.01 at 128 x 128, 0.1 after five).

    On a GPU products are bf16, as in torch.optim.Muon; a CPU without bf16 products takes twice
    the time for them, so there they keep the dtype of the matrices.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if is_tall else matrices  # the smaller side first: A below is small
    X = X.bfloat16() if X.is_cuda else X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if is_tall else X).to(matrices.dtype)


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235) with momentum and absolute rates, as VIM and Parti have it.

    Squares of gradients are averaged by row and column, corrected as Adam's (section 7.1 there);
    updates, of a root mean square of at most 1, are averaged (VIM, Parti: in 8 bits) uncorrected.
    """

    @torch.no_grad()
    def step(self, closure=None):  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for weight in (p for p in group["params"] if p.grad is not None):
                grad, state = torch.atleast_2d(weight.grad), self.state[weight]  # a vector: one row
                squares = grad.square().add_(1e-30)
                means = {"row_sq": squares.mean(-1, True), "column_sq": squares.mean(-2, True)}
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(weight), **means}
                state["step"] += 1
                newest = (1 - beta2) / (1 - beta2 ** state["step"])
                row, column = (state[name].lerp_(x, newest) for name, x in means.items())
                update = grad * (row / row.mean(-2, keepdim=True)).rsqrt() * column.rsqrt()
                update *= lr / update.square().mean().sqrt().clamp(min=1)
                mean = state["exp_avg"].lerp_(update.view_as(weight), 1 - beta1)
                weight.mul_(1 - lr * group["weight_decay"]).sub_(mean)


def learning_rate_factor(step: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then decay to the final rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, config.decay_start)
    progress = min(max(step - start, 0) / max(config.steps - start, 1), 1.0)
    floor = config.final_learning_rate / config.learning_rate
    if config.schedule == "exponential":
        return floor**progress
    cosine = (1 + torch.cos(torch.tensor(math.pi * progress)).item()) / 2
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
    """Set the moments of the rows [K] bool of `weight` [K, D] to zero."""
    for moment in ("exp_avg", "exp_avg_sq", "row_sq"):
        if moment in optimizer.state.get(weight, {}):
            optimizer.state[weight][moment].masked_fill_(rows[:, None], 0.0)
