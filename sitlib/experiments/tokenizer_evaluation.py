"""Judging a tokenizer on held-out photographs: `python -m sitlib.experiments.tokenizer_evaluation`."""

import argparse
from typing import Any

import torch
from torch import Tensor

from sitlib.config import Profile, digest, load_profile
from sitlib.experiments.runs import TokenizerRun, command
from sitlib.experiments.tokenizers import held_out_crops, trained_tokenizer
from sitlib.metrics import codebook_statistics, evaluate_reconstructions
from sitlib.paths import resolve
from sitlib.results import read_metrics, write_metrics
from sitlib.tokenizer import SpectralTokenizer
from sitlib.wavelets import dwt2, orthonormal_gains
from sitlib.weights import ensure_weights

ERROR_LEVELS = 3  # scales of the error budget: those of SIT-4, for every model


def error_by_scale(images: Tensor, reconstructions: Tensor, levels: int = ERROR_LEVELS) -> list[float]:
    """Mean squared error in [-1, 1], shared out among the scales of a Haar transform, coarsest first; their sum is the whole error."""
    coefficients = dwt2(
        2 * (images - reconstructions), "haar", levels
    )  # differences double from [0, 1] to [-1, 1]
    gains = orthonormal_gains(levels)
    return [
        float((gain * x).square().sum() / images.numel()) for gain, x in zip(gains, coefficients, strict=True)
    ]


def evaluate_tokenizer(tokenizer: SpectralTokenizer, profile: Profile) -> dict[str, Any]:
    """PSNR, LPIPS and codebook use on held-out crops, with the protocol.

    `usage` is the share in % of codes used at least once by the evaluation crops, of the codebook that uses the smallest share.
    """
    images, keys = held_out_crops(profile)
    codes = torch.cat([tokenizer.encode(batch) for batch in images.split(64)])
    reconstructions = torch.cat([tokenizer.decode(batch) for batch in codes.split(64)])
    scores = evaluate_reconstructions(images, reconstructions, progress=True)
    del scores["standard_error"]  # of independent images; these crops share photographs
    scores["protocol"] |= {
        "views": f"random crops of {len(set(keys))} held-out photographs",
        "source": profile.data.source,
        "seed": profile.tokenizer.evaluation.seed,
    }
    statistics = codebook_statistics(codes, tokenizer.config.num_codes)
    scores["error_by_scale"] = error_by_scale(images, reconstructions)
    usage = min(book["usage"] for book in statistics["codebooks"].values())
    return {
        **scores,
        "usage": usage,
        **statistics,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
    }


def tokenizer_scores(profile: Profile, variant: str, seed: int) -> dict[str, Any]:
    """The pipeline's scores of this very run, or else scores that are measured now."""
    path, run = f"metrics/tokenizer/{variant}-seed{seed}.json", _run(profile, variant, seed)
    if resolve(path).exists() and (scores := read_metrics(path)).get("run") == run:
        return scores
    ensure_weights()
    return evaluate_tokenizer(trained_tokenizer(profile, variant, seed).model, profile)


def _run(profile: Profile, variant: str, seed: int) -> str:
    return digest(TokenizerRun.of(profile, variant, seed), profile.tokenizer.evaluation)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sitlib.experiments.tokenizer_evaluation", description=__doc__
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", required=True, help="metrics file to write")
    arguments = parser.parse_args()
    profile = load_profile(arguments.profile)
    tokenizer = trained_tokenizer(profile, arguments.variant, arguments.seed).model
    run = {"run": _run(profile, arguments.variant, arguments.seed)}
    write_metrics(arguments.output, {**run, **evaluate_tokenizer(tokenizer, profile)})


if __name__ == "__main__":
    command(main)
