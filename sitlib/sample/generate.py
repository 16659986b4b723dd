"""Sampling codes from an autoregressive model: `generate` is the only entry."""

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer, are_integers, check_codes
from sitlib.model.transformer import inference_autocast
from sitlib.sample.cuda_graphs import GraphedDecoder
from sitlib.sample.draw import draw
from sitlib.sample.masked import write_scales
from sitlib.strict import require

Prompts = Tensor | Sequence[str] | int


def generate(
    model: AutoregressiveModel,
    prompts: Prompts,
    sampling: SamplingConfig | None = None,
    *,
    scales: int | None = None,
    prefix_codes: Tensor | None = None,
    written: int | None = None,
    first_sample: int = 0,
    tokenizer: SpectralTokenizer | None = None,
    on_scale: Callable[[int, int, Tensor], None] | None = None,
    progress: str | None = None,
) -> Tensor:
    """Draw one code sequence for each prompt -> codes [B, scales, N] int64 on the model's device.

    Sample i is a function of (seed, i), whatever the batch size: it has its own random number for
    each position. So a prefix of codes that would have been drawn changes nothing. Both hold up to
    rounding; in the bf16 of GPUs it can choose another code (docs/scale.md). Models of another
    `order` than coarse_to_fine have no first scales to draw, to give or to show.

    Args:
        prompts: class ids [B] int64, or B texts; or the number B, for unconditional samples.
        sampling: by default that of the checkpoint.
        scales: stop after so many; fewer than all can be decoded by a scale-causal decoder.
        prefix_codes: codes [B, k, N] of the first k scales, which are kept.
        written: keep only so many of them, the first in the model's order. Codes of all scales and
            `written=S * N // 2` let a model of any order finish an image that is half written.
        first_sample: index i of the first sample; to draw sample 5 of eight alone, pass 5.
        on_scale, tokenizer: after each drawn scale of a batch, call `on_scale(first, scale,
            images)`: index of the batch's first sample, number of finished scales, and their images
            [b, 3, H, W] in [0, 1], decoded by the tokenizer.
        progress: title of a progress bar.
    """
    c, device = model.config, next(model.parameters()).device
    sampling = sampling or c.sampling or SamplingConfig()
    scales = c.num_scales if scales is None else scales
    require(
        1 <= scales <= c.num_scales,
        f"scales must lie in 1 ... {c.num_scales}, the scales of the model, it is {scales}.",
    )
    require(on_scale is None or tokenizer is not None, "on_scale shows images: give a tokenizer.")
    cond = condition_ids(model, prompts)
    count, n = len(cond), c.tokens_per_scale
    prefix = torch.zeros(count, 0, n).long() if prefix_codes is None else prefix_codes
    require(
        prefix.ndim == 3
        and prefix.shape[::2] == (count, n)
        and prefix.shape[1] <= scales
        and are_integers(prefix),
        f"prefix_codes must be codes [{count}, k, {n}], k <= {scales}; these are {prefix.dtype} "
        f"{list(prefix.shape)}.",
    )
    check_codes(prefix.long(), c.codebook_sizes)
    first_scale = prefix.shape[1]
    written = first_scale * n if written is None else written
    most = f"written must lie in 0 ... {first_scale * n}, the codes given, it is {written}."
    require(0 <= written <= first_scale * n, most)
    needs_scales = scales < c.num_scales or 0 < first_scale < scales or on_scale is not None
    require(
        not needs_scales or c.transformer.order == "coarse_to_fine",
        f"a model of order {c.transformer.order} has no first scales: take one of coarse_to_fine, "
        "or ask for all scales, give those of whole images with `written`, and no on_scale.",
    )
    of_scales = "a masked model writes whole scales: `written` is of the others."
    require(not c.transformer.masked or written == first_scale * n, of_scales)
    codes = torch.zeros(count, scales, n, dtype=torch.int64, device=device)
    codes[:, :first_scale] = prefix
    is_guided = not isinstance(prompts, int) and sampling.guidance != 1.0
    halves = 2 if is_guided else 1  # rows with the condition, then as many without

    was_training = model.training
    model.eval()  # dropout would make a sample depend on more than its seed
    try:
        with inference_autocast(device):
            batch_size = sampling.batch_size or max_batch_size(model, scales, halves)
            cast_model = with_cast_layers(model)
        starts = range(0, count if written < scales * n else 0, batch_size)
        for start in tqdm(starts, progress, mininterval=5.0, disable=progress is None):
            rows = slice(start, start + batch_size)
            cond_B, shown = cond[rows].to(device), None
            if is_guided:
                with torch.inference_mode(), inference_autocast(device):
                    cond_B = torch.cat([cond_B, model.unconditional(cond_B)])
            if on_scale is not None and tokenizer is not None:
                shown = partial(_show, on_scale, tokenizer, codes[rows], start)
            # Every sample has its own random numbers, whatever the batch.
            last = min(start + batch_size, count)
            seeds = [[sampling.seed, first_sample + row] for row in range(start, last)]
            how = sampling, seeds, shown
            if c.transformer.masked:
                write_scales(cast_model, codes[rows], cond_B, first_scale, *how)
            else:
                write_codes(cast_model, codes[rows], cond_B, written, *how)
    finally:
        model.train(was_training)
    return codes


def _show(
    on_scale: Callable[[int, int, Tensor], None],
    tokenizer: SpectralTokenizer,
    codes: Tensor,
    first: int,
    scales: int,
) -> None:
    on_scale(first, scales, tokenizer.decode(codes[:, :scales]))


def write_codes(
    model: AutoregressiveModel,
    codes: Tensor,
    cond: Tensor,
    written: int,
    sampling: SamplingConfig,
    seeds: list[list[int]],
    on_scale: Callable[[int], None] | None,
) -> None:
    """Fill codes [B, S, N] one after the other, in place; in the model's order, `written` are given.

    Args:
        cond: of each row, once more for guidance without it.
        seeds: of the random numbers of each row: one for each position.
        on_scale: called after each scale, with the number of finished ones.
    """
    codes_BT, n, device = codes.flatten(1), codes.shape[2], codes.device  # codes_BT is a view
    order, halves = model.order.tolist()[: codes_BT.shape[1]], len(cond) // len(codes)
    uniform = [
        np.random.default_rng(seed).random(model.num_tokens, dtype=np.float32) for seed in seeds
    ]
    uniform_TB = torch.from_numpy(np.stack(uniform, axis=1)).to(device)
    with torch.inference_mode(), inference_autocast(device):
        first_Bt = codes_BT[:, order[:written]].repeat(halves, 1)
        state, logits_BK = model.prefill(cond, len(order), first_Bt)
        decode_one_token = partial(model.decode_one_token, state)
        if cond.is_cuda:
            decode_one_token = GraphedDecoder(model, state)
    for done, position in enumerate(order[written:], written + 1):
        with torch.inference_mode(), inference_autocast(device):
            codes_B, _ = draw(logits_BK, uniform_TB[position], sampling, halves == 2)
            codes_BT[:, position] = codes_B
            if done < len(order):
                logits_BK = decode_one_token(codes_B.repeat(halves))
        # The caller's code runs outside of inference mode and autocast.
        if done % n == 0 and on_scale is not None:
            on_scale(done // n)


# -- cost ---------------------------------------------------------------------------------------


def max_batch_size(model: AutoregressiveModel, scales: int, halves: int) -> int:
    """Batch, 1 ... 1,024, whose keys, values and logits take half of the free memory."""
    parameter, config = next(model.parameters()), model.config
    c, device, dtype = config.transformer, parameter.device, parameter.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    length = scales * config.tokens_per_scale + (c.text.max_tokens if c.text else 0)
    row_bytes = 2 * c.layers * c.width * length * dtype.itemsize
    at_once = config.tokens_per_scale if c.masked else 1  # codes that a pass scores
    row_bytes += at_once * 8 * max(config.codebook_sizes) * parameter.element_size()
    if parameter.is_cuda:  # memory that PyTorch keeps of earlier batches is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        free = 2 * 2**30
    return max(1, min(1024, int(free / 2 / (row_bytes * halves))))


def with_cast_layers(model: AutoregressiveModel) -> AutoregressiveModel:
    """The model, under autocast with linear layers of the transformer in its dtype already.

    It computes the same without casting every weight at every step: autocast keeps casts only
    outside of inference mode. All but the transformer is shared with `model`.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return model
    cast_model = copy.copy(model)
    cast_model._modules = {**model._modules, "transformer": copy.deepcopy(model.transformer)}
    for layer in cast_model.transformer.modules():
        if isinstance(layer, nn.Linear):
            layer.to(torch.get_autocast_dtype(device))
    return cast_model


# -- checks of the input ----------------------------------------------------------------------


def condition_ids(model: AutoregressiveModel, prompts: Prompts) -> Tensor:
    """Prompts as the model takes them: class ids [B], or token ids [B, L]."""
    texts, classes = model.text_tokenizer, model.config.classes
    if isinstance(prompts, int):
        shape = (prompts,) if texts is None else (prompts, 1)
        return model.unconditional(torch.zeros(shape, dtype=torch.int64))
    if texts is None:
        if isinstance(prompts, Tensor) and prompts.ndim == 1 and _are_ids(prompts, len(classes)):
            return prompts.long()
        wanted = f"prompts must be class ids [B] in 0 ... {len(classes) - 1} ({', '.join(classes)})"
        raise ValueError(f"this model is conditioned on a class, not on texts: {wanted}.")
    if isinstance(prompts, Tensor):
        raise ValueError("this model is conditioned on texts: prompts must be a list of texts.")
    tokens_BL = texts.encode(prompts)
    longest = int((tokens_BL != texts.pad).sum(1).max()) if len(tokens_BL) else 1
    return tokens_BL[:, :longest]  # padding costs time and says nothing


def _are_ids(ids: Tensor, count: int) -> bool:
    """True for whole numbers in 0 ... count - 1."""
    if not are_integers(ids):
        return False
    return not ids.numel() or 0 <= int(ids.long().min()) <= int(ids.long().max()) < count
