"""Drawing codes from an autoregressive model: one function, `generate`, with filters, guidance, prefixes and streaming.

Keys and values are kept in memory that is allocated once for a batch; the conditional and unconditional halves of classifier-free guidance
(arXiv 2207.12598) go through the model together.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.precision import mixed, product_dtype, with_cast_layers
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import Transformer
from sitlib.sample.cuda_graphs import CapturedSteps

Streamed = Callable[[int, int, Tensor], None]
Prompts = Tensor | Sequence[str] | int


def generate(
    model: AutoregressiveModel,
    prompts: Prompts,
    config: SamplingConfig,
    *,
    scales: int | None = None,
    prefix_codes: Tensor | None = None,
    first_sample: int = 0,
    tokenizer: SpectralTokenizer | None = None,
    on_scale: Streamed | None = None,
    progress: str | None = None,
) -> Tensor:
    """Draws one code sequence for each prompt.

    Sample i depends on the seed and on i alone, not on the batch in which it is drawn: each has its own random numbers, one for each
    position. So codes given as a prefix, if they are those that would have been drawn, change nothing. Both are up to rounding, which on
    a CPU decides ties only; in the bf16 of GPUs it can choose another code (docs/scale.md).

    Args:
        prompts: class ids [B] int64; B texts for a text-conditional model (or their token ids [B, L]); or B alone, for samples of which
            the model is told nothing.
        scales: stop after this many scales, all by default. Fewer can be decoded if the tokenizer's decoder is scale-causal.
        prefix_codes: [B, k, N] codes of the first k scales, which are kept: the others are drawn given them.
        first_sample: what the first sample counts as; sample 5 of eight is drawn again, alone, as sample 0 with first_sample 5.
        tokenizer, on_scale: after every finished scale that was not given, `on_scale(first, scale, images)` gets the index of the batch's
            first sample, the number of scales and the images [b, 3, H, W] in [0, 1] that `tokenizer` decodes from these.
        progress: title of a progress bar, or None for none.

    Returns:
        Codes [B, scales, N] int64 on the model's device.

    Raises:
        ValueError: a class id that the model does not know, an empty or too long text, texts for a class-conditional model or the
            reverse, a number of scales or prefix codes that the model does not have, or a tokenizer that cannot decode scale by scale.
    """
    shape = model.config
    scales = shape.num_scales if scales is None else scales
    if not 1 <= scales <= shape.num_scales:
        raise ValueError(
            f"scales must lie in 1 ... {shape.num_scales}, the scales of the model, it is {scales}."
        )
    conditions = _conditions(model, prompts)
    if isinstance(prompts, int):
        config = replace(
            config, guidance=1.0
        )  # away from what is told nothing: there is nothing to guide to
    prefix_codes = _checked_prefix(model, prefix_codes, len(conditions), scales)
    drawn = range(prefix_codes.shape[1] + 1, scales + 1)
    if all(guidance_of_scale(scale, shape.num_scales, config) == 1.0 for scale in drawn):
        config = replace(
            config, guidance=1.0
        )  # as in previews, if guidance grows from the first scale on
    if on_scale is not None:
        _check_streaming(model, tokenizer)

    device = next(model.parameters()).device
    bar = tqdm(
        total=len(conditions),
        desc=progress,
        unit="image",
        mininterval=5.0,
        ncols=110,
        disable=progress is None,
    )
    batches = [prefix_codes.new_empty(0, scales * shape.tokens_per_scale).to(device)]
    was_training, outside = (
        model.training,
        (torch.is_grad_enabled(), torch.is_autocast_enabled(device.type)),
    )
    model.eval()  # dropout would make a sample depend on more than its seed
    try:
        with _in_its_precision(model, device) as used:
            batch_size = config.batch_size or largest_batch(model, config, scales)
            for start in range(0, len(conditions), batch_size):
                chosen = slice(start, start + batch_size)
                streamed = None
                if on_scale is not None and tokenizer is not None:
                    streamed = partial(_show, on_scale, tokenizer, outside, start)
                given = prefix_codes[chosen].flatten(1).to(device)
                batches.append(
                    _generate_batch(
                        used,
                        conditions[chosen].to(device),
                        first_sample + start,
                        given,
                        scales,
                        config,
                        streamed,
                    )
                )
                bar.update(len(batches[-1]))
    finally:
        model.train(was_training)
        bar.close()
    return torch.cat(batches).unflatten(1, (scales, shape.tokens_per_scale))


@contextmanager
def _in_its_precision(
    model: AutoregressiveModel, device: torch.device
) -> Iterator[AutoregressiveModel]:
    """Around sampling: the model to sample with, which on a GPU computes in its precision. Nor is it compiled: its steps are recorded."""
    with mixed(device):
        is_mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type)
        yield with_cast_layers(model, dtype, Transformer) if is_mixed else model


def _show(
    on_scale: Streamed,
    tokenizer: SpectralTokenizer,
    outside: tuple[bool, bool],
    first: int,
    codes: Tensor,
) -> None:
    """Calls `on_scale` with the images of codes [b, k, N] of the samples from `first` on, which may be used for anything.

    Args:
        outside: whether gradients and autocast are enabled around `generate`, and so here.
    """
    gradients, autocast = outside
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        torch.autocast(codes.device.type, enabled=autocast),
    ):
        on_scale(first, codes.shape[1], tokenizer.decode(codes.clone()))


def largest_batch(model: AutoregressiveModel, config: SamplingConfig, scales: int) -> int:
    """How many samples at a time: their keys, values and logits take at most half of the free memory; between 1 and 1,024."""
    parameter, shape = next(model.parameters()), model.config
    text = shape.shape.text.max_tokens if shape.shape.text else 0
    length = scales * shape.tokens_per_scale + text
    cached = 2 * shape.shape.layers * shape.shape.width * length * product_dtype(parameter).itemsize
    others = 8 * shape.num_codes * parameter.element_size()
    halves = 1 if config.guidance == 1.0 else 2
    if parameter.is_cuda:
        device = parameter.device  # what PyTorch keeps of earlier batches is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = 2 * 2**30
    return max(1, min(1024, int(free / 2 / ((cached + others) * halves))))


def guidance_of_scale(scale: int, num_scales: int, config: SamplingConfig) -> float:
    """Guidance weight in scale 1 ... S."""
    if config.guidance_growth == "constant" or num_scales == 1:
        return config.guidance
    return 1.0 + (config.guidance - 1.0) * (scale - 1) / (num_scales - 1)


@torch.inference_mode()
def _generate_batch(
    model: AutoregressiveModel,
    condition: Tensor,
    first: int,
    given_Bt: Tensor,
    scales: int,
    config: SamplingConfig,
    streamed: Callable[[Tensor], None] | None,
) -> Tensor:
    """Codes [B, scales * N] of samples first ... first + B, of which the first t are given."""
    batch, tokens = len(condition), model.config.tokens_per_scale
    given, length = given_Bt.shape[1], scales * tokens
    guided = config.guidance != 1.0
    codes_BT = torch.empty(batch, length, dtype=torch.int64, device=condition.device)
    codes_BT[:, :given] = given_Bt
    if given == length:
        return codes_BT
    numbers = np.stack(
        [_random_numbers(config.seed, first + i, model.num_tokens) for i in range(batch)]
    )
    uniform_TB = torch.from_numpy(numbers.T.copy()).to(condition.device)

    def both(x: Tensor) -> Tensor:  # the conditional half and the unconditional one
        return torch.cat([x, x]) if guided else x

    if guided:
        condition = torch.cat([condition, model.unconditional(condition)])
    writing, logits_BK = model.begin(condition, length, both(given_Bt) if given else None)
    proceed = (
        CapturedSteps(model, writing) if condition.is_cuda else partial(model.proceed, writing)
    )
    for position in range(given, length):
        scale = position // tokens + 1
        if guided:
            conditional, unconditional = logits_BK.chunk(2)
            weight = guidance_of_scale(scale, model.config.num_scales, config)
            logits_BK = torch.lerp(unconditional, conditional, weight)
        probabilities_BK = filtered_probabilities(
            logits_BK, config.temperature, config.top_k, config.top_p, config.min_p
        )
        codes_B = draw(probabilities_BK, uniform_TB[position])
        codes_BT[:, position] = codes_B
        if streamed is not None and (position + 1) % tokens == 0:
            streamed(codes_BT[:, : position + 1].unflatten(1, (scale, tokens)))
        if position + 1 < length:
            logits_BK = proceed(both(codes_B))
    return codes_BT


def filtered_probabilities(
    logits_BK: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Probabilities [B, K] after temperature, then top-k, then min-p, then nucleus filtering (top-p, arXiv 1904.09751).

    Args:
        top_k: only the k most likely codes remain; 0 = all. Ties with the k-th remain too.
        min_p: only codes at least this share as likely as the likeliest remain (arXiv 2407.01082); 0.0 = all.
        top_p: only the smallest set of codes whose probabilities add up to top_p remains; 1.0 = all.
    """
    logits_BK = logits_BK.float()
    if temperature != 1.0:
        logits_BK = logits_BK / temperature
    if 0 < top_k < logits_BK.shape[-1]:
        threshold = logits_BK.topk(top_k, dim=-1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < threshold, float("-inf"))
    probabilities = logits_BK.softmax(-1)
    if min_p > 0.0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = (
            ordered.cumsum(-1) - ordered
        )  # the most likely code is always kept: nothing comes before it
        kept = torch.zeros_like(probabilities).scatter(
            -1, order, ordered.masked_fill(before >= top_p, 0.0)
        )
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """One code [B] for each row, by inverting the cumulative distribution at a number in [0, 1)."""
    cumulative = probabilities_BK.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, uniform_B[:, None] * total, right=True)
    last = torch.searchsorted(
        cumulative, total
    )  # rounding must not lead beyond the last code that is possible
    return torch.minimum(chosen, last).squeeze(-1)


def _random_numbers(seed: int, sample: int, count: int) -> np.ndarray:
    """Uniform numbers [count] in [0, 1) of one sample."""
    return np.random.default_rng([seed, sample]).random(count, dtype=np.float32)


def _conditions(model: AutoregressiveModel, prompts: Prompts) -> Tensor:
    """Class ids [B] or token ids [B, L]; refuses what the model was not trained on."""
    classes = model.config.classes
    if isinstance(prompts, int):
        if prompts < 0 or isinstance(prompts, bool):
            raise ValueError(f"a number of samples must be 0 or more, it is {prompts}.")
        nothing = torch.zeros((prompts, 1) if model.text_tokenizer else prompts, dtype=torch.int64)
        return model.unconditional(nothing)
    if model.text_tokenizer is None:
        if not isinstance(prompts, Tensor) or prompts.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"this model is conditioned on a class, not on texts: give class ids in 0 ... {len(classes) - 1} ({', '.join(classes)})."
            )
        if prompts.ndim != 1 or (
            prompts.numel() and not 0 <= int(prompts.min()) <= int(prompts.max()) < len(classes)
        ):
            raise ValueError(
                f"labels must be [B] class ids in 0 ... {len(classes) - 1} ({', '.join(classes)})."
            )
        return prompts.long()
    if isinstance(prompts, str):
        raise ValueError("prompts are a list of texts, one for each sample, not one text.")
    if not isinstance(prompts, Tensor):
        if not all(isinstance(text, str) for text in prompts):
            raise ValueError(
                "this model is conditioned on texts: give a list of texts, or token ids [B, L] of them."
            )
        tokens_BL = model.text_tokenizer.encode(list(prompts))
    else:
        tokens_BL = _checked_tokens(model, prompts)
    used = int((tokens_BL != model.text_tokenizer.pad).sum(1).max()) if len(tokens_BL) else 1
    return tokens_BL[:, :used]  # padding costs time and says nothing


def _checked_tokens(model: AutoregressiveModel, tokens_BL: Tensor) -> Tensor:
    """Token ids [B, L] of texts, if they could have come from the model's text tokenizer."""
    texts = model.text_tokenizer
    assert texts is not None
    if tokens_BL.ndim != 2 or tokens_BL.dtype != torch.int64:
        raise ValueError(
            "this model is conditioned on texts: give a list of texts, or int64 token ids [B, L] of them."
        )
    if (
        tokens_BL.numel()
        and not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < texts.vocabulary
    ):
        raise ValueError(f"token ids must lie in 0 ... {texts.vocabulary - 1}.")
    is_token = tokens_BL != texts.pad
    lengths = is_token.sum(1)
    stop = torch.arange(tokens_BL.shape[1], device=tokens_BL.device) < lengths[:, None]
    if len(tokens_BL) and (
        int(lengths.min()) == 0
        or int(lengths.max()) > texts.max_tokens
        or not torch.equal(stop, is_token)
    ):
        raise ValueError(
            f"every text must have 1 ... {texts.max_tokens} tokens, with padding (id {texts.pad}) after its end only."
        )
    return tokens_BL


def _checked_prefix(
    model: AutoregressiveModel, codes: Tensor | None, batch: int, scales: int
) -> Tensor:
    """Codes [B, k, N] that are kept, with k = 0 where none are given."""
    shape = model.config
    if codes is None:
        return torch.empty(batch, 0, shape.tokens_per_scale, dtype=torch.int64)
    wanted = f"[{batch}, k, {shape.tokens_per_scale}] with k in 0 ... {scales}"
    if codes.ndim != 3 or codes.is_floating_point():
        raise ValueError(
            f"prefix_codes must be integers {wanted}, they are {codes.dtype} {list(codes.shape)}."
        )
    if len(codes) != batch or codes.shape[1] > scales or codes.shape[2] != shape.tokens_per_scale:
        raise ValueError(f"prefix_codes must be {wanted}, they are {list(codes.shape)}.")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < shape.num_codes:
        raise ValueError(
            f"prefix_codes must lie in 0 ... {shape.num_codes - 1}, they span {codes.min()} ... {codes.max()}."
        )
    return codes.long()


def _check_streaming(model: AutoregressiveModel, tokenizer: SpectralTokenizer | None) -> None:
    if tokenizer is None:
        raise ValueError("on_scale shows decoded images: give the tokenizer that decodes them.")
    if model.config.num_scales > 1 and tokenizer.config.decoder_attention == "full":
        raise ValueError(
            "this tokenizer's decoder attends to all scales, so none can be shown before the last: take one with decoder_attention: "
            "scale_causal."
        )
