"""Judging a tokenizer on held-out photographs: `python -m sitlib.experiments.tokenizer_evaluation`."""

import argparse
from typing import Any

import torch
from torch import Tensor

from sitlib.config import Profile, load_profile
from sitlib.experiments.tokenizers import held_out_crops, trained_tokenizer
from sitlib.metrics import codebook_statistics, evaluate_reconstructions
from sitlib.results import write_metrics
from sitlib.tokenizer import SpectralTokenizer
from sitlib.wavelets import dwt2, orthonormal_gains

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
    write_metrics(arguments.output, evaluate_tokenizer(tokenizer, profile))


if __name__ == "__main__":
    main()
