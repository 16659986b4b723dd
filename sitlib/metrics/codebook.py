"""Use and cost of codes [B, S, N]: usage, perplexity."""

import torch
from torch import Tensor

from sitlib.model.config import TokenizerConfig


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """Occurrences of each code in each scale: int64 [S, num_codes] of codes [B, S, N]."""
    codes = codes.long().transpose(0, 1).flatten(1)  # [S, B N]
    counts = codes.new_zeros(len(codes), num_codes)
    # Unlike bincount, scatter_add_ does not wait for the GPU.
    return counts.scatter_add_(1, codes, torch.ones_like(codes))


def codebook_statistics(counts: Tensor, num_images: int, config: TokenizerConfig) -> dict:
    """Usage and perplexity of each codebook and each scale, from `code_counts` [S, K] of images.

    Usage is the percentage of a codebook's codes that occur; it grows with the number of images.
    Perplexity is the exponential of the entropy of code frequencies: the number of codes which,
    used evenly, would have this entropy; in [1, K].
    """

    sizes = config.codebook_sizes

    def statistics(*scales: int) -> dict[str, float]:
        counts_K = counts[list(scales), : sizes[scales[0]]].sum(dim=0)
        p = counts_K.double() / counts_K.sum()
        usage, entropy = 100 * (p > 0).double().mean(), torch.special.entr(p).sum()
        return {"usage": usage.item(), "perplexity": entropy.exp().item()}

    names = codebook_names(min(config.num_codebooks, config.num_scales))
    book_of = [names[book] for book in config.codebook_of[: len(counts)]]
    codebooks = {
        name: statistics(*(s for s, book in enumerate(book_of) if book == name)) for name in names
    }
    scales = [{"scale": s + 1, "codebook": book, **statistics(s)} for s, book in enumerate(book_of)]
    return {"codebooks": codebooks, "scales": scales, "usage_images": num_images}


def coded_bits(codes: Tensor, counts: Tensor, config: TokenizerConfig) -> float:
    """Bits of an image's codes after entropy coding, the mean of codes [B, S, N].

    A code takes -log2 of its frequency in its scale, from the `code_counts` [S, K] of other images,
    to which half an occurrence is added.
    """
    bits = 0.0
    for of_scale, counts_K, K in zip(codes.unbind(1), counts, config.codebook_sizes, strict=True):
        p = counts_K[:K].double() + 0.5
        bits -= (p / p.sum()).log2()[of_scale.long()].sum().item()
    return bits / len(codes)


def codebook_names(num_codebooks: int) -> list[str]:
    """Names of one, two, or one codebook a scale, in the order of scales."""
    if num_codebooks <= 2:
        return ["approximation", "details"][:num_codebooks]
    return ["approximation", *(f"details_{scale}" for scale in range(2, num_codebooks + 1))]
