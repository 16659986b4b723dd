"""Judging a tokenizer on held-out photographs: `python -m sitlib.experiments.tokenizer_evaluation`."""

import argparse
from typing import Any

import torch

from sitlib.config import Profile, load_profile
from sitlib.experiments.tokenizers import held_out_crops, trained_tokenizer
from sitlib.metrics import codebook_statistics, evaluate_reconstructions
from sitlib.results import write_metrics
from sitlib.tokenizer import SpectralTokenizer


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
