"""Evaluation of class- and text-conditional samples against images that training never saw.

Class-conditional samples are compared with wide held-out views, text-conditional ones with the
images of held-out names. Of large sets only features and codes are in memory, and `PART` images at
a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from sitlib import metrics
from sitlib.data import held_out_positions, training_views
from sitlib.files import read_metadata, write_tensors
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import digest
from workbook import evaluate
from workbook.codes import captioned, held_out_wide, images_of, load_codes
from workbook.dual_encoder import trained_dual_encoder
from workbook.evaluate.text import KINDS, prompt_scores, prompts, retrieved
from workbook.evaluate.tokenizer import original_features
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.sections import TextEvaluationConfig
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, CodesRun, DualEncoderRun, TokenizerRun

GREY = 0.85  # of places whose codes are not sampled yet
REAL = "samples/real.safetensors"  # `real_features`, written by a stage
REAL_TEXT = "samples/real_text.safetensors"  # those of text-conditional models
SAMPLER = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_growth", "seed")


def load_models(
    profile: Profile, variant: str, seed: int
) -> tuple[AutoregressiveModel, SpectralTokenizer]:
    """A generator and the tokenizer of its codes, on their device."""
    model = trained_generator(profile, variant, seed).model.to(best_device())
    return model, _tokenizer(profile, variant)


def _tokenizer(profile: Profile, variant: str) -> SpectralTokenizer:
    name = profile.autoregressive_variant(variant).tokenizer
    seed = profile.generator_section(variant).tokenizer_seed
    return trained_tokenizer(profile, name, seed).model.to(best_device())


def evaluate_generator(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a generator of the profile, draw samples and measure them.

    Args:
        pipeline: read real features from the stage's file, and keep the samples.

    Returns:
        `run`, and what `measure_generator` returns.
    """
    metrics.fetch_weights()
    model = trained_generator(profile, variant, seed).model.to(best_device())
    samples = _samples(profile, variant, seed, save=pipeline)
    file = REAL_TEXT if variant in profile.text.variants else REAL
    real = load_file(resolve(file)) if pipeline else None
    scores = measure_generator(model, profile, variant, samples, real)
    return {"run": _run(profile, variant, seed), **scores}


def evaluate_decoder(profile: Profile, variant: str, seed: int, decoder: str) -> dict[str, Any]:
    """Measure the samples of a class-conditional model through another decoder.

    Args:
        decoder: variant of a tokenizer that has taken over the codes of the model's tokenizer.

    Raises:
        ValueError: it decodes other codes.
    """
    tokenizer_seed = profile.autoregressive.tokenizer_seed
    encoder = TokenizerRun.of(profile, decoder, tokenizer_seed).codes
    if encoder != CodesRun.of(profile, variant).tokenizer:
        raise ValueError(f"{decoder} does not decode the codes that {variant} models.")
    tokenizer = trained_tokenizer(profile, decoder, tokenizer_seed).model.to(best_device())
    codes = _samples(profile, variant, seed)["codes"]
    distances = _distances(load_file(resolve(REAL))["held_out"], profile, variant)
    scores = _distances_of_codes(codes, tokenizer, distances, profile, variant)
    return {"run": _decoder_run(profile, variant, seed, decoder), **scores}


def generator_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, else scores that are measured now."""
    folder = "text" if variant in profile.text.variants else "generation"
    path = f"metrics/{folder}/{variant}-seed{seed}.json"
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
    """Class, or kind of prompts -> its first sampled images [each, 3, H, W], if there are as many.

    Codes are the pipeline's if they are of this very run, else drawn now.
    """
    samples, tokenizer = _samples(profile, variant, seed), _tokenizer(profile, variant)
    if "codes" in samples:
        codes, classes = samples["codes"], load_codes(profile, variant).classes
        labels = sampled_labels(profile, len(codes))
        samples = {name: codes[labels == index] for index, name in enumerate(classes)}
    enough = {name: codes[:each] for name, codes in samples.items() if len(codes) >= each}
    return {name: evaluate.decode(tokenizer, codes) for name, codes in enough.items()}


def _samples(profile: Profile, variant: str, seed: int, save: bool = False) -> dict[str, Tensor]:
    """`draw_all` of this very run, from the pipeline or drawn now, and kept if `save`."""
    path = resolve(f"samples/{variant}-seed{seed}.safetensors")
    run = _run(profile, variant, seed)
    if read_metadata(path).get("run") == run:
        return load_file(path)
    model = trained_generator(profile, variant, seed).model.to(best_device())
    samples = draw_all(model, profile, variant)
    if save:
        write_tensors(path, samples, {"run": run})
    return samples


def _run(profile: Profile, variant: str, seed: int) -> str:
    settings = profile.generator_section(variant).evaluation
    judge = [DualEncoderRun.of(profile)] if variant in profile.text.variants else []
    run = AutoregressiveRun.of(profile, variant, seed)
    return digest(run, profile.sampler(variant), settings, *judge)


def _decoder_run(profile: Profile, variant: str, seed: int, decoder: str) -> str:
    run = TokenizerRun.of(profile, decoder, profile.autoregressive.tokenizer_seed)
    return digest(_run(profile, variant, seed), run)


# -- real images -------------------------------------------------------------------------------


def real_features(profile: Profile, variant: str) -> dict[str, Tensor]:
    """Features of the real images that samples of `variant` are compared with, "held_out".

    For a class-conditional model also those of as many views of training photographs, "train".
    """
    images = {"held_out": _held_out_images(profile, variant)}
    if variant not in profile.text.variants:
        images["train"] = _training_images(profile, variant)
    lite0 = metrics.load_lite0().to(best_device())
    return {
        name: torch.cat([metrics.lite0_features(part, lite0, title=name) for part in parts])
        for name, parts in images.items()
    }


def _held_out_images(profile: Profile, variant: str) -> Iterator[Tensor]:
    """Images of held-out names, or `reference_views` held-out wide views, in parts."""
    if variant in profile.text.variants:
        yield from prompts(profile, "held_out").images.split(evaluate.PART)
        return
    total = profile.autoregressive.evaluation.reference_views
    for start in range(0, total, evaluate.PART):
        yield held_out_wide(profile, variant, min(evaluate.PART, total - start), start)[0]


def _training_images(profile: Profile, variant: str) -> Iterator[Tensor]:
    settings = profile.autoregressive.evaluation
    views = settings.reference_views / len(images_of(profile, variant, "test"))
    if settings.neighbors <= views:
        raise ValueError(
            f"autoregressive.evaluation.neighbors is {settings.neighbors}, but there are "
            f"{views:.0f} views of each held-out photograph: precision and recall would measure "
            "whether samples show the very same photograph. Raise it above that number."
        )
    photographs = images_of(profile, variant, "train")
    size = CodesRun.of(profile, variant).tokenizer.data.size
    for start in range(0, settings.reference_views, evaluate.PART):
        place = start // evaluate.PART, evaluate.PART, size, settings.seed
        views = training_views(photographs, *place, kind="wide")[0]
        yield views[: settings.reference_views - start]


def _distances(references: Tensor, profile: Profile, variant: str) -> evaluate.Distances:
    settings = profile.generator_section(variant).evaluation
    lite0, subset = metrics.load_lite0().to(best_device()), settings.kid_subset_size
    return evaluate.Distances(references, lite0, subset, settings.seed, settings.neighbors)


def distances_to_held_out(images: Tensor, profile: Profile, variant: str) -> dict[str, Any]:
    """Distances of images to held-out views, whose features are kept for the next time."""
    views = torch.cat(list(_held_out_images(profile, variant)))
    lite0 = metrics.load_lite0().to(best_device())
    features = original_features(views, lite0, title="originals")
    return _distances(features, profile, variant)(images, "samples")


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
    model: AutoregressiveModel, asked: Tensor | list[str], sampling: SamplingConfig
) -> Tensor:
    """Codes [M, S, N] for class ids [M] or M captions, on the CPU."""
    title = f"sampling, guidance {sampling.guidance:g}, top-p {sampling.top_p:g}"
    return generate(model, asked, sampling, progress=title).cpu()


def draw_all(model: AutoregressiveModel, profile: Profile, variant: str) -> dict[str, Tensor]:
    """Samples by which a generator is judged: kind of prompts -> codes, or `codes` of all classes."""
    if variant in profile.text.variants:
        asked = {kind: prompts(profile, kind).captions for kind in KINDS}
    else:
        count = profile.autoregressive.evaluation.samples
        asked = {"codes": sampled_labels(profile, count)}
    sampling = profile.sampler(variant)
    return {name: draw_samples(model, x, sampling) for name, x in asked.items()}


def measure_generator(
    model: AutoregressiveModel,
    profile: Profile,
    variant: str,
    samples: dict[str, Tensor] | None = None,
    real: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Distances of samples to real images, nats per token, sweeps; of text models R-precision.

    Args:
        samples, real: from `draw_all` and `real_features`. Default: made now.

    Returns:
        The distances of class-conditional samples, or of those for held-out names, to the real
        images; with `tokenizer.evaluation.inception` also FID and Inception scores. How to read
        them: the distances of `reconstruction`, the same real images after the tokenizer, which a
        model would have that knew the right codes (not a bound: without details an image can be
        nearer); of class-conditional models those of `real`, views of training photographs.
        `nats_per_token`, `nats_by_scale`; `guidance_sweep`, `top_p_sweep`; `parameters`;
        `protocol`. Of text-conditional models also what `prompt_scores` returns.
    """
    samples = samples or draw_all(model, profile, variant)
    real = real or real_features(profile, variant)
    settings, sampling = profile.generator_section(variant).evaluation, profile.sampler(variant)
    tokenizer, codes = _tokenizer(profile, variant), load_codes(profile, variant)
    distances = _distances(real["held_out"], profile, variant)
    sampled = next(iter(samples.values()))  # those of held-out names come first
    scores = _distances_of_codes(sampled, tokenizer, distances, profile, variant)
    parts = _held_out_images(profile, variant)
    reconstructions = (evaluate.reconstruct(tokenizer, images)[1] for images in parts)
    scores["reconstruction"] = distances.of_parts(reconstructions, "reconstructions")
    del scores["reconstruction"]["protocol"]
    if "train" in real:
        scores["real"] = evaluate.distances_only(distances(real["train"]))

    judge, told = None, {}
    if isinstance(settings, TextEvaluationConfig):
        judge = trained_dual_encoder(profile).model
        told = {kind: prompts(profile, kind) for kind in KINDS}
        scores |= prompt_scores(judge, tokenizer, told, samples, profile, distances.lite0)
        scores["protocol"] |= {
            "prompts": f"{settings.prompts} of each kind: " + "; ".join(KINDS.values()),
            "r_precision": f"right caption among {settings.candidates} of other names, by the dual "
            "encoder; intervals over names",
        }
        asked, texts = told["held_out"].captions, captioned(profile, "test")
        captions = [texts.captions[image][0] for image in codes.held_out_labels.tolist()]
        assert model.text_tokenizer is not None
        conditions = model.text_tokenizer.encode(captions, truncate=True)
    else:
        asked, conditions = sampled_labels(profile, settings.sweep_samples), codes.held_out_labels

    def row(changed: SamplingConfig) -> dict[str, float]:
        """Scores of a row of a sweep; those of `samples` where nothing differs."""
        new, right = scores, scores.get("r_precision_held_out")
        if changed != sampling or len(asked) != len(sampled):
            drawn = draw_samples(model, asked, changed)
            new = distances.of_parts(_decoded(tokenizer, drawn), "samples of a sweep")
            if judge is not None:
                images, lite0 = evaluate.decode(tokenizer, drawn), distances.lite0
                right = retrieved(judge, images, told["held_out"], profile, lite0)["r_precision"]
        share = {} if right is None else {"r_precision": right}
        return share | evaluate.distances_only(new)

    def sweep(name: str) -> list[dict[str, float]]:
        values = [{name: value} for value in getattr(settings, f"{name}_sweep")]
        return [value | row(replace(sampling, **cast(Any, value))) for value in values]

    return {
        **scores,
        **evaluate.held_out_nats(model, codes.held_out, conditions),
        "guidance_sweep": sweep("guidance"),
        "top_p_sweep": sweep("top_p"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _decoded(tokenizer: SpectralTokenizer, codes: Tensor) -> Iterator[Tensor]:
    return (evaluate.decode(tokenizer, part) for part in codes.split(evaluate.PART))


def _distances_of_codes(
    codes: Tensor,
    tokenizer: SpectralTokenizer,
    distances: evaluate.Distances,
    profile: Profile,
    variant: str,
) -> dict[str, Any]:
    """Distances of sampled codes, FID and Inception scores where asked for, and `protocol`."""
    scores = distances.of_parts(_decoded(tokenizer, codes), "samples")
    sampling, is_text = profile.sampler(variant), variant in profile.text.variants
    scores["protocol"] |= {
        "references": "the held-out images with these names"
        if is_text
        else "wide held-out views of labelled photographs",
        **{name: getattr(sampling, name) for name in SAMPLER},
    }
    originals = _held_out_images(profile, variant)
    images, seed = _decoded(tokenizer, codes), profile.generator_section(variant).evaluation.seed
    return scores | evaluate.inception_scores(profile, images, originals, seed)


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
