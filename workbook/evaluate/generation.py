"""Evaluation of class-conditional samples against held-out photographs.

Of large sets only features and codes are in memory, and `PART` images at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sitlib import metrics
from sitlib.data import held_out_positions, training_views
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import digest
from workbook import evaluate
from workbook.codes import Codes, held_out_wide, images_of, load_codes
from workbook.evaluate.tokenizer import original_features
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, CodesRun, TokenizerRun

REFERENCES = "wide held-out views of labelled photographs"
GREY = 0.85  # of places whose codes are not sampled yet
REAL = "samples/real.safetensors"  # `real_features`, written by a stage


def load_models(
    profile: Profile, variant: str, seed: int
) -> tuple[AutoregressiveModel, SpectralTokenizer]:
    """A generator, class- or text-conditional, and the tokenizer of its codes, on their device."""
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer_seed = profile.generator_section(variant).tokenizer_seed
    return (
        trained_generator(profile, variant, seed).model.to(best_device()),
        trained_tokenizer(profile, name, tokenizer_seed).model.to(best_device()),
    )


def evaluate_generator(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a class-conditional model of the profile, draw samples and measure them.

    Args:
        pipeline: read real features from the stage's file, and keep the samples.

    Returns:
        `run`, and what `measure_generator` returns.
    """
    metrics.fetch_weights()
    model = trained_generator(profile, variant, seed).model.to(best_device())
    tokenizer, codes = _tokenizer(profile, variant), load_codes(profile, variant)
    samples = _samples(profile, variant, seed, save=pipeline)["codes"]
    real = load_file(resolve(REAL)) if pipeline else real_features(profile, variant)
    scores = measure_generator(model, tokenizer, codes, samples, real, profile, variant)
    return {"run": _run(profile, variant, seed), **scores}


def evaluate_decoder(profile: Profile, variant: str, seed: int, decoder: str) -> dict[str, Any]:
    """Measure the pipeline's samples of a model through another decoder.

    Args:
        decoder: variant of a tokenizer that has taken over the codes of the model's tokenizer.

    Raises:
        ValueError: it decodes other codes, or the pipeline has drawn no samples of this model.
    """
    tokenizer_seed = profile.autoregressive.tokenizer_seed
    run = AutoregressiveRun.of(profile, variant, seed)
    if TokenizerRun.of(profile, decoder, tokenizer_seed).codes != run.codes.tokenizer:
        raise ValueError(f"{decoder} does not decode the codes that {variant} models.")

    def no_samples() -> dict[str, Tensor]:
        raise ValueError(f"There are no samples of {variant}, seed {seed}: draw them first.")

    name = f"{variant}-seed{seed}"
    codes = evaluate.samples_of(name, _run(profile, variant, seed), no_samples)["codes"]
    tokenizer = trained_tokenizer(profile, decoder, tokenizer_seed).model.to(best_device())
    distances = _distances(load_file(resolve(REAL))["held_out"], profile)
    scores = distances(evaluate.features_of_codes(tokenizer, codes, distances.lite0))
    scores["protocol"] |= {
        "references": REFERENCES,
        **evaluate.sampling_protocol(profile.sampler(variant)),
    }
    images = (evaluate.decode(tokenizer, part) for part in codes.split(evaluate.PART))
    evaluation_seed = profile.autoregressive.evaluation.seed
    scores |= evaluate.inception_scores(profile, images, _views(profile, variant), evaluation_seed)
    return {"run": _decoder_run(profile, variant, seed, decoder), **scores}


def generator_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, else scores that are measured now."""
    path = f"metrics/generation/{variant}-seed{seed}.json"
    stored = evaluate.stored_scores(path, _run(profile, variant, seed))
    return stored or evaluate_generator(profile, variant, seed)


def load_second_scores(profile: Profile, variant: str, decoder: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run with a second decoder.

    Raises:
        ValueError: there are none, or of another profile.
    """
    path = f"metrics/generation/{variant}_second-seed{seed}.json"
    scores = evaluate.stored_scores(path, _decoder_run(profile, variant, seed, decoder))
    if scores is None:
        raise ValueError(f"{path} is missing or of another profile: `make repro` makes it.")
    return scores


def load_samples(profile: Profile, variant: str, seed: int, each: int) -> dict[str, Tensor]:
    """Class -> its first sampled images [each, 3, H, W], of classes that have as many.

    Codes are the pipeline's if they are of this very run, else drawn now.
    """
    samples, tokenizer = _samples(profile, variant, seed), _tokenizer(profile, variant)
    codes, labels = samples["codes"], samples["labels"]
    classes = load_codes(profile, variant).classes
    by_class = {name: codes[labels == index] for index, name in enumerate(classes)}
    return {
        name: evaluate.decode(tokenizer, codes[:each])
        for name, codes in by_class.items()
        if len(codes) >= each
    }


def _samples(profile: Profile, variant: str, seed: int, save: bool = False) -> dict[str, Tensor]:
    """`codes` and `labels` of this very run, from the pipeline or drawn now."""

    def draw() -> dict[str, Tensor]:
        model = trained_generator(profile, variant, seed).model.to(best_device())
        count = profile.autoregressive.evaluation.samples
        codes, labels = draw_samples(model, profile, count, profile.sampler(variant))
        return {"codes": codes, "labels": labels}

    return evaluate.samples_of(f"{variant}-seed{seed}", _run(profile, variant, seed), draw, save)


def _tokenizer(profile: Profile, variant: str) -> SpectralTokenizer:
    name = profile.autoregressive_variant(variant).tokenizer
    seed = profile.generator_section(variant).tokenizer_seed
    return trained_tokenizer(profile, name, seed).model.to(best_device())


def _run(profile: Profile, variant: str, seed: int) -> str:
    run, settings = AutoregressiveRun.of(profile, variant, seed), profile.autoregressive.evaluation
    return digest(run, profile.sampler(variant), settings)


def _decoder_run(profile: Profile, variant: str, seed: int, decoder: str) -> str:
    run = TokenizerRun.of(profile, decoder, profile.autoregressive.tokenizer_seed)
    return digest(_run(profile, variant, seed), run)


# -- real images -------------------------------------------------------------------------------


def real_features(profile: Profile, variant: str | None = None) -> dict[str, Tensor]:
    """Features of wide views of photographs, held out ("held_out") and for training ("train").

    Args:
        variant: whose photographs. Default: the first.
    """
    variant = variant or next(iter(profile.autoregressive.variants))
    settings = profile.autoregressive.evaluation
    run = AutoregressiveRun.of(profile, variant, 0).codes
    views = settings.reference_views / len(images_of(profile, variant, "test"))
    if settings.neighbors <= views:
        raise ValueError(
            f"autoregressive.evaluation.neighbors is {settings.neighbors}, but there are "
            f"{views:.0f} views of each held-out photograph: precision and recall "
            "would measure whether samples show the very same photograph. Raise it above that number."
        )
    photographs, size = images_of(profile, variant, "train"), run.tokenizer.data.size
    lite0 = metrics.load_lite0().to(best_device())

    def train(part: int, count: int) -> Tensor:
        place = part, evaluate.PART, size, settings.seed
        return training_views(photographs, *place, kind="wide")[0][:count]

    train_views = (train(start // evaluate.PART, count) for start, count in _parts(profile))
    parts = {"held_out": _views(profile, variant), "train": train_views}
    return {
        name: torch.cat([metrics.lite0_features(images, lite0, title=name) for images in views])
        for name, views in parts.items()
    }


def _parts(profile: Profile) -> list[tuple[int, int]]:
    """First reference view of every part, and the number of views."""
    total = profile.autoregressive.evaluation.reference_views
    return [(start, min(evaluate.PART, total - start)) for start in range(0, total, evaluate.PART)]


def _views(profile: Profile, variant: str) -> Iterator[Tensor]:
    """The reference views in parts."""
    return (held_out_wide(profile, variant, count, start)[0] for start, count in _parts(profile))


def _distances(references: Tensor, profile: Profile) -> evaluate.Distances:
    settings, lite0 = profile.autoregressive.evaluation, metrics.load_lite0().to(best_device())
    subset, seed = settings.kid_subset_size, settings.seed
    return evaluate.Distances(references, lite0, subset, seed, settings.neighbors)


def distances_to_held_out(images: Tensor, profile: Profile, variant: str) -> dict[str, Any]:
    """Distances of images to held-out views, whose features are kept for the next time."""
    views, _ = held_out_wide(profile, variant, profile.autoregressive.evaluation.reference_views)
    lite0 = metrics.load_lite0().to(best_device())
    return _distances(original_features(views, lite0, title="originals"), profile)(
        images, "samples"
    )


# -- samples -----------------------------------------------------------------------------------


def sampled_labels(profile: Profile, count: int) -> Tensor:
    """Class ids [count] with the frequencies of the reference views.

    So that the mix of classes adds nothing to a distance to these views.
    """
    variant = next(iter(profile.autoregressive.variants))
    images, seed = images_of(profile, variant, "test"), CodesRun.of(profile, variant).codes.seed
    views = held_out_positions(images, profile.autoregressive.evaluation.reference_views, seed)
    labels = images.labels[views]
    return labels.repeat(-(-count // len(labels)))[:count]


def draw_samples(
    model: AutoregressiveModel, profile: Profile, count: int, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Codes [count, S, N] and their class ids, those of `sampled_labels`, on the CPU."""
    labels = sampled_labels(profile, count)
    title = f"sampling, guidance {sampling.guidance:g}, top-p {sampling.top_p:g}"
    return generate(model, labels, sampling, progress=title).cpu(), labels


def measure_generator(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    codes: Codes,
    sampled: Tensor,
    real: dict[str, Tensor],
    profile: Profile,
    variant: str,
) -> dict[str, Any]:
    """Distances of sampled codes [M, S, N] to held-out views, nats per token, sweeps.

    With `tokenizer.evaluation.inception` also FID and Inception scores. Two more distances to the
    same views say how to read them: "reconstruction", of these views after the tokenizer, is what a
    model would have that knew the right codes (not a bound: without details an image can be
    nearer); "real" is that of views of training photographs.

    Args:
        real: from `real_features`.
    """
    settings, sampling = profile.autoregressive.evaluation, profile.sampler(variant)
    distances = _distances(real["held_out"], profile)
    lite0 = distances.lite0
    scores = distances(evaluate.features_of_codes(tokenizer, sampled, lite0))
    scores["protocol"] |= {"references": REFERENCES, **evaluate.sampling_protocol(sampling)}
    images = (evaluate.decode(tokenizer, part) for part in sampled.split(evaluate.PART))
    scores |= evaluate.inception_scores(profile, images, _views(profile, variant), settings.seed)
    views = (evaluate.reconstruct(tokenizer, part)[1] for part in _views(profile, variant))
    decoded = [metrics.lite0_features(images, lite0, title="reconstructions") for images in views]
    scores["reconstruction"] = evaluate.distances_only(distances(torch.cat(decoded)))
    scores["real"] = evaluate.distances_only(distances(real["train"]))

    def score(changed: SamplingConfig) -> dict[str, float]:
        """Distances of a row of a sweep; those of `sampled` where nothing differs."""
        if changed == sampling and settings.sweep_samples == len(sampled):
            return evaluate.distances_only(scores)
        drawn, _ = draw_samples(model, profile, settings.sweep_samples, changed)
        features = evaluate.features_of_codes(tokenizer, drawn, lite0)
        return evaluate.distances_only(distances(features))

    return {
        **scores,
        **evaluate.held_out_nats(model, codes.held_out, codes.held_out_labels),
        **evaluate.sweeps(sampling, settings, score),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


# -- images in the making ----------------------------------------------------------------------


def generation_frames(
    profile: Profile, variant: str, seed: int, prompts: Tensor | list[str], frames: int
) -> list[Tensor]:
    """Frames [B, 3, H, W] by `sampling_frames` of a generator of the profile."""
    models = load_models(profile, variant, seed)
    return sampling_frames(*models, profile.sampler(variant), prompts, frames)


def sampling_frames(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    sampling: SamplingConfig,
    prompts: Tensor | list[str],
    frames: int,
) -> list[Tensor]:
    """Frames [B, 3, H, W] of samples in the making, the finished images last.

    A generator over several scales gives one frame a scale, enlarged by nearest pixel. One over a
    single scale gives `frames` frames, after equal shares of its codes: the last sampled code is
    repeated, since the decoder wants all codes, and places not sampled yet are grey.

    Raises:
        ValueError: several scales, and a decoder that cannot decode the first ones alone.
    """
    sampling = replace(sampling, batch_size=max(1, len(prompts)))  # all samples in each frame
    images: list[Tensor] = []
    if model.config.num_scales > 1:
        for_image = {"tokenizer": tokenizer, "on_scale": lambda first, scale, x: images.append(x)}
        generate(model, prompts, sampling, **for_image)
        return [F.interpolate(x.cpu(), images[-1].shape[2:]) for x in images]

    codes = generate(model, prompts, sampling)  # [B, 1, N]
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
