"""How codes are used, and what they cost: usage, perplexity, bits per pixel. Codes are int64 `[B, S, N]`."""

import math

import torch
from torch import Tensor


def codebook_statistics(codes: Tensor, num_codes: int, *, num_codebooks: int | None = None) -> dict:
    """How much of each codebook the codes of given images use, by codebook and by scale.

    Usage is the percentage of a codebook's codes that occur at least once among the codes of the images
    given; ViT-VQGAN (arXiv 2110.04627) reports it for a batch of 256 test images, so it depends on
    `usage_images`. Perplexity is exp of the entropy of the code frequencies, in nats: the number of codes
    that would give this entropy if used evenly; between 1 and `num_codes`.

    Args:
        codes: int64 `[B, S, N]`.
        num_codes: codes in each codebook.
        num_codebooks: 1: all scales share the only one; 2: "approximation" of scale 1, "details" of all others; S: one for each scale,
            "approximation", "details_2" ... Default: 1 for a single scale, else 2.

    Returns `codebooks` (name -> `usage`, `perplexity`), `scales` (a list: `scale`, `codebook`, `usage`,
    `perplexity`) and `usage_images` (B). Raises `ValueError` if codes are not `[B, S, N]` integers in [0,
    num_codes).
    """
    if codes.ndim != 3 or codes.is_floating_point() or codes.numel() == 0:
        raise ValueError(
            f"codes must be a non-empty integer tensor [B, S, N], not {codes.dtype} {list(codes.shape)}."
        )
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(
            f"codes must lie in [0, {num_codes}); found {codes.min().item()} to {codes.max().item()}."
        )
    return statistics_of_counts(
        code_counts(codes, num_codes), len(codes), num_codebooks=num_codebooks
    )


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs in each scale: int64 [S, num_codes] of codes [B, S, N]. On a GPU nothing has to be waited for."""
    by_scale = codes.long().transpose(0, 1).flatten(1)
    counts = by_scale.new_zeros(len(by_scale), num_codes)
    return counts.scatter_add_(1, by_scale, torch.ones_like(by_scale))


def statistics_of_counts(
    counts: Tensor, num_images: int, *, num_codebooks: int | None = None
) -> dict:
    """What `codebook_statistics` says of codes, from their `code_counts` [S, num_codes] over `num_images` images.

    Raises:
        ValueError: a number of codebooks that these scales cannot have.
    """
    num_scales = len(counts)
    if num_codebooks is None:
        num_codebooks = 1 if num_scales == 1 else 2
    if num_codebooks not in (1, 2, num_scales) or num_codebooks > num_scales:
        possible = sorted({1, min(2, num_scales), num_scales})
        raise ValueError(
            f"{num_scales} scales have {' or '.join(map(str, possible))} codebooks, not {num_codebooks}."
        )

    def statistics(of_scales: Tensor) -> dict[str, float]:
        count = of_scales.sum(dim=0)
        share = count.double() / count.sum()
        return {
            "usage": 100 * (share > 0).double().mean().item(),
            "perplexity": torch.special.entr(share).sum().exp().item(),
        }

    books = codebook_names(num_codebooks)
    names = books + books[-1:] * (num_scales - len(books))  # of every scale
    codebooks = {
        name: counts[names.index(name) : num_scales - names[::-1].index(name)]
        for name in dict.fromkeys(names)
    }
    scales = [
        {"scale": i + 1, "codebook": name, **statistics(counts[i : i + 1])}
        for i, name in enumerate(names)
    ]
    return {
        "codebooks": {name: statistics(part) for name, part in codebooks.items()},
        "scales": scales,
        "usage_images": num_images,
    }


def codebook_names(num_codebooks: int) -> list[str]:
    """Names of one, two, or as many codebooks as scales, in the order of the scales that use them."""
    if num_codebooks <= 2:
        return ["approximation", "details"][:num_codebooks]
    return ["approximation", *(f"details_{scale}" for scale in range(2, num_codebooks + 1))]


def bits_per_pixel(num_tokens: int, num_codes: int, size: int | tuple[int, int]) -> float:
    """Bits per pixel of `num_tokens` codes out of `num_codes`, without entropy coding; image of `size` px."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(num_tokens, num_codes, height, width) < 1:
        raise ValueError("num_tokens, num_codes and size must be at least 1.")
    return num_tokens * math.log2(num_codes) / (height * width)
