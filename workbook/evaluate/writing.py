"""Ways of writing codes compared: images that are half written, passes for each scale."""

import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from sitlib.evaluate import decode, features_of, reconstruct
from sitlib.metrics import reconstruction_values
from sitlib.model.generator import AutoregressiveModel
from sitlib.sample.generate import generate
from workbook.codes import load_codes
from workbook.evaluate import generation
from workbook.evaluate.text import Judge, prompts
from workbook.profile import Profile


def by_passes(
    model: AutoregressiveModel, profile: Profile, variant: str, real: Tensor
) -> list[dict[str, Any]]:
    """Distances to real and to reconstructed images, and images a second, of a masked model for
    several numbers of passes a scale; of one that writes code by code, once (None). Of models of
    texts R-precision, too.
    """
    settings = profile.generator_section(variant).evaluation
    tokenizer, usual = generation.tokenizer_of(profile, variant), profile.sampler(variant)
    asked = generation.asked_in_sweeps(profile, variant)
    images = generation.held_out_images(profile, variant)
    again = features_of(reconstruct(tokenizer, part)[1] for part in images)
    counts = [1, 2, 4, 8, model.config.tokens_per_scale] if model.config.transformer.masked else [0]
    judge = Judge(profile) if variant in profile.text.variants else None
    rows = []
    for count in counts:
        sampling = replace(usual, steps_per_scale=count) if count else usual
        began = time.perf_counter()
        drawn = generate(model, asked, sampling).cpu()
        taken = time.perf_counter() - began
        images = decode(tokenizer, drawn)
        features = features_of([images])
        row = {"passes": count or None, "images_per_second": len(drawn) / taken}
        row |= generation.means(generation.distances(features, real, settings))
        row["to_reconstructions"] = generation.means(
            generation.distances(features, again, settings)
        )
        if judge is not None:
            told = prompts(profile, "held_out")
            row["r_precision"] = judge.retrieved(images, told)["r_precision"]
        rows.append(row)
    return rows


def half_written(model: AutoregressiveModel, profile: Profile, variant: str) -> dict[str, float]:
    """PSNR and LPIPS-Alex of held-out images of which a model was told the first half of the codes.

    It draws the others, in its own order; the image is compared with that of the right codes.
    """
    codes, tokenizer = load_codes(profile, variant), generation.tokenizer_of(profile, variant)
    prompts = generation.held_out_prompts(profile, variant)
    half = codes.held_out[0].numel() // 2
    given = {"prefix_codes": codes.held_out, "written": half}
    finished = decode(tokenizer, generate(model, prompts, profile.sampler(variant), **given))
    right, names = decode(tokenizer, codes.held_out), ["psnr", "lpips_alex"]
    values = reconstruction_values(right, finished, metrics=names)
    finite = {name: values[name][values[name].isfinite()] for name in names}  # some are the same
    return {name: float(value.mean()) for name, value in finite.items()}
