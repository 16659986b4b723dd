"""Judging class-conditional samples against held-out photographs: `python -m workbook.generation_evaluation`.

Of large sets only features and codes are in memory, and `PART` images at a time.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.data import held_out_positions, training_views
from sitlib.files import read_json, read_metadata, write_json, write_tensors
from sitlib.metrics import InceptionMetrics, generation_metrics, lite0_features
from sitlib.metrics.networks import Lite0, load_lite0
from sitlib.metrics.weights import fetch_weights
from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.precision import best_device
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample.generate import generate
from sitlib.strict import digest
from workbook.codes import Codes, held_out_wide, images_of, load_codes
from workbook.generators import trained_generator
from workbook.paths import resolve
from workbook.profile import Profile, load_profile
from workbook.runs import AutoregressiveRun, CodesRun, TokenizerRun, command
from workbook.tokenizer_evaluation import PART, original_features, reconstructed
from workbook.tokenizers import trained_tokenizer

BATCH = 64  # code maps at a time
REFERENCES = "wide held-out views of labelled photographs"
DISTANCES = ("fd_lite0", "kid", "precision", "recall")


def real_features(profile: Profile, variant: str) -> dict[str, Tensor]:
    """Lite0 features [V, 1280] of wide views of the variant's held-out photographs ("held_out") and training photographs ("train")."""
    settings, run = (
        profile.autoregressive.evaluation,
        AutoregressiveRun.of(profile, variant, 0).codes,
    )
    views = settings.reference_views / len(images_of(profile, variant, "test"))
    if settings.neighbors <= views:
        raise ValueError(
            f"autoregressive.evaluation.neighbors is {settings.neighbors}, but there are {views:.0f} views of each held-out photograph: "
            "precision and recall would measure whether samples show the very same photograph. Raise it above that number."
        )
    photographs, size = images_of(profile, variant, "train"), run.tokenizer.data.size
    lite0 = load_lite0().to(best_device())

    def train(start: int, count: int) -> Tensor:
        views, *_ = training_views(
            photographs, start // PART, PART, size, settings.seed, kind="wide"
        )
        return views[:count]

    def held_out(start: int, count: int) -> Tensor:
        return held_out_wide(profile, variant, count, start)[0]

    return {
        name: torch.cat(
            [lite0_features(part(*where), lite0, title=name) for where in _parts(profile)]
        )
        for name, part in (("held_out", held_out), ("train", train))
    }


def _parts(profile: Profile) -> list[tuple[int, int]]:
    """The first of the reference views, and how many, for every part."""
    total = profile.autoregressive.evaluation.reference_views
    return [(start, min(PART, total - start)) for start in range(0, total, PART)]


def _views(profile: Profile, variant: str) -> Iterator[Tensor]:
    """The reference views, in parts [P, 3, H, W]."""
    return (held_out_wide(profile, variant, count, start)[0] for start, count in _parts(profile))


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats per token of held-out codes [V, S, N] given their conditions: a mean, and one for every scale."""
    device = next(model.parameters()).device
    with torch.no_grad():
        batches = zip(
            codes.to(device).split(BATCH), conditions.to(device).split(BATCH), strict=True
        )
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
        by_scale = cast(Tensor, total) / len(codes)
    return {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}


def decoded(tokenizer: SpectralTokenizer, codes: Tensor) -> Tensor:
    """Images [M, 3, H, W], on the CPU, of codes [M, S, N]."""
    return torch.cat([tokenizer.decode(batch).cpu() for batch in codes.split(BATCH)])


def decoded_features(tokenizer: SpectralTokenizer, codes: Tensor, lite0: Lite0) -> Tensor:
    """Lite0 features [M, 1280] of the images of codes [M, S, N]."""
    parts = codes.split(PART)
    return torch.cat(
        [lite0_features(decoded(tokenizer, part), lite0, title="samples") for part in parts]
    )


def inception_scores(
    tokenizer: SpectralTokenizer,
    codes: Tensor,
    originals: Iterable[Tensor],
    profile: Profile,
    seed: int,
) -> dict[str, float]:
    """The standard `fid`, `inception_score` and `inception_score_originals` of the images of codes [M, S, N] against originals, parts of
    [V, 3, H, W] in [0, 1]; nothing if the profile does not ask for them (`tokenizer.evaluation.inception`)."""
    if not profile.tokenizer.evaluation.inception:
        return {}
    inception = InceptionMetrics()
    for part in codes.split(PART):
        inception.add(decoded(tokenizer, part), real=False, title="samples")
    for part in originals:
        inception.add(part, real=True, title="originals")
    return inception.compute(seed=seed)


def sampled_labels(profile: Profile, count: int) -> Tensor:
    """Class ids [count] with the frequencies of the reference views, so that the mix of classes is not part of a distance to them."""
    variant = next(iter(profile.autoregressive.variants))
    images, seed = images_of(profile, variant, "test"), CodesRun.of(profile, variant).codes.seed
    views = held_out_positions(images, profile.autoregressive.evaluation.reference_views, seed)
    frequencies = images.labels[views]
    return frequencies.repeat(-(-count // len(frequencies)))[:count]


def draw_samples(
    model: AutoregressiveModel, profile: Profile, count: int, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Codes [count, S, N] and their class ids [count], those of `sampled_labels`, both on the CPU."""
    labels = sampled_labels(profile, count)
    title = f"sampling, guidance {sampling.guidance:g}, top-p {sampling.top_p:g}"
    return generate(model, labels, sampling, progress=title).cpu(), labels


def sampling_protocol(sampling: SamplingConfig) -> dict[str, Any]:
    """How samples were drawn, for a protocol."""
    names = ("temperature", "top_k", "top_p", "min_p", "guidance", "guidance_growth", "seed")
    return {name: getattr(sampling, name) for name in names}


def evaluate_generator(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    codes: Codes,
    sampled: Tensor,
    real: dict[str, Tensor],
    profile: Profile,
    variant: str,
) -> dict[str, Any]:
    """FD-Lite0, KID, precision and recall of sampled codes [M, S, N]; held-out nats per token; and sweeps of guidance and of top-p; with
    `tokenizer.evaluation.inception` also FID and Inception score.

    Two more distances say how to read them: "reconstruction", of held-out views after the tokenizer alone, what a model that knew the
    right codes would have (not a bound: without details an image can be nearer); and "real", of views of the training photographs. All
    are to the same held-out views. Of a sweep only one thing differs from how `sampled` was drawn.
    """
    settings, sampling = profile.autoregressive.evaluation, profile.sampler(variant)
    lite0 = load_lite0().to(best_device())
    distances = _distances(real["held_out"], profile, lite0)
    scores = distances(decoded_features(tokenizer, sampled, lite0))
    scores["protocol"] |= {
        "references": REFERENCES,
        **sampling_protocol(sampling),
    }
    scores |= inception_scores(tokenizer, sampled, _views(profile, variant), profile, settings.seed)
    reconstructions = [
        lite0_features(reconstructed(tokenizer, part)[1], lite0, title="reconstructions")
        for part in _views(profile, variant)
    ]
    for name, features in (("reconstruction", torch.cat(reconstructions)), ("real", real["train"])):
        scores[name] = {
            metric: value for metric, value in distances(features).items() if metric in DISTANCES
        }

    def drawn_with(**changed: float) -> dict[str, float]:
        """A row of a sweep."""
        chosen, found = replace(sampling, **cast(Any, changed)), scores
        if chosen != sampling or settings.sweep_samples != len(sampled):
            drawn, _ = draw_samples(model, profile, settings.sweep_samples, chosen)
            found = distances(decoded_features(tokenizer, drawn, lite0))
        return {**changed, **{metric: found[metric] for metric in DISTANCES}}

    return {
        **scores,
        **held_out_nats(model, codes.held_out, codes.held_out_labels),
        "guidance_sweep": [drawn_with(guidance=weight) for weight in settings.guidance_sweep],
        "top_p_sweep": [drawn_with(top_p=top_p) for top_p in settings.top_p_sweep],
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _distances(
    references: Tensor, profile: Profile, lite0: Lite0
) -> Callable[[Tensor], dict[str, Any]]:
    """Distances of images, or of their features, to the references' features."""
    settings = profile.autoregressive.evaluation

    def distances(images: Tensor) -> dict[str, Any]:
        return generation_metrics(
            images,
            references,
            lite0=lite0,
            kid_subset_size=settings.kid_subset_size,
            neighbors=settings.neighbors,
            seed=settings.seed,
            title="samples",
        )

    return distances


def distances_to_held_out(images: Tensor, profile: Profile, variant: str) -> dict[str, Any]:
    """FD-Lite0, KID, precision and recall of images [M, 3, H, W] against held-out views, whose features are kept for the next time."""
    views, _ = held_out_wide(profile, variant, profile.autoregressive.evaluation.reference_views)
    lite0 = load_lite0().to(best_device())
    references = original_features(views, lite0, ["wide", len(views)], title="originals")
    return _distances(references, profile, lite0)(images)


def generator_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path = resolve(f"metrics/generation/{variant}-seed{seed}.json")
    if path.exists() and (scores := read_json(path)).get("run") == _samples_run(
        profile, variant, seed
    ):
        return scores
    fetch_weights()
    model = _model(profile, variant, seed)
    sampled, _ = _pipeline_samples(profile, variant, seed) or draw_samples(
        model, profile, profile.autoregressive.evaluation.samples, profile.sampler(variant)
    )
    return evaluate_generator(
        model,
        _tokenizer(profile, variant),
        load_codes(profile, variant),
        sampled,
        real_features(profile, variant),
        profile,
        variant,
    )


def load_samples(profile: Profile, variant: str, seed: int, each: int) -> dict[str, Tensor]:
    """Class -> the first images [each, 3, H, W] of it that a variant has sampled, of the classes of which there are as many.

    The codes are the pipeline's where it has sampled this very run, else they are drawn now.
    """
    model = _model(profile, variant, seed)
    count = profile.autoregressive.evaluation.samples
    codes, labels = _pipeline_samples(profile, variant, seed) or draw_samples(
        model, profile, count, profile.sampler(variant)
    )
    tokenizer = _tokenizer(profile, variant)
    of_class = {name: codes[labels == index] for index, name in enumerate(model.config.classes)}
    return {
        name: decoded(tokenizer, own[:each]) for name, own in of_class.items() if len(own) >= each
    }


def _pipeline_samples(profile: Profile, variant: str, seed: int) -> tuple[Tensor, Tensor] | None:
    path = _samples_path(variant, seed)
    if read_metadata(path).get("run") != _samples_run(profile, variant, seed):
        return None
    tensors = load_file(path)
    return tensors["codes"], tensors["labels"]


def second_decoder_scores(
    profile: Profile, variant: str, decoder: str, seed: int, codes: Tensor, references: Tensor
) -> dict[str, Any]:
    """Distances of sampled codes [M, S, N] of a variant, decoded by `decoder`, a tokenizer variant that has taken its codes over.

    Raises:
        ValueError: `decoder` decodes other codes.
    """
    run, tokenizer_seed = (
        AutoregressiveRun.of(profile, variant, seed),
        profile.autoregressive.tokenizer_seed,
    )
    if TokenizerRun.of(profile, decoder, tokenizer_seed).codes != run.codes.tokenizer:
        raise ValueError(f"{decoder} does not decode the codes that {variant} models.")
    tokenizer = trained_tokenizer(profile, decoder, tokenizer_seed).model.to(best_device())
    lite0 = load_lite0().to(best_device())
    scores = _distances(references, profile, lite0)(decoded_features(tokenizer, codes, lite0))
    scores["protocol"] |= {"references": REFERENCES, **sampling_protocol(profile.sampler(variant))}
    evaluation_seed = profile.autoregressive.evaluation.seed
    return scores | inception_scores(
        tokenizer, codes, _views(profile, variant), profile, evaluation_seed
    )


def load_second_scores(profile: Profile, variant: str, decoder: str, seed: int) -> dict[str, Any]:
    """What the pipeline has measured of this very run with a second decoder.

    Raises:
        ValueError: it has not, or of another profile.
    """
    path = resolve(f"metrics/generation/{variant}_second-seed{seed}.json")
    if path.exists() and (scores := read_json(path)).get("run") == _second_run(
        profile, variant, decoder, seed
    ):
        return scores
    raise ValueError(f"{path} is missing or of another profile: dvc repro decode_again makes it.")


def _second_run(profile: Profile, variant: str, decoder: str, seed: int) -> str:
    run = TokenizerRun.of(profile, decoder, profile.autoregressive.tokenizer_seed)
    return digest(_samples_run(profile, variant, seed), run)


def _model(profile: Profile, variant: str, seed: int) -> AutoregressiveModel:
    return trained_generator(profile, variant, seed).model.to(best_device())


def _tokenizer(profile: Profile, variant: str) -> SpectralTokenizer:
    name, seed = (
        profile.autoregressive_variant(variant).tokenizer,
        profile.generator_section(variant).tokenizer_seed,
    )
    return trained_tokenizer(profile, name, seed).model.to(best_device())


def _samples_path(variant: str, seed: int) -> Path:
    return resolve(f"samples/{variant}-seed{seed}.safetensors")


def _samples_run(profile: Profile, variant: str, seed: int) -> str:
    run, settings = AutoregressiveRun.of(profile, variant, seed), profile.autoregressive.evaluation
    return digest(run, profile.sampler(variant), settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m workbook.generation_evaluation", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("real", help="features of real views -> samples/real.safetensors")
    judged = commands.add_parser("model", help="one model -> samples/ and metrics/generation/")
    again = commands.add_parser(
        "second", help="its samples through a second decoder -> metrics/generation/"
    )
    again.add_argument("--decoder", required=True, help="tokenizer variant")
    for subcommand in (judged, again):
        subcommand.add_argument("--variant", required=True)
        subcommand.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    profile, real = load_profile(arguments.profile), resolve("samples/real.safetensors")
    settings = profile.autoregressive
    if arguments.command == "real":
        write_tensors(real, real_features(profile, next(iter(settings.variants))), {})
        return
    variant, seed = arguments.variant, arguments.seed
    run, features = {"run": _samples_run(profile, variant, seed)}, load_file(real)
    if arguments.command == "second":
        sampled = _pipeline_samples(profile, variant, seed)
        if sampled is None:
            raise ValueError(
                f"there are no samples of {variant}, seed {seed}, of this profile: draw them first."
            )
        scores = second_decoder_scores(
            profile, variant, arguments.decoder, seed, sampled[0], features["held_out"]
        )
        run = {"run": _second_run(profile, variant, arguments.decoder, seed)}
        write_json(
            resolve(f"metrics/generation/{variant}_second-seed{seed}.json"), {**run, **scores}
        )
        return
    model = _model(profile, variant, seed)
    sampled, labels = draw_samples(
        model, profile, settings.evaluation.samples, profile.sampler(variant)
    )
    write_tensors(_samples_path(variant, seed), {"codes": sampled, "labels": labels}, run)
    scores = evaluate_generator(
        model,
        _tokenizer(profile, variant),
        load_codes(profile, variant),
        sampled,
        features,
        profile,
        variant,
    )
    write_json(resolve(f"metrics/generation/{variant}-seed{seed}.json"), {**run, **scores})


if __name__ == "__main__":
    command(main)
