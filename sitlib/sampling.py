"""Drawing codes from an autoregressive model: filters, classifier-free guidance and a static key-value cache."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.autoregressive import AutoregressiveModel
from sitlib.config import SamplingConfig


@torch.no_grad()
def generate(
    model: AutoregressiveModel, labels: Tensor, config: SamplingConfig, *, progress: str | None = None
) -> Tensor:
    """Draws one code sequence for each class id.

    Sample i depends on the seed and on i alone, not on the batch in which it is drawn (up to floating-point ties): each has its own
    random numbers. Batches larger than `config.batch_size` are split.

    Args:
        labels: [B] int64 class ids.
        progress: title of a progress bar, or None for none.

    Returns:
        Codes [B, S, N] int64 on the model's device.

    Raises:
        ValueError: a class id that the model does not know.
    """
    known = len(model.config.classes)
    if labels.ndim != 1 or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < known):
        raise ValueError(
            f"labels must be [B] class ids in 0 ... {known - 1} ({', '.join(model.config.classes)})."
        )
    device = next(model.parameters()).device
    starts = range(0, len(labels), config.batch_size)
    bar = tqdm(
        total=len(labels), desc=progress, unit="image", mininterval=5.0, ncols=110, disable=progress is None
    )
    batches = []
    for start in starts:
        chunk = labels[start : start + config.batch_size].to(device)
        batches.append(_generate_batch(model, chunk, start, config))
        bar.update(len(chunk))
    bar.close()
    shape = (model.config.num_scales, model.config.tokens_per_scale)
    return torch.cat(batches).unflatten(1, shape) if batches else labels.new_empty((0, *shape))


def _generate_batch(model: AutoregressiveModel, labels: Tensor, first: int, config: SamplingConfig) -> Tensor:
    """Codes [B, T] of samples first ... first + B."""
    batch, length = len(labels), model.num_tokens
    guided = config.guidance != 1.0
    if guided:  # both halves in one batch
        labels = torch.cat([labels, torch.full_like(labels, model.no_class)])
    uniform_BT = torch.stack([_random_numbers(config.seed, first + i, length) for i in range(batch)]).to(
        labels.device
    )
    cache = model.transformer.new_cache(len(labels), length)
    codes_BT = torch.empty(batch, length, dtype=torch.int64, device=labels.device)
    x_B1C = model.embed_class(labels)
    for position in range(length):
        logits_BK = model.next_logits(x_B1C, cache)
        if guided:
            conditional, unconditional = logits_BK.chunk(2)
            logits_BK = unconditional + config.guidance * (conditional - unconditional)
        probabilities_BK = filtered_probabilities(logits_BK, config.temperature, config.top_k, config.top_p)
        codes_BT[:, position] = draw(probabilities_BK, uniform_BT[:, position])
        chosen = codes_BT[:, position : position + 1]
        x_B1C = model.embed_codes(torch.cat([chosen, chosen]) if guided else chosen, position)
    return codes_BT


def filtered_probabilities(
    logits_BK: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Probabilities [B, K] after temperature, then top-k, then nucleus filtering (top-p, arXiv 1904.09751).

    Args:
        top_k: only the k most likely codes remain; 0 = all. Ties with the k-th remain too.
        top_p: only the smallest set of codes whose probabilities add up to top_p remains; 1.0 = all.
    """
    logits_BK = logits_BK.float() / temperature
    if 0 < top_k < logits_BK.shape[-1]:
        threshold = logits_BK.topk(top_k, dim=-1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < threshold, float("-inf"))
    probabilities = logits_BK.softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # the most likely code is always kept: nothing comes before it
        kept = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """One code [B] for each row, by inverting the cumulative distribution at a number in [0, 1)."""
    cumulative = probabilities_BK.cumsum(-1)
    target = uniform_B[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (cumulative < cumulative[:, -1:]).sum(
        -1
    )  # rounding must not lead beyond the last code that is possible
    return torch.minimum(chosen, last)


def _random_numbers(seed: int, sample: int, count: int) -> Tensor:
    """Uniform numbers [count] in [0, 1) of one sample."""
    return torch.from_numpy(np.random.default_rng([seed, sample]).random(count, dtype=np.float32))
