"""Evaluation of text-conditional samples by R-precision (AttnGAN, arXiv 1711.10485).

A sample is right if, among many captions, a dual encoder that was trained on real images finds the
sample's own the most similar. The same is measured of real held-out images, the ceiling of such a
judge, and of their reconstructions, which a model over the tokenizer's codes can reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib import metrics
from sitlib.data import CaptionedImages, held_out_views
from sitlib.metrics.networks import Lite0
from sitlib.model.dual_encoder import DualEncoder
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.generator_config import SamplingConfig
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import digest
from workbook import evaluate
from workbook.codes import captioned, load_codes
from workbook.dual_encoder import judge_features, trained_dual_encoder
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile
from workbook.tokenizers import trained_tokenizer
from workbook.train_or_load import AutoregressiveRun, DualEncoderRun

KINDS = {
    "held_out": "names that training never saw",
    "seen": "names of training images, in new words",
    "known": "names of training images, in words of training",
}
REAL = "samples/real_text.safetensors"  # `real_text_features`, written by a stage


def evaluate_text_generator(
    profile: Profile, variant: str, seed: int, pipeline: bool = False
) -> dict[str, Any]:
    """Train or load a text-conditional model of the profile, draw samples and measure them.

    Args:
        pipeline: read real features from the stage's file, and keep the samples.

    Returns:
        `run`, and what `measure_text_generator` returns.
    """
    metrics.fetch_weights()
    model, run = trained_generator(profile, variant, seed).model, _run(profile, variant, seed)
    real = load_file(resolve(REAL)) if pipeline else real_text_features(profile)
    asked = {kind: prompts(profile, kind) for kind in KINDS}

    def draw() -> dict[str, Tensor]:
        return draw_text_samples(model.to(best_device()), asked, profile.sampler(variant))

    samples = evaluate.samples_of(f"{variant}-seed{seed}", run, draw, save=pipeline)
    scores = measure_text_generator(model, variant, asked, samples, real["held_out"], profile)
    return {"run": run, **scores}


def text_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, else scores that are measured now."""
    path = f"metrics/text/{variant}-seed{seed}.json"
    stored = evaluate.stored_scores(path, _run(profile, variant, seed))
    return stored or evaluate_text_generator(profile, variant, seed)


def load_text_samples(profile: Profile, variant: str, seed: int, kind: str, count: int) -> Tensor:
    """Images [count, 3, H, W] for the first prompts of a kind: the pipeline's, or drawn now."""

    def draw() -> dict[str, Tensor]:
        model = trained_generator(profile, variant, seed).model.to(best_device())
        asked = {kind: prompts(profile, kind)}
        return draw_text_samples(model, asked, profile.sampler(variant))

    samples = evaluate.samples_of(f"{variant}-seed{seed}", _run(profile, variant, seed), draw)
    return evaluate.decode(_tokenizer(profile, variant), samples[kind][:count])


def _tokenizer(profile: Profile, variant: str) -> SpectralTokenizer:
    name = profile.autoregressive_variant(variant).tokenizer
    return trained_tokenizer(profile, name, profile.text.tokenizer_seed).model.to(best_device())


def _run(profile: Profile, variant: str, seed: int) -> str:
    settings = (profile.sampler(variant), profile.text.evaluation, DualEncoderRun.of(profile))
    return digest(AutoregressiveRun.of(profile, variant, seed), *settings)


# -- prompts -----------------------------------------------------------------------------------


@dataclass
class Prompts:
    """Captions of one of `KINDS`, and the real images that they describe."""

    kind: str
    captions: list[str]
    known: list[str]  # captions in phrasings of training, by which samples are judged
    names: list[str]  # subjects
    images: Tensor  # [M, 3, H, W] in [0, 1]


def prompts(profile: Profile, kind: str) -> Prompts:
    """Prompts of a kind, one for each of `text.evaluation.prompts` names, the same for every model.

    "held_out": of held-out images, in phrasings of training. "seen": of training images, in
    phrasings that training never uses. "known": of the same images, in phrasings of training; what
    is lost from there to "seen" is lost to the words.
    """
    settings = profile.text.evaluation
    split = "test" if kind == "held_out" else "train"
    texts = captioned(profile, split)
    positions, images = _one_of_each_name(profile, texts)

    def one_each(captions: list[list[str]]) -> list[str]:
        u = np.random.default_rng([settings.seed, int(split == "test")]).random(len(positions))
        return [
            captions[i][int(share * len(captions[i]))]
            for i, share in zip(positions, u, strict=True)
        ]

    known = one_each(texts.captions)
    asked = one_each(captioned(profile, split, "new").captions) if kind == "seen" else known
    return Prompts(kind, asked, known, [texts.names[i] for i in positions], images)


def _one_of_each_name(profile: Profile, texts: CaptionedImages) -> tuple[list[int], Tensor]:
    """Positions of images of different names, in a random order, and wide views of them.

    Raises:
        ValueError: there are fewer names than prompts.
    """
    settings, size = profile.text.evaluation, DualEncoderRun.of(profile).data.size
    position_of = {key: index for index, key in enumerate(texts.images.keys)}
    count = settings.prompts
    while True:  # a shorter set of views begins a longer one
        count = min(2 * count, len(texts.images))
        views, _, keys = held_out_views(texts.images, count, size, settings.seed, kind="wide")
        positions = [position_of[key] for key in keys]
        first = {texts.names[p]: row for row, p in reversed(list(enumerate(positions)))}
        rows = sorted(first.values())[: settings.prompts]
        if len(rows) == settings.prompts:
            return [positions[row] for row in rows], views[rows]
        if count == len(texts.images):
            raise ValueError(
                f"text.evaluation.prompts is {settings.prompts}, but {texts.images.where} has only "
                f"{len(rows)} names."
            )


def real_text_features(profile: Profile) -> dict[str, Tensor]:
    """Lite0 features [M, 1280] of the real images with held-out names."""
    images, lite0 = prompts(profile, "held_out").images, metrics.load_lite0().to(best_device())
    return {"held_out": metrics.lite0_features(images, lite0, title="real images")}


def draw_text_samples(
    model: AutoregressiveModel, asked: Mapping[str, Prompts], sampling: SamplingConfig
) -> dict[str, Tensor]:
    """Codes [M, S, N] for the prompts of each kind, on the CPU."""
    title = f"sampling, top-p {sampling.top_p:g}, guidance {sampling.guidance:g}"
    return {
        kind: generate(model, told.captions, sampling, progress=f"{title}, {kind}").cpu()
        for kind, told in asked.items()
    }


# -- scores ------------------------------------------------------------------------------------


def retrieval(
    judge: DualEncoder, features: Tensor, captions: list[str], names: list[str], profile: Profile
) -> Tensor:
    """R-precision in % [M] of images, given as `judge_features`, and their captions of names."""
    settings = profile.text.evaluation
    with torch.no_grad():
        tokens = judge.text_tokenizer.encode(captions, truncate=True)
        similarity = judge.similarity(features, tokens)
    right, options = torch.arange(len(similarity)), {"candidates": settings.candidates}
    return 100 * metrics.r_precision(similarity, right, names, **options, seed=settings.seed)


def retrieved(
    judge: DualEncoder, images: Tensor, asked: Prompts, profile: Profile, lite0: Lite0, title: str
) -> dict[str, Any]:
    """R-precision (%) of images, with an interval of 95 % over names, and `by_prompt`.

    Captions are in phrasings of training, whatever the samples were asked for with: new words test
    the generator, not the judge.
    """
    features = judge_features(images, lite0, DualEncoderRun.of(profile), title)
    values = retrieval(judge, features, asked.known, asked.names, profile)
    return {
        "r_precision": float(values.mean()),
        "interval": list(metrics.bootstrap_interval(values, asked.names)),
        "chance": 100 / profile.text.evaluation.candidates,
        "by_prompt": [round(value, 1) for value in values.tolist()],
    }


def measure_text_generator(
    model: AutoregressiveModel,
    variant: str,
    asked: Mapping[str, Prompts],
    samples: Mapping[str, Tensor],
    references: Tensor,
    profile: Profile,
) -> dict[str, Any]:
    """R-precision of samples for every kind of prompts; distances and sweeps for held-out names.

    Args:
        asked, samples: kind -> prompts, and codes [M, S, N] that were drawn for them.
        references: features of the real images with held-out names.

    Returns:
        `kinds`: kind -> `samples`, `reconstruction`, `real` -> `r_precision` (%), `interval`,
        `chance` (%), and of samples `by_prompt`; `r_precision_<kind>` of samples; of the samples
        for held-out names the distances to the real images of these names, and of their
        reconstructions (`reconstruction`), with `tokenizer.evaluation.inception` also FID and
        Inception scores; `nats_per_token`; `guidance_sweep` and `top_p_sweep`; `parameters`;
        `protocol`.
    """
    settings, sampling = profile.text.evaluation, profile.sampler(variant)
    judge, tokenizer = trained_dual_encoder(profile).model, _tokenizer(profile, variant)
    lite0 = metrics.load_lite0().to(best_device())
    subset, seed = settings.kid_subset_size, settings.seed
    distances = evaluate.Distances(references, lite0, subset, seed, settings.neighbors)

    def judged(images: Tensor, told: Prompts, title: str) -> dict[str, Any]:
        return retrieved(judge, images, told, profile, lite0, title)

    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, told in asked.items():
        images = {
            "samples": evaluate.decode(tokenizer, samples[kind]),
            "reconstruction": evaluate.reconstruct(tokenizer, told.images)[1],
            "real": told.images,
        }
        kinds[kind] = {of: judged(x, told, f"{of}, {kind}") for of, x in images.items()}
        for of in ("reconstruction", "real"):
            del kinds[kind][of]["by_prompt"]

    held_out = asked["held_out"]
    images = evaluate.decode(tokenizer, samples["held_out"])
    scores = distances(images, "samples")
    protocol = {
        **scores.pop("protocol"),
        "prompts": f"{settings.prompts} of each kind: " + "; ".join(KINDS.values()),
        "r_precision": f"right caption among {settings.candidates} of other names, by the dual "
        "encoder; intervals over names",
        "references": "the held-out images with these names",
        **evaluate.sampling_protocol(sampling),
    }
    parts = images.split(evaluate.PART), held_out.images.split(evaluate.PART)
    scores |= evaluate.inception_scores(profile, *parts, seed)
    reconstructions = distances(
        evaluate.reconstruct(tokenizer, held_out.images)[1], "reconstruction"
    )
    del reconstructions["protocol"]

    def score(changed: SamplingConfig) -> dict[str, float]:
        """A row of a sweep; the samples themselves are not drawn again."""
        right, row = kinds["held_out"]["samples"], scores
        if changed != sampling:
            again = draw_text_samples(model, {"held_out": held_out}, changed)
            drawn, title = evaluate.decode(tokenizer, again["held_out"]), "samples of a sweep"
            right, row = judged(drawn, held_out, title), distances(drawn, title)
        return {"r_precision": right["r_precision"], **evaluate.distances_only(row)}

    codes, texts = load_codes(profile, variant), captioned(profile, "test")
    captions = [texts.captions[image][0] for image in codes.held_out_labels.tolist()]
    assert model.text_tokenizer is not None
    tokens = model.text_tokenizer.encode(captions, truncate=True)
    return {
        **scores,
        **{f"r_precision_{kind}": kinds[kind]["samples"]["r_precision"] for kind in KINDS},
        "kinds": kinds,
        "reconstruction": reconstructions,
        **evaluate.held_out_nats(model, codes.held_out, tokens),
        **evaluate.sweeps(sampling, settings, score),
        "parameters": sum(p.numel() for p in model.parameters()),
        "protocol": protocol,
    }
