"""Sampling codes from an autoregressive model: `generate` is the only entry."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.precision import with_cast_layers
from sitlib.model.sequence import Transformer, matmul_dtype
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import inference_autocast
from sitlib.sample.cuda_graphs import GraphedDecoder
from sitlib.strict import require

Prompts = Tensor | Sequence[str] | int


def generate(
    model: AutoregressiveModel,
    prompts: Prompts,
    sampling: SamplingConfig | None = None,
    *,
    scales: int | None = None,
    prefix_codes: Tensor | None = None,
    first_sample: int = 0,
    tokenizer: SpectralTokenizer | None = None,
    on_scale: Callable[[int, int, Tensor], None] | None = None,
    progress: str | None = None,
) -> Tensor:
    """Draw one code sequence for each prompt -> codes [B, scales, N] int64 on the model's device.

    Sample i is a function of (seed, i), whatever the batch size: it has its own random number for
    each position. So a prefix of codes that would have been drawn changes nothing. Both hold up to
    rounding; in the bf16 of GPUs it can choose another code (docs/scale.md).

    Args:
        prompts: class ids [B] int64; B texts, or their token ids [B, L]; or the number B, for
            unconditional samples.
        sampling: temperature, filters, guidance, seed; by default those of the checkpoint.
        scales: stop after this many scales, all by default. Fewer can be decoded if the
            tokenizer's decoder is scale-causal.
        prefix_codes: codes [B, k, N] of the first k scales, which are kept.
        first_sample: index i of the first sample; to draw sample 5 of eight alone, pass 5.
        tokenizer, on_scale: after each drawn scale of a batch, call `on_scale(first, scale,
            images)`: index of the batch's first sample, number of finished scales, and their images
            [b, 3, H, W] in [0, 1].
        progress: title of a progress bar; None for none.

    Raises:
        ValueError: prompts or a prefix that do not fit to the model; a number of scales that it
            does not have; a tokenizer that cannot decode the first scales alone.
    """
    config, device = model.config, next(model.parameters()).device
    sampling = sampling or config.sampling or SamplingConfig()
    scales = config.num_scales if scales is None else scales
    require(
        1 <= scales <= config.num_scales,
        f"scales must lie in 1 ... {config.num_scales}, the scales of the model, it is {scales}.",
    )
    cond = condition_ids(model, prompts)
    codes = _with_room(model, prefix_codes, len(cond), scales).to(device)
    first_scale = 0 if prefix_codes is None else prefix_codes.shape[1]
    if on_scale is not None:
        check_decodes_prefix(tokenizer)
    guidance = [guidance_of_scale(s, config.num_scales, sampling) for s in range(1, scales + 1)]
    if isinstance(prompts, int) or all(weight == 1.0 for weight in guidance[first_scale:]):
        guidance = None  # no unconditional half

    was_training = model.training
    model.eval()  # dropout would make a sample depend on more than its seed
    bar = tqdm(desc=progress, total=len(cond), mininterval=5.0, disable=progress is None)
    try:
        with inference_autocast(device):
            batch_size = sampling.batch_size or max_batch_size(model, scales, guidance is not None)
            cast_model = model
            if torch.is_autocast_enabled(device.type):
                dtype = torch.get_autocast_dtype(device.type)
                cast_model = with_cast_layers(model, dtype, Transformer)
        for start in range(0, len(cond) if first_scale < scales else 0, batch_size):
            rows = slice(start, start + batch_size)
            batch = cond[rows].to(device), codes[rows], first_scale, first_sample + start
            for scale in _sample_scales(cast_model, *batch, sampling, guidance):
                if on_scale is not None and tokenizer is not None:
                    on_scale(start, scale, tokenizer.decode(codes[rows, :scale]))
            bar.update(len(codes[rows]))
    finally:
        model.train(was_training)
        bar.close()
    return codes


def _sample_scales(
    model: AutoregressiveModel,
    cond: Tensor,
    codes: Tensor,
    first_scale: int,
    first_sample: int,
    sampling: SamplingConfig,
    guidance: list[float] | None,
) -> Iterator[int]:
    """Fill codes [B, S, N] from scale `first_scale` on; yield the number of scales after each.

    Inference mode and autocast end before every `yield`: the caller's code runs in the caller's.

    Args:
        guidance: weight of the conditional half in each scale, or None for no guidance.
    """
    batch, scales, n = codes.shape
    codes_BT = codes.view(batch, scales * n)
    # Every sample has its own random numbers, one for each position, whatever the batch.
    samples = range(first_sample, first_sample + batch)
    generators = [np.random.default_rng([sampling.seed, sample]) for sample in samples]
    uniform = [rng.random(model.num_tokens, dtype=np.float32) for rng in generators]
    uniform_TB = torch.from_numpy(np.stack(uniform, axis=1)).to(codes.device)

    def with_uncond(x: Tensor) -> Tensor:  # rows of the conditional half, then of the other
        return x if guidance is None else torch.cat([x, x])

    with torch.inference_mode(), inference_autocast(codes.device):
        if guidance is not None:
            cond = torch.cat([cond, model.unconditional(cond)])
        prefix = with_uncond(codes_BT[:, : first_scale * n])
        state, logits_BK = model.prefill(cond, scales * n, prefix)
        decode_one_token = partial(model.decode_one_token, state)
        if cond.is_cuda:
            decode_one_token = GraphedDecoder(model, state)
    for scale in range(first_scale, scales):
        with torch.inference_mode(), inference_autocast(codes.device):
            for position in range(scale * n, (scale + 1) * n):
                if guidance is not None:
                    cond_BK, uncond_BK = logits_BK.chunk(2)
                    logits_BK = torch.lerp(uncond_BK, cond_BK, guidance[scale])
                probs_BK = filtered_probabilities(
                    logits_BK, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
                )
                codes_B = sample_codes(probs_BK, uniform_TB[position])
                codes_BT[:, position] = codes_B
                if position + 1 < scales * n:
                    logits_BK = decode_one_token(with_uncond(codes_B))
        yield scale + 1


def filtered_probabilities(
    logits_BK: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Probabilities [B, K] after temperature, top-k, min-p (arXiv 2407.01082), then top-p.

    Args:
        top_k: keep the k most likely codes, and those as likely as the k-th; 0 = all.
        top_p: keep the smallest set of codes of this total probability (arXiv 1904.09751).
        min_p: keep codes at least this share as likely as the likeliest.
    """
    logits_BK = logits_BK.float()
    if temperature != 1.0:
        logits_BK = logits_BK / temperature
    if 0 < top_k < logits_BK.shape[-1]:
        kth = logits_BK.topk(top_k, dim=-1).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < kth, float("-inf"))
    probs_BK = logits_BK.softmax(-1)
    if min_p > 0.0:
        least = min_p * probs_BK.amax(-1, keepdim=True)
        probs_BK = probs_BK.masked_fill(probs_BK < least, 0.0)
        probs_BK = probs_BK / probs_BK.sum(-1, keepdim=True)
    if top_p < 1.0:
        descending, order = probs_BK.sort(dim=-1, descending=True)
        before = descending.cumsum(-1) - descending  # 0 for the likeliest, which always stays
        descending = descending.masked_fill(before >= top_p, 0.0)
        probs_BK = torch.zeros_like(probs_BK).scatter(-1, order, descending)
        probs_BK = probs_BK / probs_BK.sum(-1, keepdim=True)
    return probs_BK


def sample_codes(probs_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """One code [B] for each row: the inverse of the cumulative distribution at u in [0, 1)."""
    cumulative = probs_BK.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    codes = torch.searchsorted(cumulative, uniform_B[:, None] * total, right=True)
    # Rounding must not lead beyond the last code whose probability is not 0.
    return torch.minimum(codes, torch.searchsorted(cumulative, total)).squeeze(-1)


def guidance_of_scale(scale: int, num_scales: int, sampling: SamplingConfig) -> float:
    """Guidance weight in scale 1 ... S."""
    if sampling.guidance_growth == "constant" or num_scales == 1:
        return sampling.guidance
    return 1.0 + (sampling.guidance - 1.0) * (scale - 1) / (num_scales - 1)


def max_batch_size(model: AutoregressiveModel, scales: int, guided: bool) -> int:
    """Batch whose keys, values and logits take half of the free memory, in 1 ... 1,024."""
    parameter, config = next(model.parameters()), model.config
    c = config.transformer
    length = scales * config.tokens_per_scale + (c.text.max_tokens if c.text else 0)
    cache_bytes = 2 * c.layers * c.width * length * matmul_dtype(parameter).itemsize
    logit_bytes = 8 * config.num_codes * parameter.element_size()
    if parameter.is_cuda:
        device = parameter.device  # memory that PyTorch keeps of earlier batches is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = 2 * 2**30
    return max(1, min(1024, int(free / 2 / ((cache_bytes + logit_bytes) * (2 if guided else 1)))))


# -- checks of the input ----------------------------------------------------------------------


def condition_ids(model: AutoregressiveModel, prompts: Prompts) -> Tensor:
    """Prompts as the model takes them: class ids [B], or token ids [B, L].

    Raises:
        ValueError: prompts of another kind than the model's, or that it does not know.
    """
    texts, classes = model.text_tokenizer, model.config.classes
    if isinstance(prompts, int):
        require(prompts >= 0, f"the number of samples must not be negative, it is {prompts}.")
        shape = (prompts,) if texts is None else (prompts, 1)
        return model.unconditional(torch.zeros(shape, dtype=torch.int64))
    if texts is None:
        if not (
            isinstance(prompts, Tensor) and prompts.ndim == 1 and _ids_below(prompts, len(classes))
        ):
            raise ValueError(
                "this model is conditioned on a class, not on texts: prompts must be class ids [B] "
                f"in 0 ... {len(classes) - 1} ({', '.join(classes)})."
            )
        return prompts.long()
    if isinstance(prompts, Tensor):
        is_token = prompts != texts.pad
        require(
            prompts.ndim == 2
            and _ids_below(prompts, texts.vocab_size)
            and 1 <= prompts.shape[1] <= texts.max_tokens
            and bool(is_token[:, :1].all() and (is_token[:, 1:] <= is_token[:, :-1]).all()),
            "this model is conditioned on texts: give a list of texts, or token ids [B, L] with "
            f"L <= {texts.max_tokens}, below {texts.vocab_size}, ended by padding ({texts.pad}).",
        )
        tokens_BL = prompts.long()
    else:
        require(
            not isinstance(prompts, str) and all(isinstance(text, str) for text in prompts),
            "this model is conditioned on texts: give a list of texts, one for each sample.",
        )
        tokens_BL = texts.encode(list(prompts))
    longest = int((tokens_BL != texts.pad).sum(1).max()) if len(tokens_BL) else 1
    return tokens_BL[:, :longest]  # padding costs time and says nothing


def _ids_below(ids: Tensor, count: int) -> bool:
    """True for whole numbers in 0 ... count - 1."""
    if ids.is_floating_point():
        return False
    return not ids.numel() or 0 <= int(ids.long().min()) <= int(ids.long().max()) < count


def _with_room(
    model: AutoregressiveModel, prefix: Tensor | None, batch: int, scales: int
) -> Tensor:
    """Codes [B, scales, N] that begin with the prefix [B, k, N], if there is one."""
    n, num_codes = model.config.tokens_per_scale, model.config.num_codes
    if prefix is None:
        return torch.zeros(batch, scales, n, dtype=torch.int64)
    require(
        prefix.ndim == 3
        and prefix.shape[::2] == (batch, n)
        and prefix.shape[1] <= scales
        and _ids_below(prefix, num_codes),
        f"prefix_codes must be codes [{batch}, k, {n}] in 0 ... {num_codes - 1}, k <= {scales}; "
        f"these are {prefix.dtype} {list(prefix.shape)}.",
    )
    room = torch.zeros(batch, scales - prefix.shape[1], n, dtype=torch.int64)
    return torch.cat([prefix.long(), room.to(prefix.device)], dim=1)


def check_decodes_prefix(tokenizer: SpectralTokenizer | None) -> None:
    """Refuse a tokenizer that cannot decode the first scales alone."""
    require(
        tokenizer is not None
        and (tokenizer.geometry.num_scales == 1 or tokenizer.config.decoder_attention != "full"),
        "the first scales cannot be shown alone without a tokenizer whose decoder does not attend "
        "to finer ones: give one with decoder_attention: scale_causal.",
    )
