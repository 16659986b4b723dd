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

from sitlib import evaluate, metrics
from sitlib.data import held_out_positions, training_views
from sitlib.evaluate import features_of_codes
from sitlib.files import read_metadata, write_tensors
from sitlib.metrics import GENERATION_METRICS
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import best_device
from sitlib.sample.generate import generate
from sitlib.strict import digest, require
from workbook.codes import captioned, held_out_wide, images_of, load_codes
from workbook.evaluate import stored_scores
from workbook.evaluate.memorisation import memorisation
from workbook.evaluate.text import KINDS, Judge, prompts
from workbook.generators import trained_generator
from workbook.params import split_run
from workbook.paths import resolve
from workbook.profile import GenerationEvaluationConfig, Profile, TextEvaluationConfig
from workbook.runs import AutoregressiveRun, CodesRun, DualEncoderRun, TokenizerRun
from workbook.tokenizers import trained_tokenizer

Settings = GenerationEvaluationConfig | TextEvaluationConfig
Tensors = dict[str, Tensor]
SMALL = 8  # times smaller than the full size: the smallest samples, and what is upsampled
GREY = 0.85  # of places whose codes are not sampled yet
REAL = "samples/real.safetensors"  # `real_features`, written by a stage
REAL_TEXT = "samples/real_text.safetensors"  # those of text-conditional models
SAMPLER = ("temperature", "top_k", "top_p", "min_p", "guidance", "steps_per_scale", "seed")


def load_models(
    profile: Profile, variant: str, seed: int
) -> tuple[AutoregressiveModel, SpectralTokenizer]:
    """A generator and the tokenizer of its codes, on their device."""
    model = trained_generator(profile, variant, seed).model.to(best_device())
    return model, tokenizer_of(profile, variant)


def tokenizer_of(profile: Profile, variant: str, decoder: str | None = None) -> SpectralTokenizer:
    """The tokenizer whose codes a generator models, or a second `decoder`, on its device."""
    name = decoder or profile.autoregressive_variant(variant).tokenizer
    seed = profile.generator_section(variant).tokenizer_seed
    return trained_tokenizer(profile, name, seed).model.to(best_device())


def evaluate_generator(
    profile: Profile, variant: str, seed: int, decoder: str | None = None, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a generator, draw samples and measure them: `measure_generator`, and `run`.

    Args:
        decoder: a tokenizer that has taken over the codes of the model's tokenizer, to decode the
            samples (of held-out prompts) once more, for `measure_codes` alone.
        pipeline: read real features from the stage's file, and keep the samples. Default: the
            pipeline's scores do if they are of this very run.

    Raises `ValueError` if the decoder decodes other codes.
    """
    codes = CodesRun.of(profile, variant).tokenizer
    if decoder and TokenizerRun.of(profile, decoder, codes.seed).base != codes:
        raise ValueError(f"{decoder} does not decode the codes that {variant} models.")
    run, is_text = _run(profile, variant, seed, decoder), variant in profile.text.variants
    path = f"{variant}{'_second' if decoder else ''}-seed{seed}.json"
    path = f"metrics/{'text' if is_text and not decoder else 'generation'}/{path}"
    if not pipeline and (stored := stored_scores(path, run)):
        return stored
    metrics.fetch_weights()
    samples, file = _samples(profile, variant, seed, save=pipeline), REAL_TEXT if is_text else REAL
    real = load_file(resolve(file)) if pipeline else real_features(profile, variant)
    if decoder:
        tokenizer = tokenizer_of(profile, variant, decoder)
        scores = measure_codes(samples, tokenizer, real["held_out"], profile, variant)
    else:
        model, _ = load_models(profile, variant, seed)
        scores = measure_generator(model, profile, variant, samples, real)
    return {"run": run, **scores}


def decode_again(profile: Profile, run: str, of: str, decoder: str) -> dict[str, Any]:
    """Scores, named `run`, of the samples of the run `of`, decoded by that of a second decoder."""
    return evaluate_generator(profile, *split_run(of), split_run(decoder)[0], pipeline=True)


def _run(profile: Profile, variant: str, seed: int, decoder: str | None = None) -> str:
    """Digest of everything that determines the scores."""
    settings = profile.generator_section(variant).evaluation
    judge = [DualEncoderRun.of(profile)] if variant in profile.text.variants else []
    run = AutoregressiveRun.of(profile, variant, seed)
    key = digest(run, profile.sampler(variant), settings, *judge)
    if decoder is None:
        return key
    return digest(key, TokenizerRun.of(profile, decoder, run.codes.tokenizer.seed))


def measure_generator(
    model: AutoregressiveModel, profile: Profile, variant: str, samples: Tensors, real: Tensors
) -> dict[str, Any]:
    """`measure_codes`, `memorisation`, nats and sweeps of a model; of text models R-precision, of
    others distances of `real` training views. `samples` are from `draw_all`.
    """
    settings, sampling = profile.generator_section(variant).evaluation, profile.sampler(variant)
    tokenizer, codes = tokenizer_of(profile, variant), load_codes(profile, variant)
    references, sampled = real["held_out"], next(iter(samples.values()))
    scores = measure_codes(samples, tokenizer, references, profile, variant)
    scores["memorisation"] = memorisation(sampled, tokenizer, codes)
    if "train" in real:
        scores["real"] = means(distances(real["train"], references, settings))

    judge, told = None, {}
    if isinstance(settings, TextEvaluationConfig):
        judge, told = Judge(profile), {kind: prompts(profile, kind) for kind in KINDS}
        scores |= judge.prompt_scores(tokenizer, told, samples)
        scores["protocol"] |= {
            "prompts": f"{settings.prompts} of each kind: " + "; ".join(KINDS.values()),
            "r_precision": f"right caption among {settings.candidates} of other names, by the dual "
            "encoder; intervals over names",
        }
        assert model.text_tokenizer is not None
        captions = held_out_prompts(profile, variant)
        conditions = model.text_tokenizer.encode(captions, truncate=True)
    else:
        conditions = codes.held_out_labels
    asked = asked_in_sweeps(profile, variant)

    def swept(name: str, value: float) -> dict[str, Any]:
        changed = replace(sampling, **cast(Any, {name: value}))
        new, right = scores, scores.get("r_precision_held_out")
        if changed != sampling or len(asked) != len(sampled):  # other samples than those
            drawn = generate(model, asked, changed, progress="samples of a sweep").cpu()
            features = features_of_codes(tokenizer, drawn, "samples of a sweep")
            new = distances(features, references, settings)
            if judge is not None:
                images = evaluate.decode(tokenizer, drawn)
                right = judge.retrieved(images, told["held_out"], "samples")["r_precision"]
        return {name: value} | ({"r_precision": right} if judge else {}) | means(new)

    return {
        **scores,
        **evaluate.held_out_nats(model, codes.held_out, conditions),
        "guidance_sweep": [swept("guidance", value) for value in settings.guidance_sweep],
        "top_p_sweep": [swept("top_p", value) for value in settings.top_p_sweep],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure_codes(
    samples: Tensors, tokenizer: SpectralTokenizer, real: Tensor, profile: Profile, variant: str
) -> dict[str, Any]:
    """Distances of sampled codes, FID and Inception scores where asked for, and `protocol`.

    Samples are compared as in `sample_scores`.
    """
    settings, sampling = profile.generator_section(variant).evaluation, profile.sampler(variant)
    codes = next(iter(samples.values()))  # those of held-out names come first
    features, groups = (
        features_of_codes(tokenizer, codes, "samples"),
        reference_groups(profile, variant),
    )
    parts = (evaluate.reconstruct(tokenizer, x)[1] for x in held_out_images(profile, variant))
    again = evaluate.features_of(parts, "reconstructions")
    scores = evaluate.sample_scores(features, real, again, **_options(settings, groups))
    data = CodesRun.of(profile, variant).tokenizer.data
    views = "wide held-out views of labelled photographs"
    of_names = "the held-out images with these names"
    scores["protocol"] |= {
        "references": of_names if variant in profile.text.variants else views,
        "reference_groups": len(set(groups)),  # photographs, or names
        "reference_folder": data.folder,
        "reference_size": data.size,
        **{name: getattr(sampling, name) for name in SAMPLER},
    }
    if profile.tokenizer.evaluation.inception:
        inception, c = metrics.InceptionMetrics(), tokenizer.config
        is_causal = c.levels > 0 and c.decoder_attention == "scale_causal"

        def scores_of(codes: Tensor, share: int = 1) -> dict[str, Any]:  # at 1 / share of the size
            scales = c.num_scales - share.bit_length() + 1 if is_causal else c.num_scales
            for part in codes.split(evaluate.PART):
                images = evaluate.decode(tokenizer, part, scales)
                images = F.avg_pool2d(images, images.shape[-1] * share // c.size)
                inception.add(images, real=False, title="samples")
            for images in held_out_images(profile, variant):
                inception.add(F.avg_pool2d(images, share), real=True, title="originals")
            return inception.compute(seed=settings.seed)

        scores |= scores_of(codes)
        if variant in profile.text.variants:
            scores["sizes"] = {str(c.size // n): scores_of(codes, n) for n in (4, SMALL)}
        if "upsampled" in samples:
            scores["upsampled"] = scores_of(samples["upsampled"])
    return scores


def suspicious_pairs(profile: Profile, variant: str, seed: int, pairs: list[list[int]]) -> Tensor:
    """Images [P, 2, 3, H, W] of `pairs` of `memorisation`: a sample, the nearest training view."""
    sampled = next(iter(_samples(profile, variant, seed).values()))
    train, (samples, rows) = load_codes(profile, variant).train, torch.tensor(pairs).T
    both = torch.stack([sampled[samples], train[rows]], dim=1)
    return evaluate.decode(tokenizer_of(profile, variant), both.flatten(0, 1)).unflatten(0, (-1, 2))


def distances(
    features: Tensor, references: Tensor, settings: Settings, groups: list | None = None
) -> dict[str, Any]:
    """Every metric of `GENERATION_METRICS` of features [M, 1280], and their `protocol`."""
    return metrics.generation_metrics(features, references, **_options(settings, groups))


def _options(settings: Settings, groups: list | None = None) -> dict[str, Any]:
    """Those of `generation_metrics`."""
    names = ("kid_subset_size", "neighbors", "seed")
    return {name: getattr(settings, name) for name in names} | {"groups": groups}


def means(scores: dict[str, Any]) -> dict[str, float]:
    """The distances among scores, without deviations and protocol."""
    return {name: scores[name] for name in GENERATION_METRICS}


# -- real images -------------------------------------------------------------------------------


def real_features(profile: Profile, variant: str) -> Tensors:
    """Features of the real images that samples are compared with, "held_out", and for a
    class-conditional model of as many views of training photographs, "train".
    """
    features = {"held_out": evaluate.features_of(held_out_images(profile, variant), "held_out")}
    if variant not in profile.text.variants:
        features["train"] = evaluate.features_of(_training_images(profile, variant), "train")
    return features


def write_features(profile: Profile, section: str) -> None:
    """Write those of a section of the profile, `autoregressive` or `text`."""
    variant = next(iter(getattr(profile, section).variants))
    file = REAL_TEXT if section == "text" else REAL
    write_tensors(resolve(file), real_features(profile, variant), {})


def held_out_images(profile: Profile, variant: str) -> Iterator[Tensor]:
    """Images of held-out names, or `reference_views` held-out wide views, in parts."""
    if variant in profile.text.variants:
        yield from prompts(profile, "held_out").images.split(evaluate.PART)
        return
    total = profile.autoregressive.evaluation.reference_views
    for start in range(0, total, evaluate.PART):
        yield held_out_wide(profile, variant, min(evaluate.PART, total - start), start)[0]


def held_out_prompts(profile: Profile, variant: str) -> Any:
    """Class ids [V], or a caption each, of the held-out codes of a model."""
    labels = load_codes(profile, variant).held_out_labels
    if variant not in profile.text.variants:
        return labels
    captions = captioned(profile, "test").captions
    return [captions[image][0] for image in labels.tolist()]


def reference_groups(profile: Profile, variant: str) -> list:
    """Names, or positions of the photographs, of `held_out_images`."""
    if variant in profile.text.variants:
        return prompts(profile, "held_out").names
    images, seed = images_of(profile, variant, "test"), CodesRun.of(profile, variant).codes.seed
    return held_out_positions(images, profile.autoregressive.evaluation.reference_views, seed)


def _training_images(profile: Profile, variant: str) -> Iterator[Tensor]:
    settings = profile.autoregressive.evaluation
    views = settings.reference_views / len(images_of(profile, variant, "test"))
    sentence = f"autoregressive.evaluation.neighbors is {settings.neighbors}: raise it above the "
    sentence += f"{views:.0f} views of each held-out photograph, or precision and recall measure "
    sentence += "whether samples show the very same photograph."
    require(settings.neighbors > views, sentence)
    photographs = images_of(profile, variant, "train")
    size = CodesRun.of(profile, variant).tokenizer.data.size
    for start in range(0, settings.reference_views, evaluate.PART):
        place = start // evaluate.PART, evaluate.PART, size, settings.seed
        views = training_views(photographs, *place, kind="wide")[0]
        yield views[: settings.reference_views - start]


# -- samples -----------------------------------------------------------------------------------


def sampled_labels(profile: Profile, count: int) -> Tensor:
    """Class ids [count] as frequent as in the reference views: their mix adds to no distance."""
    variant = next(iter(profile.autoregressive.variants))
    labels = images_of(profile, variant, "test").labels[reference_groups(profile, variant)]
    return labels.repeat(-(-count // len(labels)))[:count]


def asked_in_sweeps(profile: Profile, variant: str) -> Any:
    """Class ids, or captions of held-out names, for which sweeps draw samples."""
    if variant in profile.text.variants:
        return prompts(profile, "held_out").captions
    return sampled_labels(profile, profile.autoregressive.evaluation.sweep_samples)


def draw_all(model: AutoregressiveModel, profile: Profile, variant: str) -> Tensors:
    """Samples that judge a generator: kind of prompts -> codes, or `codes` of all classes."""
    if variant in profile.text.variants:
        asked = {kind: prompts(profile, kind).captions for kind in KINDS}
    else:
        asked = {"codes": sampled_labels(profile, profile.autoregressive.evaluation.samples)}
    sampling = profile.sampler(variant)
    samples = {
        name: generate(model, x, sampling, progress=f"samples, {name}").cpu()
        for name, x in asked.items()
    }
    tokenizer, judged = tokenizer_of(profile, variant), profile.tokenizer.evaluation.inception
    if judged and "held_out" in asked and tokenizer.config.size // SMALL in tokenizer.sizes:
        # Their first scales are the codes of the prompts' images, made small (SIT, section 5).
        small = (F.avg_pool2d(images, SMALL) for images in held_out_images(profile, variant))
        given = torch.cat([evaluate.encode(tokenizer, images) for images in small])
        drawn = generate(model, asked["held_out"], sampling, prefix_codes=given)
        samples["upsampled"] = drawn.cpu()
    return samples


def _samples(profile: Profile, variant: str, seed: int, save: bool = False) -> Tensors:
    """`draw_all` of this very run, from the pipeline or drawn now, and kept if `save`."""
    path, run = resolve(f"samples/{variant}-seed{seed}.safetensors"), _run(profile, variant, seed)
    if read_metadata(path).get("run") == run:
        return load_file(path)
    samples = draw_all(load_models(profile, variant, seed)[0], profile, variant)
    if save:
        write_tensors(path, samples, {"run": run})
    return samples


def load_samples(profile: Profile, variant: str, seed: int, each: int) -> Tensors:
    """Class, or kind of prompts -> its first images [each, 3, H, W], if so many were sampled."""
    samples, tokenizer = _samples(profile, variant, seed), tokenizer_of(profile, variant)
    if "codes" in samples:
        codes, classes = samples["codes"], load_codes(profile, variant).classes
        labels = sampled_labels(profile, len(codes))
        samples = {name: codes[labels == index] for index, name in enumerate(classes)}
    enough = {name: codes[:each] for name, codes in samples.items() if len(codes) >= each}
    return {name: evaluate.decode(tokenizer, codes) for name, codes in enough.items()}


def generation_frames(
    profile: Profile, variant: str, seed: int, asked: Tensor | list[str], frames: int
) -> list[Tensor]:
    """Frames [B, 3, H, W] of samples in the making, the finished images last.

    A generator over several scales gives one frame a scale, enlarged by nearest pixel, and needs a
    decoder of first scales. One over a single scale gives `frames` frames, after equal shares of
    its codes: the last sampled code is repeated, since the decoder wants all, and the rest is grey.
    """
    model, tokenizer = load_models(profile, variant, seed)
    sampling = replace(profile.sampler(variant), batch_size=max(1, len(asked)))  # all in a frame
    images: list[Tensor] = []
    if model.config.num_scales > 1:
        for_image = {"tokenizer": tokenizer, "on_scale": lambda first, scale, x: images.append(x)}
        generate(model, asked, sampling, **for_image)
        return [F.interpolate(x.cpu(), images[-1].shape[2:]) for x in images]

    codes = generate(model, asked, sampling)  # [B, 1, N]
    places, grid = torch.arange(codes.shape[2]), tokenizer.config.grid_size
    for frame in range(1, frames + 1):
        count = max(1, round(len(places) * frame / frames))
        image = tokenizer.decode(codes[:, :, places.clamp(max=count - 1)]).cpu()
        is_sampled = (places < count).view(1, 1, grid, grid).float()
        images.append(image.where(F.interpolate(is_sampled, image.shape[2:]) > 0, GREY))
    return images
