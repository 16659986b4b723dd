"""Applications of codes that go from coarse to fine (SIT, arXiv 2412.09607, section 5).

In all of them some scales are given, and the others are sampled.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import Prompts, generate
from sitlib.strict import require

BATCH = 64  # images encoded and decoded at a time


@dataclass
class Samples:
    """Codes [M, k, N] int64 and their images [M, 3, H, W] in [0, 1], on the CPU."""

    codes: Tensor
    images: Tensor


@dataclass
class Preview(Samples):
    """The first scales of several samples of one prompt, and what `refine` needs to go on."""

    prompt: str | int | None
    sampling: SamplingConfig | None


def upsample(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    images: Tensor,
    prompts: Prompts | None,
    sampling: SamplingConfig | None = None,
) -> Samples:
    """Sample the details of small images [B, 3, h, h] in [0, 1], whose codes are the first scales.

    With a scale-causal decoder the result, averaged down again, is the tokenizer's own
    reconstruction of the small image. Prompts are as for `generate`; None: unconditional.
    """
    remedy = "take one with encoder_attention: scale_causal."
    require(len(tokenizer.sizes) > 1, f"this tokenizer takes images of one size only: {remedy}")
    codes = _encode(tokenizer, images, tokenizer.sizes[:-1])
    prompts = len(images) if prompts is None else prompts
    return _sample(model, tokenizer, prompts, sampling, prefix_codes=codes)


def edit(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    images: Tensor,
    prompts: Prompts | None,
    keep: int,
    sampling: SamplingConfig | None = None,
) -> Samples:
    """Keep the first `keep` scales (0 ... S) of images [B, 3, H, H], sample the others for prompts.

    Kept codes stay bit by bit. Many kept scales leave only texture to the prompt, few leave only
    the layout to the image.
    """
    scales = tokenizer.geometry.num_scales
    require(0 <= keep <= scales, f"keep must lie in 0 ... {scales}, it is {keep}.")
    kept = _encode(tokenizer, images, tokenizer.sizes[-1:])[:, :keep]
    prompts = len(images) if prompts is None else prompts
    return _sample(model, tokenizer, prompts, sampling, prefix_codes=kept)


def preview(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    prompt: str | int | None,
    sampling: SamplingConfig | None = None,
    count: int = 8,
    scales: int = 1,
) -> Preview:
    """Sample the first k scales of `count` images of one prompt, at a fraction of the whole cost.

    The prompt is a text, a class id, or None; the images have 1 / 2^(S - k) of the full size.
    """
    samples = _sample(model, tokenizer, _prompts(prompt, count), sampling, scales=scales)
    return Preview(samples.codes, samples.images, prompt, sampling)


def refine(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    previews: Preview,
    index: int,
    scales: int | None = None,
) -> Samples:
    """Finish one preview: the sample that drawing all scales at once would have given."""
    count = len(previews.codes)
    require(0 <= index < count, f"index must lie in 0 ... {count - 1}, it is {index}.")
    drawn = {"prefix_codes": previews.codes[index : index + 1], "first_sample": index}
    prompts, sampling = _prompts(previews.prompt, 1), previews.sampling
    return _sample(model, tokenizer, prompts, sampling, scales=scales, **drawn)


def check_same_codes(model: AutoregressiveModel, tokenizer: SpectralTokenizer) -> None:
    """Refuse a model over other codes than the tokenizer's."""
    c, geometry = model.config, tokenizer.geometry
    theirs = c.num_scales, c.tokens_per_scale, c.codebook_sizes, c.num_codebooks
    books = tokenizer.config.codebook_sizes, len(tokenizer.codebooks)
    ours = geometry.num_scales, geometry.tokens_per_scale, *books
    counts = f"its scales, tokens a scale, codes and codebooks are {theirs}, the tokenizer's {ours}"
    require(theirs == ours, f"the model is over the codes of another tokenizer: {counts}.")


def _sample(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    prompts: Prompts,
    sampling: SamplingConfig | None,
    **options,
) -> Samples:
    """Codes that `generate` draws, and their images."""
    check_same_codes(model, tokenizer)
    codes = generate(model, prompts, sampling, **options).cpu()
    return Samples(codes, torch.cat([tokenizer.decode(part).cpu() for part in codes.split(BATCH)]))


def _prompts(prompt: str | int | None, count: int) -> Prompts:
    """The same prompt for `count` samples."""
    if prompt is None:
        return count
    return [prompt] * count if isinstance(prompt, str) else torch.full((count,), prompt)


def _encode(tokenizer: SpectralTokenizer, images: Tensor, sizes: list[int]) -> Tensor:
    """Codes [B, k, N] on the CPU of images [B, 3, H, H]; H must be one of `sizes`."""
    height, width = images.shape[-2:]
    wanted = f"squares of {' or '.join(map(str, sizes))} px"
    is_fit = height == width and height in sizes
    require(is_fit, f"images must be {wanted}, not {height} x {width}.")
    return torch.cat([tokenizer.encode(part).cpu() for part in images.split(BATCH)])
