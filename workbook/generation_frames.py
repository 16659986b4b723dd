"""Frames of an image while its codes are sampled: scale by scale, or row by row in one scale."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.precision import best_device
from sitlib.sample.generate import generate
from workbook.generators import trained_generator
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer

GREY = 0.85  # of places whose codes are not sampled yet


def generation_frames(
    profile: Profile, variant: str, seed: int, prompts: Tensor | list[str], frames: int
) -> list[Tensor]:
    """Frames [B, 3, H, W] of samples in the making, the finished images last.

    A generator over several scales gives one frame a scale, enlarged by nearest pixel. One over a
    single scale gives `frames` frames, after equal shares of its codes: the last sampled code is
    repeated, since the decoder wants all codes, and places not sampled yet are grey.

    Raises:
        ValueError: several scales, and a decoder that cannot decode the first ones alone.
    """
    generator = trained_generator(profile, variant, seed).model.to(best_device())
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer_seed = profile.generator_section(variant).tokenizer_seed
    tokenizer = trained_tokenizer(profile, name, tokenizer_seed).model.to(best_device())
    # One batch: all samples are in each frame.
    sampling = replace(profile.sampler(variant), batch_size=max(1, len(prompts)))
    images: list[Tensor] = []
    if generator.config.num_scales > 1:
        generate(
            generator,
            prompts,
            sampling,
            tokenizer=tokenizer,
            on_scale=lambda first, scale, x: images.append(x.cpu()),
        )
        return [F.interpolate(x, images[-1].shape[2:]) for x in images]

    codes = generate(generator, prompts, sampling)  # [B, 1, N]
    num_codes, grid = codes.shape[2], tokenizer.config.grid_size
    for frame in range(1, frames + 1):
        count = max(1, round(num_codes * frame / frames))
        first_codes = codes.clone()
        first_codes[:, :, count:] = codes[:, :, count - 1 : count]
        image = tokenizer.decode(first_codes).cpu()
        is_sampled = (torch.arange(num_codes) < count).view(1, 1, grid, grid).float()
        mask = F.interpolate(is_sampled, image.shape[2:])
        images.append(image * mask + GREY * (1 - mask))
    return images
