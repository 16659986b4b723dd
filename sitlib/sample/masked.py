"""Writing a scale at a time: codes of a scale are drawn together, in a few passes.

MaskGIT's decoding (arXiv 2202.04200) within each scale. One pass a scale is VAR's (arXiv
2404.02905), as many as there are codes nearly one code after the other.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel, DecodeState
from sitlib.model.transformer import inference_autocast
from sitlib.sample.draw import draw


def hidden_after(step: int, steps: int, count: int) -> int:
    """Codes of a scale that stay hidden after a pass, by the cosine schedule; 0 after the last."""
    return math.floor(count * math.cos(math.pi / 2 * step / steps)) if step < steps else 0


def write_scales(
    model: AutoregressiveModel,
    codes: Tensor,
    cond: Tensor,
    first: int,
    sampling: SamplingConfig,
    seeds: list[list[int]],
    on_scale: Callable[[int], None] | None,
) -> None:
    """Fill codes [B, S, N] from scale `first` on, in place; earlier ones are given.

    Args:
        cond: of each row, once more for guidance without it.
        seeds: of the random numbers of each row, which neither batch nor other scales change.
        on_scale: called after each drawn scale, with the number of finished ones.
    """
    scales, n, device, halves = *codes.shape[1:], codes.device, len(cond) // len(codes)
    steps = min(sampling.steps_per_scale, n)
    with torch.inference_mode(), inference_autocast(device):
        state = model.start_scales(cond)
    for scale in range(scales):
        with torch.inference_mode(), inference_autocast(device):
            if scale >= first:
                rngs = [np.random.default_rng([*seed, scale]) for seed in seeds]
                numbers = [rng.random((2 * steps, n), dtype=np.float32) for rng in rngs]
                uniform = torch.from_numpy(np.stack(numbers, axis=1)).to(device)  # [2 steps, B, N]
                codes[:, scale] = _drawn(model, state, codes[:, scale], halves, sampling, uniform)
            if scale + 1 < scales:
                model.read_scale(state, codes[:, scale].repeat(halves, 1))
        # The caller's code runs outside of inference mode and autocast.
        if scale >= first and on_scale is not None:
            on_scale(scale + 1)


def _drawn(
    model: AutoregressiveModel,
    state: DecodeState,
    codes: Tensor,
    halves: int,
    sampling: SamplingConfig,
    uniform: Tensor,
) -> Tensor:
    """Codes [B, N] of the next scale, in half as many passes as numbers [2 k, B, N], or fewer."""
    steps, count = len(uniform) // 2, codes.shape[1]
    is_hidden = torch.ones_like(codes, dtype=torch.bool)
    for step in range(1, steps + 1):
        left = hidden_after(step, steps, count)
        if left == hidden_after(step - 1, steps, count):
            continue  # nothing of this pass would stay
        read = codes.repeat(halves, 1), is_hidden.repeat(halves, 1)
        logits = model.read_scale(state, *read).unflatten(0, (halves, -1))  # [halves, B, N, K]
        logits = logits[:, is_hidden].flatten(0, 1)  # [halves M, K] of the M that are hidden
        drawn, logits = draw(logits, uniform[2 * step - 2][is_hidden], sampling, halves == 2)
        codes = codes.masked_scatter(is_hidden, drawn)
        # The surest stay, by the model's own probability, with noise that falls to 0; codes that
        # stayed before are sure.
        p = logits.float().softmax(-1).gather(1, drawn[:, None])
        gumbel = -(-uniform[2 * step - 1].clamp(1e-9, 1 - 1e-6).log()).log()
        noise = sampling.choice_temperature * (1 - step / steps) * gumbel
        sureness = torch.full_like(noise, math.inf).masked_scatter(is_hidden, p.log()) + noise
        rank = sureness.argsort(dim=1).argsort(dim=1)  # 0: the least sure
        is_hidden = rank < left
    return codes
