"""Use and cost of codes [B, S, N]: usage, perplexity, bits per pixel."""

import math

import torch
from torch import Tensor


def codebook_statistics(codes: Tensor, num_codes: int, *, num_codebooks: int | None = None) -> dict:
    """Usage and perplexity of each codebook and each scale, over the codes of some images.

    Usage is the percentage of a codebook's codes that occur at least once. It grows with the number
    of images: ViT-VQGAN (arXiv 2110.04627) reports it for 256 test images. Perplexity is the
    exponential of the entropy of the code frequencies: the number of codes which, used evenly,
    would have this entropy; in [1, num_codes].

    Args:
        codes: int64 [B, S, N] in [0, num_codes).
        num_codebooks: 1 (all scales share it), 2 ("approximation" of scale 1, "details" of all
            others) or S ("approximation", "details_2", ...). Default: 1 for one scale, else 2.

    Returns:
        `codebooks` (name -> `usage`, `perplexity`), `scales` (list of `scale`, `codebook`, `usage`,
        `perplexity`) and `usage_images` (B).

    Raises:
        ValueError: the codes are not such integers, or these scales cannot have so many codebooks.
    """
    if codes.ndim != 3 or codes.is_floating_point() or codes.numel() == 0:
        raise ValueError(f"codes must be integers [B, S, N], not {codes.dtype} {codes.shape}.")
    codes = codes.long()
    if codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(f"codes must lie in [0, {num_codes}).")
    counts_SK = code_counts(codes, num_codes)
    return statistics_of_counts(counts_SK, len(codes), num_codebooks=num_codebooks)


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """Occurrences of each code in each scale: int64 [S, num_codes] of codes [B, S, N]."""
    codes = codes.long().transpose(0, 1).flatten(1)  # [S, B N]
    counts = codes.new_zeros(len(codes), num_codes)
    # Unlike bincount, scatter_add_ does not wait for the GPU.
    return counts.scatter_add_(1, codes, torch.ones_like(codes))


def statistics_of_counts(
    counts: Tensor, num_images: int, *, num_codebooks: int | None = None
) -> dict:
    """`codebook_statistics` from the `code_counts` [S, num_codes] of `num_images` images."""
    num_scales = len(counts)
    num_codebooks = num_codebooks or min(2, num_scales)
    if num_codebooks not in (1, 2, num_scales) or num_codebooks > num_scales:
        raise ValueError(f"{num_scales} scales cannot have {num_codebooks} codebooks.")

    def statistics(counts_SK: Tensor) -> dict[str, float]:
        counts_K = counts_SK.sum(dim=0)
        p = counts_K.double() / counts_K.sum()
        return {
            "usage": 100 * (p > 0).double().mean().item(),
            "perplexity": torch.special.entr(p).sum().exp().item(),
        }

    names = codebook_names(num_codebooks)
    book_of = [min(scale, num_codebooks - 1) for scale in range(num_scales)]
    return {
        "codebooks": {
            name: statistics(counts[torch.tensor(book_of) == book])
            for book, name in enumerate(names)
        },
        "scales": [
            {"scale": s + 1, "codebook": names[book], **statistics(counts[s : s + 1])}
            for s, book in enumerate(book_of)
        ],
        "usage_images": num_images,
    }


def codebook_names(num_codebooks: int) -> list[str]:
    """Names of one, two, or one codebook a scale, in the order of scales."""
    if num_codebooks <= 2:
        return ["approximation", "details"][:num_codebooks]
    return ["approximation", *(f"details_{scale}" for scale in range(2, num_codebooks + 1))]


def bits_per_pixel(num_tokens: int, num_codes: int, size: int) -> float:
    """Bits per pixel of codes of an image of `size` x `size` px, without entropy coding."""
    return num_tokens * math.log2(num_codes) / size**2
