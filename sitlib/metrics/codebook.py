"""Use and cost of codes [B, S, N]: usage, perplexity, bits per pixel."""

import math

import torch
from torch import Tensor


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """Occurrences of each code in each scale: int64 [S, num_codes] of codes [B, S, N]."""
    codes = codes.long().transpose(0, 1).flatten(1)  # [S, B N]
    counts = codes.new_zeros(len(codes), num_codes)
    # Unlike bincount, scatter_add_ does not wait for the GPU.
    return counts.scatter_add_(1, codes, torch.ones_like(codes))


def codebook_statistics(counts: Tensor, num_images: int, num_codebooks: int) -> dict:
    """Usage and perplexity of each codebook and each scale, from `code_counts` [S, K] of images.

    Usage is the percentage of a codebook's codes that occur; it grows with the number of images.
    Perplexity is the exponential of the entropy of code frequencies: the number of codes which,
    used evenly, would have this entropy; in [1, K].
    """

    def statistics(counts_SK: Tensor) -> dict[str, float]:
        counts_K = counts_SK.sum(dim=0)
        p = counts_K.double() / counts_K.sum()
        usage, entropy = 100 * (p > 0).double().mean(), torch.special.entr(p).sum()
        return {"usage": usage.item(), "perplexity": entropy.exp().item()}

    names = codebook_names(num_codebooks)
    book_of = [names[min(scale, num_codebooks - 1)] for scale in range(len(counts))]
    codebooks = {name: statistics(counts[[book == name for book in book_of]]) for name in names}
    scales = [
        {"scale": s + 1, "codebook": book, **statistics(counts[s : s + 1])}
        for s, book in enumerate(book_of)
    ]
    return {"codebooks": codebooks, "scales": scales, "usage_images": num_images}


def codebook_names(num_codebooks: int) -> list[str]:
    """Names of one, two, or one codebook a scale, in the order of scales."""
    if num_codebooks <= 2:
        return ["approximation", "details"][:num_codebooks]
    return ["approximation", *(f"details_{scale}" for scale in range(2, num_codebooks + 1))]


def bits_per_pixel(num_tokens: int, num_codes: int, num_pixels: int) -> float:
    """Bits per pixel of the codes of an image, without entropy coding."""
    return num_tokens * math.log2(num_codes) / num_pixels
