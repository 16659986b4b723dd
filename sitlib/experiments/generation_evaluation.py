"""Judging samples against held-out photographs: `python -m sitlib.experiments.generation_evaluation`."""

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sitlib.autoregressive import AutoregressiveModel
from sitlib.checkpoint import read_about, write_tensors
from sitlib.config import Profile, digest, load_profile
from sitlib.data import open_images, training_views
from sitlib.experiments.codes import Codes, held_out_wide, load_codes
from sitlib.experiments.generators import trained_generator
from sitlib.experiments.runs import AutoregressiveRun, command
from sitlib.experiments.tokenizers import trained_tokenizer
from sitlib.lite0 import load_lite0
from sitlib.metrics import generation_metrics, lite0_features
from sitlib.paths import resolve
from sitlib.results import read_metrics, write_metrics
from sitlib.sampling import generate
from sitlib.tokenizer import SpectralTokenizer
from sitlib.weights import ensure_weights


def real_features(profile: Profile) -> dict[str, Tensor]:
    """Lite0 features [V, 1280] of wide views of held-out photographs ("held_out") and of training photographs ("train")."""
    settings, data = profile.autoregressive.evaluation, profile.data
    held_out, _, _ = held_out_wide(profile, settings.reference_views)
    photographs = open_images(data.source, "train").labelled()
    train, _ = training_views(photographs, 0, settings.reference_views, data.size, settings.seed, kind="wide")
    lite0 = load_lite0()
    return {
        name: lite0_features(images, lite0, progress=True)
        for name, images in (("held_out", held_out), ("train", train))
    }


def held_out_nats(model: AutoregressiveModel, codes: Codes) -> dict[str, Any]:
    """Nats per token of held-out views given their classes: a mean, and one for every scale."""
    with torch.no_grad():
        batches = zip(codes.held_out.split(64), codes.held_out_labels.split(64), strict=True)
        by_scale = sum(model.nats_per_token(*batch) * len(batch[0]) for batch in batches) / len(
            codes.held_out
        )
    return {"nats_per_token": float(by_scale.mean()), "nats_by_scale": by_scale.tolist()}


def draw_samples(model: AutoregressiveModel, profile: Profile) -> tuple[Tensor, Tensor]:
    """Codes [M, S, N] sampled under the profile's settings and their class ids [M].

    Classes have the frequencies of the reference views, so that the mix of classes is not part of a distance to them.
    """
    settings = profile.autoregressive.evaluation
    _, frequencies, _ = held_out_wide(profile, settings.reference_views)
    labels = frequencies.repeat(-(-settings.samples // len(frequencies)))[: settings.samples]
    return generate(model, labels, profile.autoregressive.sampling, progress="sampling"), labels


def evaluate_generator(
    model: AutoregressiveModel,
    tokenizer: SpectralTokenizer,
    codes: Codes,
    sampled: Tensor,
    real: dict[str, Tensor],
    profile: Profile,
) -> dict[str, Any]:
    """FD-Lite0 and KID of sampled codes [M, S, N], and held-out nats per token.

    Two more distances say how to read them: "reconstruction", of held-out views after the tokenizer alone, which bounds every model over
    its codes; and "real", of views of the training photographs. All are to the same held-out views.
    """
    settings, sampling = profile.autoregressive.evaluation, profile.autoregressive.sampling
    lite0 = load_lite0()

    def distances(images: Tensor) -> dict[str, Any]:
        return generation_metrics(
            images,
            real["held_out"],
            lite0=lite0,
            kid_subset_size=settings.kid_subset_size,
            seed=settings.seed,
            progress=True,
        )

    def decode(codes: Tensor) -> Tensor:
        return torch.cat([tokenizer.decode(batch) for batch in codes.split(64)])

    scores = distances(decode(sampled))
    scores["protocol"] |= {
        "references": "wide held-out views of labelled photographs",
        **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "guidance", "seed")},
    }
    held_out, _, _ = held_out_wide(profile, settings.reference_views)
    bounds = {"reconstruction": tokenizer.reconstruct(held_out), "real": real["train"]}
    for name, images in bounds.items():
        scores[name] = {
            metric: value for metric, value in distances(images).items() if metric in ("fd_lite0", "kid")
        }
    return {**scores, **held_out_nats(model, codes), "parameters": sum(p.numel() for p in model.parameters())}


def generator_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path = f"metrics/generation/{variant}-seed{seed}.json"
    if resolve(path).exists() and (scores := read_metrics(path)).get("run") == _samples_run(
        profile, variant, seed
    ):
        return scores
    ensure_weights()
    model = trained_generator(profile, variant, seed).model
    name = model.config.shape.tokenizer
    return evaluate_generator(
        model,
        trained_tokenizer(profile, name, seed).model,
        load_codes(profile, name, seed),
        draw_samples(model, profile)[0],
        real_features(profile),
        profile,
    )


def load_samples(profile: Profile, variant: str, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images [M, 3, H, W] sampled by a variant, their class ids [M] and the names of the classes.

    The codes are the pipeline's where it has sampled this very run, else they are drawn now.
    """
    model = trained_generator(profile, variant, seed).model
    tokenizer = trained_tokenizer(profile, model.config.shape.tokenizer, seed).model
    path = _samples_path(variant, seed)
    if read_about(path).get("run") == _samples_run(profile, variant, seed):
        tensors = load_file(path)
        codes, labels = tensors["codes"], tensors["labels"]
    else:
        codes, labels = draw_samples(model, profile)
    return torch.cat([tokenizer.decode(batch) for batch in codes.split(64)]), labels, model.config.classes


def _samples_path(variant: str, seed: int) -> Path:
    return resolve(f"samples/{variant}-seed{seed}.safetensors")


def _samples_run(profile: Profile, variant: str, seed: int) -> str:
    section = profile.autoregressive
    return digest(AutoregressiveRun.of(profile, variant, seed), section.sampling, section.evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.experiments.generation_evaluation", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("real", help="features of real views -> samples/real.safetensors")
    judged = commands.add_parser("model", help="one model -> samples/ and metrics/generation/")
    judged.add_argument("--variant", required=True)
    judged.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    profile, real = load_profile(arguments.profile), resolve("samples/real.safetensors")
    if arguments.command == "real":
        write_tensors(real, real_features(profile), {})
        return
    variant, seed = arguments.variant, arguments.seed
    model = trained_generator(profile, variant, seed).model
    tokenizer = model.config.shape.tokenizer
    sampled, labels = draw_samples(model, profile)
    write_tensors(
        _samples_path(variant, seed),
        {"codes": sampled, "labels": labels},
        {"run": _samples_run(profile, variant, seed)},
    )
    scores = evaluate_generator(
        model,
        trained_tokenizer(profile, tokenizer, seed).model,
        load_codes(profile, tokenizer, seed),
        sampled,
        load_file(real),
        profile,
    )
    run = {"run": _samples_run(profile, variant, seed)}
    write_metrics(f"metrics/generation/{variant}-seed{seed}.json", {**run, **scores})


if __name__ == "__main__":
    command(main)
