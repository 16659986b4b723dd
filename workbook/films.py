"""How an image comes about while its codes are drawn: scale by scale, or row by row over the codes of one scale."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.precision import best_device
from sitlib.sample.generate import generate
from workbook.generators import trained_generator
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer

UNDRAWN = 0.85  # grey of places whose codes are not drawn yet


def film(
    profile: Profile, variant: str, seed: int, prompts: Tensor | list[str], frames: int
) -> list[Tensor]:
    """Frames [B, 3, H, W] of an image's making, the finished image last.

    A model over scale-causal codes shows the image after each of its scales, enlarged so that all frames have one size (nearest pixel).
    A model over one scale shows it after each of `frames` equal shares of its codes: what is drawn yet is decoded with the last drawn
    code repeated, since its decoder wants all codes, and the places not drawn yet are grey.

    Raises:
        ValueError: a model of several scales whose decoder cannot decode the first ones alone.
    """
    section = profile.generator_section(variant)
    sampling = replace(
        profile.sampler(variant), batch_size=max(1, len(prompts))
    )  # all frames of one scale together
    model = trained_generator(profile, variant, seed).model.to(best_device())
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer = trained_tokenizer(profile, name, section.tokenizer_seed).model.to(best_device())
    full = tokenizer.config.size
    if model.config.num_scales > 1:
        shown: list[Tensor] = []
        generate(
            model,
            prompts,
            sampling,
            tokenizer=tokenizer,
            on_scale=lambda first, scale, images: shown.append(
                F.interpolate(images.cpu(), (full, full))
            ),
        )
        return shown
    codes = generate(model, prompts, sampling).cpu()
    total = codes.shape[2]
    return [
        _partly(tokenizer, codes, max(1, round(total * (i + 1) / frames))) for i in range(frames)
    ]


def _partly(tokenizer, codes: Tensor, drawn: int) -> Tensor:
    grid, total = tokenizer.config.grid, codes.shape[2]
    so_far = codes.clone()
    so_far[:, :, drawn:] = codes[:, :, drawn - 1 : drawn]
    images = tokenizer.decode(so_far).cpu()
    is_drawn = (torch.arange(total) < drawn).view(1, 1, grid, grid).float()
    mask = F.interpolate(is_drawn, images.shape[2:])
    return images * mask + UNDRAWN * (1 - mask)
