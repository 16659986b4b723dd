"""Corruption of what a generator reads in training, never of what it predicts."""

import numpy as np
import torch
from torch import Tensor

from sitlib.model.text import TextTokenizer


def corrupt_codes(
    codes: Tensor, num_codes: int, max_share: float, rng: np.random.Generator
) -> Tensor:
    """Codes [B, S, N] with some replaced by random ones.

    Each sequence draws its own share in [0, max_share). In training a model reads the right codes,
    in sampling its own (exposure bias); Infinity flips bits for that reason (arXiv 2412.04431).
    """
    if not max_share:
        return codes
    share_B11 = max_share * torch.from_numpy(rng.random((len(codes), 1, 1)))
    is_replaced = torch.from_numpy(rng.random(codes.shape)) < share_B11
    random_codes = torch.from_numpy(rng.integers(num_codes, size=codes.shape))
    return torch.where(is_replaced, random_codes, codes)


def corrupt_texts(
    tokens: Tensor, texts: TextTokenizer, max_tokens: int, rng: np.random.Generator
) -> Tensor:
    """Token ids [B, L] of texts; half of them get random tokens around their words.

    Up to `max_tokens` before a text and half as many after it, as far as L has room.
    """
    if not max_tokens:
        return tokens
    corrupted = torch.full_like(tokens, texts.pad)
    for row, source in zip(corrupted, tokens, strict=True):
        words = source[(source != texts.pad) & (source != texts.end)]
        before, after = rng.integers([max_tokens + 1, max_tokens // 2 + 1]) * (rng.random() < 0.5)
        before = min(before, len(row) - 1 - len(words))
        after = min(after, len(row) - 1 - len(words) - before)
        # Ids of words follow those of padding and end.
        random_ids = rng.integers(texts.end + 1, texts.vocab_size, size=before + after)
        noise = torch.from_numpy(random_ids)
        ids = torch.cat([noise[:before], words, noise[before:], words.new_tensor([texts.end])])
        row[: len(ids)] = ids
    return corrupted
