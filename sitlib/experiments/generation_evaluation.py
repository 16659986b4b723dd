"""Judging class-conditional samples against held-out photographs: `python -m sitlib.experiments.generation_evaluation`."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.autoregressive import AutoregressiveModel
from sitlib.checkpoint import read_about, write_tensors
from sitlib.config import Profile, SamplingConfig, digest, load_profile
from sitlib.data import training_views
from sitlib.experiments.codes import Codes, held_out_wide, images_of, load_codes
from sitlib.experiments.generators import trained_generator
from sitlib.experiments.runs import AutoregressiveRun, TokenizerRun, command
from sitlib.experiments.tokenizer_evaluation import original_features
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.lite0 import Lite0, load_lite0
from sitlib.metrics import generation_metrics, lite0_features
from sitlib.paths import resolve
from sitlib.results import read_metrics, write_metrics
from sitlib.sampling import generate
from sitlib.tokenizer import SpectralTokenizer
from sitlib.weights import ensure_weights

BATCH = 64  # code maps at a time
REFERENCES = "wide held-out views of labelled photographs"
DISTANCES = ("fd_lite0", "kid", "precision", "recall")


def real_features(profile: Profile, variant: str) -> dict[str, Tensor]:
    """Lite0 features [V, 1280] of wide views of the variant's held-out photographs ("held_out") and training photographs ("train")."""
    settings, run = profile.autoregressive.evaluation, AutoregressiveRun.of(profile, variant, 0).codes
    views = settings.reference_views / len(images_of(profile, variant, "test"))
    if settings.neighbours <= views:
        raise ValueError(
            f"autoregressive.evaluation.neighbours is {settings.neighbours}, but there are {views:.0f} views of each held-out photograph: "
            "precision and recall would measure whether samples show the very same photograph. Raise it above that number."
        )
    held_out, _ = held_out_wide(profile, variant, settings.reference_views)
    photographs, size = images_of(profile, variant, "train"), run.tokenizer.data.size
    train, *_ = training_views(photographs, 0, settings.reference_views, size, settings.seed, kind="wide")
    lite0 = load_lite0()
    return {
        name: lite0_features(images, lite0, progress=True)
        for name, images in (("held_out", held_out), ("train", train))
    }


def held_out_nats(model: AutoregressiveModel, codes: Tensor, conditions: Tensor) -> dict[str, Any]:
    """Nats per token of held-out codes [V, S, N] given their conditions: a mean, and one for every scale."""
    with torch.no_grad():
        batches = zip(codes.split(BATCH), conditions.split(BATCH), strict=True)
        total = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches)
        by_scale = cast(Tensor, total) / len(codes)
    return {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}


def decoded(tokenizer: SpectralTokenizer, codes: Tensor) -> Tensor:
    """Images [M, 3, H, W] of codes [M, S, N], in batches."""
    return torch.cat([tokenizer.decode(batch) for batch in codes.split(BATCH)])


def sampled_labels(profile: Profile, count: int) -> Tensor:
    """Class ids [count] with the frequencies of the reference views, so that the mix of classes is not part of a distance to them."""
    variant = next(iter(profile.autoregressive.variants))
    _, frequencies = held_out_wide(profile, variant, profile.autoregressive.evaluation.reference_views)
    return frequencies.repeat(-(-count // len(frequencies)))[:count]


def draw_samples(
    model: AutoregressiveModel, profile: Profile, count: int, sampling: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """Codes [count, S, N] and their class ids [count], those of `sampled_labels`."""
    labels = sampled_labels(profile, count)
    return generate(model, labels, sampling, progress=f"sampling, guidance {sampling.guidance:g}"), labels


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
    """FD-Lite0, KID, precision and recall of sampled codes [M, S, N]; held-out nats per token; and a sweep of guidance weights.

    Two more distances say how to read them: "reconstruction", of held-out views after the tokenizer alone, which bounds every model over
    its codes; and "real", of views of the training photographs. All are to the same held-out views.
    """
    settings, sampling = profile.autoregressive.evaluation, profile.sampler(variant)
    distances = _distances(real["held_out"], profile, load_lite0())
    scores = distances(decoded(tokenizer, sampled))
    scores["protocol"] |= {
        "references": REFERENCES,
        **sampling_protocol(sampling),
    }
    held_out, _ = held_out_wide(profile, variant, settings.reference_views)
    bounds = {"reconstruction": tokenizer.reconstruct(held_out), "real": real["train"]}
    for name, images in bounds.items():
        scores[name] = {metric: value for metric, value in distances(images).items() if metric in DISTANCES}
    sweep = []
    for weight in settings.guidance_sweep:
        drawn, _ = draw_samples(model, profile, settings.sweep_samples, replace(sampling, guidance=weight))
        found = distances(decoded(tokenizer, drawn))
        sweep.append({"guidance": weight, **{metric: found[metric] for metric in DISTANCES}})
    return {
        **scores,
        **held_out_nats(model, codes.held_out, codes.held_out_labels),
        "guidance_sweep": sweep,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _distances(references: Tensor, profile: Profile, lite0: Lite0) -> Callable[[Tensor], dict[str, Any]]:
    """Distances of images, or of their features, to the references' features."""
    settings = profile.autoregressive.evaluation

    def distances(images: Tensor) -> dict[str, Any]:
        return generation_metrics(
            images,
            references,
            lite0=lite0,
            kid_subset_size=settings.kid_subset_size,
            neighbours=settings.neighbours,
            seed=settings.seed,
            progress=True,
        )

    return distances


def distances_to_held_out(images: Tensor, profile: Profile, variant: str) -> dict[str, Any]:
    """FD-Lite0, KID, precision and recall of images [M, 3, H, W] against held-out views, whose features are kept for the next time."""
    views, _ = held_out_wide(profile, variant, profile.autoregressive.evaluation.reference_views)
    lite0 = load_lite0()
    references = original_features(views, lite0, ["wide", len(views)], progress="originals")
    return _distances(references, profile, lite0)(images)


def generator_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path = f"metrics/generation/{variant}-seed{seed}.json"
    if resolve(path).exists() and (scores := read_metrics(path)).get("run") == _samples_run(
        profile, variant, seed
    ):
        return scores
    ensure_weights()
    model = trained_generator(profile, variant, seed).model
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


def load_samples(profile: Profile, variant: str, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images [M, 3, H, W] sampled by a variant, their class ids [M] and the names of the classes.

    The codes are the pipeline's where it has sampled this very run, else they are drawn now.
    """
    model = trained_generator(profile, variant, seed).model
    count = profile.autoregressive.evaluation.samples
    codes, labels = _pipeline_samples(profile, variant, seed) or draw_samples(
        model, profile, count, profile.sampler(variant)
    )
    return decoded(_tokenizer(profile, variant), codes), labels, model.config.classes


def _pipeline_samples(profile: Profile, variant: str, seed: int) -> tuple[Tensor, Tensor] | None:
    path = _samples_path(variant, seed)
    if read_about(path).get("run") != _samples_run(profile, variant, seed):
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
    run, tokenizer_seed = AutoregressiveRun.of(profile, variant, seed), profile.autoregressive.tokenizer_seed
    if TokenizerRun.of(profile, decoder, tokenizer_seed).codes != run.codes.tokenizer:
        raise ValueError(f"{decoder} does not decode the codes that {variant} models.")
    tokenizer = trained_tokenizer(profile, decoder, tokenizer_seed).model
    scores = _distances(references, profile, load_lite0())(decoded(tokenizer, codes))
    scores["protocol"] |= {"references": REFERENCES, **sampling_protocol(profile.sampler(variant))}
    return scores


def load_second_scores(profile: Profile, variant: str, decoder: str, seed: int) -> dict[str, Any]:
    """What the pipeline has measured of this very run with a second decoder.

    Raises:
        ValueError: it has not, or of another profile.
    """
    path = f"metrics/generation/{variant}_second-seed{seed}.json"
    if resolve(path).exists() and (scores := read_metrics(path)).get("run") == _second_run(
        profile, variant, decoder, seed
    ):
        return scores
    raise ValueError(
        f"{path} is missing or of another profile: dvc repro evaluate_second_generation makes it."
    )


def _second_run(profile: Profile, variant: str, decoder: str, seed: int) -> str:
    run = TokenizerRun.of(profile, decoder, profile.autoregressive.tokenizer_seed)
    return digest(_samples_run(profile, variant, seed), run)


def _tokenizer(profile: Profile, variant: str) -> SpectralTokenizer:
    name = profile.autoregressive_variant(variant).tokenizer
    return trained_tokenizer(profile, name, profile.generator_section(variant).tokenizer_seed).model


def _samples_path(variant: str, seed: int) -> Path:
    return resolve(f"samples/{variant}-seed{seed}.safetensors")


def _samples_run(profile: Profile, variant: str, seed: int) -> str:
    run, settings = AutoregressiveRun.of(profile, variant, seed), profile.autoregressive.evaluation
    return digest(run, profile.sampler(variant), settings)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.experiments.generation_evaluation", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("real", help="features of real views -> samples/real.safetensors")
    judged = commands.add_parser("model", help="one model -> samples/ and metrics/generation/")
    again = commands.add_parser("second", help="its samples through a second decoder -> metrics/generation/")
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
        write_metrics(f"metrics/generation/{variant}_second-seed{seed}.json", {**run, **scores})
        return
    model = trained_generator(profile, variant, seed).model
    sampled, labels = draw_samples(model, profile, settings.evaluation.samples, profile.sampler(variant))
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
    write_metrics(f"metrics/generation/{variant}-seed{seed}.json", {**run, **scores})


if __name__ == "__main__":
    command(main)
