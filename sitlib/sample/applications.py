"""What codes in the order coarse to fine are good for: upsampling, editing, previews (SIT, arXiv 2412.09607, section 5).

All four are the same act: some scales are given, the others are drawn. They are given by a small image (`upsample`), by an image whose
caption changes (`edit`), by nobody (`preview`), or by a preview that was liked (`refine`).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import Prompts, generate

BATCH = 64  # images encoded and decoded at a time


@dataclass
class Drawn:
    """Codes and what they look like, on the CPU wherever the models are."""

    codes: Tensor  # [M, k, N] int64, coarsest scale first
    images: Tensor  # [M, 3, H, W] in [0, 1]


@dataclass
class Preview(Drawn):
    """The first scales of several samples of one prompt, and how to go on."""

    prompt: Prompts  # of one sample: [1] class ids, one text, or 1 for no prompt
    sampling: SamplingConfig


def upsample(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    images: Tensor,
    prompts: Prompts | None,
    sampling: SamplingConfig,
    progress: str | None = None,
) -> Drawn:
    """Draws the details that small images lack: their codes are the first scales, all finer ones are sampled.

    With a scale-causal decoder the result, averaged down again, is the tokenizer's own reconstruction of the small image.

    Args:
        images: [B, 3, h, h] in [0, 1], h one of `tokenizer.sizes` but the last.
        prompts: what each image shows, as for `generate`; None: the model is told nothing.

    Raises:
        ValueError: images of a size that this tokenizer has no codes for, or that is the full size already; a model of other codes;
            prompts that the model does not take, their number included.
    """
    _check_pair(model, tokenizer)
    _check_prompts(prompts, len(images))
    small = tokenizer.sizes[:-1]
    if not small:
        raise ValueError(
            "this tokenizer takes images of one size only, so there is nothing to upsample: take one with encoder_attention: scale_causal."
        )
    if images.ndim == 4 and (images.shape[2] != images.shape[3] or images.shape[2] not in small):
        raise ValueError(
            f"images to upsample must be squares of {' or '.join(map(str, small))} px, these have {images.shape[2]} x {images.shape[3]} px."
        )
    return _complete(model, tokenizer, _encoded(tokenizer, images), prompts, sampling, progress)


def edit(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    images: Tensor,
    prompts: Prompts | None,
    keep: int,
    sampling: SamplingConfig,
    progress: str | None = None,
) -> Drawn:
    """Keeps the coarsest scales of images and draws the others anew, for other prompts.

    The codes of the first `keep` scales are those of the images, bit by bit. Many kept scales leave only texture to the prompt, few leave
    only the layout to the image.

    Args:
        images: [B, 3, H, H] in [0, 1], H the full size.
        prompts: what each image shall show, as for `generate`; None: the model is told nothing.
        keep: number of scales, 0 (nothing of the image is left) ... S (nothing is drawn).

    Raises:
        ValueError: `keep` outside this range, images of another size, a model of other codes, or prompts that the model does not take.
    """
    _check_pair(model, tokenizer)
    _check_prompts(prompts, len(images))
    scales, full = tokenizer.geometry.num_scales, tokenizer.sizes[-1]
    keep = _whole(keep, "keep", 0, scales, ", the scales of the model")
    if images.ndim == 4 and images.shape[2:] != (full, full):
        raise ValueError(
            f"images to edit must have {full} x {full} px, the size of the tokenizer, these have {images.shape[2]} x {images.shape[3]} px."
        )
    return _complete(
        model, tokenizer, _encoded(tokenizer, images)[:, :keep], prompts, sampling, progress
    )


def preview(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    prompt: str | int | None,
    sampling: SamplingConfig,
    count: int = 8,
    scales: int = 1,
) -> Preview:
    """The first scales of `count` samples of one prompt: small images at a fraction of the cost of finished ones.

    Args:
        prompt: a text, or a class id of a class-conditional model; None: the model is told nothing.
        scales: how many are drawn; images have 1 / 2^(S - scales) of the full size.

    Raises:
        ValueError: a prompt that the model does not take, a number of scales that it does not have, a count below 1, a model of other
            codes, or a tokenizer whose decoder cannot decode the first scales alone.
    """
    _check_pair(model, tokenizer)
    if count < 1:
        raise ValueError(f"count must be at least 1, it is {count}.")
    if scales < tokenizer.geometry.num_scales and tokenizer.config.decoder_attention == "full":
        raise ValueError(
            "this tokenizer's decoder attends to all scales, so the first ones cannot be shown alone: take one with decoder_attention: "
            "scale_causal."
        )
    one: Prompts = (
        1 if prompt is None else [prompt] if isinstance(prompt, str) else torch.tensor([prompt])
    )
    codes = generate(model, _repeated(one, count), sampling, scales=scales).cpu()
    return Preview(codes, _decoded(tokenizer, codes), one, sampling)


def refine(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    previews: Preview,
    index: int,
    scales: int | None = None,
) -> Drawn:
    """Finishes the preview `index`, and only this one: the sample that drawing all scales at once would have given.

    Args:
        index: 0 ... count - 1.
        scales: as far as this scale, the last one by default.

    Raises:
        ValueError: there is no such preview, fewer scales than it has, or a model of other codes.
    """
    _check_pair(model, tokenizer)
    index = _whole(index, "index", 0, len(previews.codes) - 1)
    drawn, all_scales = previews.codes.shape[1], tokenizer.geometry.num_scales
    scales = _whole(
        all_scales if scales is None else scales,
        "scales",
        drawn,
        all_scales,
        ", from those of the preview on",
    )
    codes = previews.codes[index : index + 1]
    codes = generate(
        model,
        previews.prompt,
        previews.sampling,
        scales=scales,
        prefix_codes=codes,
        first_sample=index,
    ).cpu()
    return Drawn(codes, _decoded(tokenizer, codes))


def _complete(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    prefix_codes: Tensor,
    prompts: Prompts | None,
    sampling: SamplingConfig,
    progress: str | None,
) -> Drawn:
    """All scales of images whose first ones are given."""
    prompts = len(prefix_codes) if prompts is None else prompts
    codes = generate(model, prompts, sampling, prefix_codes=prefix_codes, progress=progress).cpu()
    return Drawn(codes, _decoded(tokenizer, codes))


def _encoded(tokenizer: SpectralTokenizer, images: Tensor) -> Tensor:
    return torch.cat([tokenizer.encode(batch).cpu() for batch in images.split(BATCH)])


def _decoded(tokenizer: SpectralTokenizer, codes: Tensor) -> Tensor:
    return torch.cat([tokenizer.decode(batch).cpu() for batch in codes.split(BATCH)])


def _repeated(prompt: Prompts, count: int) -> Prompts:
    if isinstance(prompt, int):
        return count
    return prompt.expand(count) if isinstance(prompt, Tensor) else [*prompt] * count


def _check_pair(model: AutoregressiveModel, tokenizer: SpectralTokenizer) -> None:
    """Refuses a model over other codes than the tokenizer's."""
    config, geometry = tokenizer.config, tokenizer.geometry
    ours = {
        "scales": geometry.num_scales,
        "tokens a scale": geometry.tokens_per_scale,
        "codes": config.num_codes,
        "codebooks": len(tokenizer.codebooks),
    }
    shape = model.config
    theirs = dict(
        zip(
            ours,
            (shape.num_scales, shape.tokens_per_scale, shape.num_codes, shape.num_codebooks),
            strict=True,
        )
    )
    different = [
        f"{theirs[name]} {name}, not {ours[name]}" for name in ours if ours[name] != theirs[name]
    ]
    if different:
        raise ValueError(
            f"the model is of the codes of another tokenizer: it has {'; '.join(different)}."
        )


def _check_prompts(prompts: Prompts | None, images: int) -> None:
    """Refuses prompts that are not one for each image."""
    if isinstance(prompts, str):
        raise ValueError("prompts are a list of texts, one for each image, not one text.")
    count = images if prompts is None else prompts if isinstance(prompts, int) else len(prompts)
    if count != images:
        raise ValueError(f"there are {images} images but {count} prompts: one for each is needed.")


def _whole(value: int, name: str, low: int, high: int, what: str = "") -> int:
    """A whole number of any integer type, such as `argmax` returns, within limits."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number in {low} ... {high}{what}, it is {value}.")
    return number
