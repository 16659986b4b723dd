"""Judging text-conditional samples: `python -m workbook.text_evaluation`.

A sample is right if, among many captions, a dual encoder that was trained on real images finds the sample's own caption the most similar
one (R-precision; AttnGAN, arXiv 1711.10485). The same is measured of real held-out images, which is the ceiling of such a judge, and of
their reconstructions, which is what a model over the tokenizer's codes can reach.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.data import CaptionedImages, held_out_views
from sitlib.files import read_json, read_metadata, write_json, write_tensors
from sitlib.metrics import bootstrap_interval, generation_metrics, lite0_features, r_precision
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.metrics.weights import fetch_weights
from sitlib.model.config import SamplingConfig
from sitlib.model.dual_encoder import DualEncoder
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.precision import best_device
from sitlib.sample.generate import generate
from sitlib.strict import digest
from workbook.codes import captioned, load_codes
from workbook.dual_encoder import judge_features, trained_dual_encoder
from workbook.generation_evaluation import (
    DISTANCES,
    decoded,
    held_out_nats,
    inception_scores,
    sampling_protocol,
)
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import AutoregressiveRun, CodesRun, DualEncoderRun, command
from workbook.tokenizer_evaluation import PART, reconstructed
from workbook.tokenizers import trained_tokenizer

KINDS = {
    "held_out": "names that training never saw",
    "seen": "names of training images, in new words",
    "known": "names of training images, in words of training",
}


@dataclass
class Prompts:
    """Captions of one kind of `KINDS`, and the real images that they are captions of."""

    kind: str
    captions: list[str]
    known: list[
        str
    ]  # captions of the same images in phrasings of training, by which samples are judged
    names: list[str]  # what each is of
    images: Tensor  # [M, 3, H, W] in [0, 1]


def prompts(profile: Profile, kind: str) -> Prompts:
    """The prompts of a kind, one for each of so many names, the same for every model.

    "held_out": held-out images, in the phrasings of training. "seen": training images, in phrasings that training never uses. "known": the
    same images, in the phrasings of training; what is lost from there to "seen" is lost to the words.
    """
    settings = profile.text.evaluation
    split = "test" if kind == "held_out" else "train"
    texts = captioned(profile, split)
    position = {key: index for index, key in enumerate(texts.images.keys)}
    chosen, images = _one_of_each_name(profile, texts, position)

    def one_each(captions: list[list[str]]) -> list[str]:
        pick = np.random.default_rng([settings.seed, int(split == "test")]).random(len(chosen))
        return [captions[i][int(u * len(captions[i]))] for i, u in zip(chosen, pick, strict=True)]

    known = one_each(texts.captions)
    asked = one_each(captioned(profile, split, "new").captions) if kind == "seen" else known
    return Prompts(kind, asked, known, [texts.names[i] for i in chosen], images)


def _one_of_each_name(
    profile: Profile, texts: CaptionedImages, position: dict[str, int]
) -> tuple[list[int], Tensor]:
    """Positions of `prompts` images of different names, in a random order, and wide views of them.

    Raises:
        ValueError: there are fewer names.
    """
    settings, size = profile.text.evaluation, DualEncoderRun.of(profile).data.size
    count = settings.prompts
    while True:  # a shorter set of views begins a longer one
        count = min(2 * count, len(texts.images))
        views, _, keys = held_out_views(texts.images, count, size, settings.seed, kind="wide")
        first = {texts.names[position[key]]: row for row, key in reversed(list(enumerate(keys)))}
        rows = sorted(first.values())[: settings.prompts]
        if len(rows) == settings.prompts:
            return [position[keys[row]] for row in rows], views[rows]
        if count == len(texts.images):
            raise ValueError(
                f"text.evaluation.prompts is {settings.prompts}, but {texts.images.where} has only {len(rows)} names."
            )


def real_text_features(profile: Profile) -> dict[str, Tensor]:
    """Lite0 features [M, 1280] of the real images with the held-out names."""
    images = prompts(profile, "held_out").images
    return {"held_out": lite0_features(images, load_lite0().to(best_device()), title="real images")}


def retrieved(
    judge: DualEncoder, images: Tensor, asked: Prompts, profile: Profile, lite0: Lite0, title: str
) -> dict[str, Any]:
    """R-precision of images [M, 3, H, W] in %, with an interval of 95 % over names, and `by_prompt`: of each image, in %.

    Captions are in the phrasings of training, whatever the samples were asked for with: new words are a test of the generator, not of
    the judge.
    """
    settings = profile.text.evaluation
    features = judge_features(images, lite0, DualEncoderRun.of(profile), title)
    with torch.no_grad():
        tokens = judge.text_tokenizer.encode(asked.known, truncate=True)
        similarity = judge.similarity(features, tokens)
    right = torch.arange(len(similarity))
    values = 100 * r_precision(
        similarity, right, asked.names, candidates=settings.candidates, seed=settings.seed
    )
    return {
        "r_precision": float(values.mean()),
        "interval": list(bootstrap_interval(values, asked.names)),
        "chance": 100 / settings.candidates,
        "by_prompt": [round(value, 1) for value in values.tolist()],
    }


def draw_text_samples(
    model: AutoregressiveModel, asked: Prompts, sampling: SamplingConfig
) -> Tensor:
    """Codes [M, S, N], on the CPU, sampled for prompts."""
    title = f"sampling, {asked.kind}, top-p {sampling.top_p:g}, guidance {sampling.guidance:g}"
    return generate(model, asked.captions, sampling, progress=title).cpu()


def evaluate_text_generator(
    model: AutoregressiveModel,
    variant: str,
    asked: Sequence[Prompts],
    sampled: Mapping[str, Tensor],
    real: dict[str, Tensor],
    profile: Profile,
) -> dict[str, Any]:
    """R-precision of samples of every kind of prompts; FD-Lite0, KID, precision and recall of those of held-out names; sweeps.

    Args:
        asked: prompts of every kind.
        sampled: kind -> codes [M, S, N] that were sampled for them.
        real: features [M, 1280] of the real images with the held-out names, from `real_text_features`.

    Returns:
        for every kind `samples`, `reconstruction`, `real`, each with `r_precision` (%), `interval`, `chance` (%), and of samples
        `by_prompt`; the distances of the samples of held-out names to the real images with these names, with
        `tokenizer.evaluation.inception` also FID and Inception score; `r_precision_<kind>` of samples;
        held-out nats per token; `top_p_sweep` and `guidance_sweep`, rows with the one setting of the sampler that differs and the scores
        of samples of held-out names; `parameters`; `protocol`.
    """
    settings, sampling = profile.text.evaluation, profile.sampler(variant)
    lite0 = load_lite0().to(best_device())
    judge, name = (
        trained_dual_encoder(profile).model,
        profile.autoregressive_variant(variant).tokenizer,
    )
    tokenizer = trained_tokenizer(profile, name, profile.text.tokenizer_seed).model.to(
        best_device()
    )

    def distances_to(references: Tensor, images: Tensor, title: str) -> dict[str, Any]:
        return generation_metrics(
            images,
            references,
            lite0=lite0,
            kid_subset_size=settings.kid_subset_size,
            neighbors=settings.neighbors,
            seed=settings.seed,
            title=title,
        )

    def drawn_with(told: Prompts, **changed: float) -> dict[str, float]:
        """A row of a sweep; the settings of the samples themselves are not drawn again."""
        chosen = replace(sampling, **cast(Any, changed))
        found, right = distances["samples"], scores[told.kind]["samples"]
        if chosen != sampling:
            title = ", ".join(f"{name} {value:g}" for name, value in changed.items())
            drawn = decoded(tokenizer, draw_text_samples(model, told, chosen))
            found = distances_to(real[told.kind], drawn, title)
            right = retrieved(judge, drawn, told, profile, lite0, title)
        return {
            **changed,
            "r_precision": right["r_precision"],
            **{metric: found[metric] for metric in DISTANCES},
        }

    scores: dict[str, dict[str, dict[str, Any]]] = {}
    distances: dict[str, dict[str, Any]] = {}
    sweeps: dict[str, list[dict[str, float]]] = {"top_p_sweep": [], "guidance_sweep": []}
    for told in asked:
        kind = told.kind
        images = {
            "samples": decoded(tokenizer, sampled[kind]),
            "reconstruction": reconstructed(tokenizer, told.images)[1],
            "real": told.images,
        }
        scores[kind] = {
            what: retrieved(judge, found, told, profile, lite0, f"{what}, {kind}")
            for what, found in images.items()
        }
        for what in ("samples", "reconstruction") if kind in real else ():
            distances[what] = distances_to(real[kind], images[what], what)
        for what in ("reconstruction", "real"):
            del scores[kind][what]["by_prompt"]
        if kind in real:
            distances["samples"] |= inception_scores(
                tokenizer, sampled[kind], told.images.split(PART), profile, settings.seed
            )
            sweeps["top_p_sweep"] = [
                drawn_with(told, top_p=value) for value in settings.top_p_sweep
            ]
            sweeps["guidance_sweep"] = [
                drawn_with(told, guidance=value) for value in settings.guidance_sweep
            ]
    codes, texts = load_codes(profile, variant), captioned(profile, "test")
    captions = [texts.captions[image][0] for image in codes.held_out_labels.tolist()]
    assert model.text_tokenizer is not None
    tokens = model.text_tokenizer.encode(captions, truncate=True)
    protocol = {
        **distances["samples"].pop("protocol"),
        "prompts": f"{settings.prompts} of each kind: " + "; ".join(KINDS.values()),
        "r_precision": f"right caption among {settings.candidates} of other names, by the dual encoder; intervals over names",
        "references": "the held-out images with these names",
        **sampling_protocol(sampling),
    }
    return {
        **distances["samples"],
        **{f"r_precision_{kind}": scores[kind]["samples"]["r_precision"] for kind in KINDS},
        "kinds": scores,
        "reconstruction": {k: v for k, v in distances["reconstruction"].items() if k != "protocol"},
        **held_out_nats(model, codes.held_out, tokens),
        **sweeps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "protocol": protocol,
    }


def judged_generator(
    model: AutoregressiveModel, variant: str, real: dict[str, Tensor], profile: Profile
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Codes that a model draws for the prompts of every kind, and what `evaluate_text_generator` says of them."""
    model, asked = model.to(best_device()), [prompts(profile, kind) for kind in KINDS]
    sampled = {
        told.kind: draw_text_samples(model, told, profile.sampler(variant)) for told in asked
    }
    return sampled, evaluate_text_generator(model, variant, asked, sampled, real, profile)


def text_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path = resolve(f"metrics/text/{variant}-seed{seed}.json")
    if path.exists() and (scores := read_json(path)).get("run") == _run(profile, variant, seed):
        return scores
    fetch_weights()
    model = trained_generator(profile, variant, seed).model
    return judged_generator(model, variant, real_text_features(profile), profile)[1]


def load_text_samples(profile: Profile, variant: str, seed: int, kind: str, count: int) -> Tensor:
    """Images [count, 3, H, W] sampled for the first prompts of a kind: the pipeline's of this very run, or drawn now."""
    run = CodesRun.of(profile, variant).tokenizer
    name = profile.autoregressive_variant(variant).tokenizer
    tokenizer = trained_tokenizer(profile, name, run.seed).model.to(best_device())
    path = _samples_path(variant, seed)
    if read_metadata(path).get("run") == _run(profile, variant, seed):
        return decoded(tokenizer, load_file(path)[kind][:count])
    model = trained_generator(profile, variant, seed).model.to(best_device())
    drawn = draw_text_samples(model, prompts(profile, kind), profile.sampler(variant))
    return decoded(tokenizer, drawn[:count])


def _samples_path(variant: str, seed: int) -> Path:
    return resolve(f"samples/{variant}-seed{seed}.safetensors")


def _run(profile: Profile, variant: str, seed: int) -> str:
    parts = (profile.sampler(variant), profile.text.evaluation, DualEncoderRun.of(profile))
    return digest(AutoregressiveRun.of(profile, variant, seed), *parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbook.text_evaluation", description=__doc__)
    parser.add_argument("--profile", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "real", help="features of the prompts' real images -> samples/real_text.safetensors"
    )
    judged = commands.add_parser("model", help="one model -> samples/ and metrics/text/")
    judged.add_argument("--variant", required=True)
    judged.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    profile, real = load_profile(arguments.profile), resolve("samples/real_text.safetensors")
    if arguments.command == "real":
        write_tensors(real, real_text_features(profile), {})
        return
    variant, seed = arguments.variant, arguments.seed
    model, run = (
        trained_generator(profile, variant, seed).model,
        {"run": _run(profile, variant, seed)},
    )
    sampled, scores = judged_generator(model, variant, load_file(real), profile)
    write_tensors(_samples_path(variant, seed), sampled, run)
    write_json(resolve(f"metrics/text/{variant}-seed{seed}.json"), {**run, **scores})


if __name__ == "__main__":
    command(main)
