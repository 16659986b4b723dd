"""What training does to the input of an autoregressive model so that it relies less on what may be wrong when codes are drawn."""

import numpy as np
import torch
from torch import Tensor

from sitlib.model.text import TextTokenizer


def noisy_codes(
    codes: Tensor, num_codes: int, most: float, generator: np.random.Generator
) -> Tensor:
    """Codes [B, S, N] with some replaced by random ones: of each sequence a share of its own, between 0 and `most`.

    In training a model reads the right codes, in sampling its own, and errs with growing confidence (exposure bias; Infinity flips bits of
    what it reads for the same reason, arXiv 2412.04431).
    """
    if not most:
        return codes
    share = most * torch.from_numpy(generator.random((len(codes), 1, 1)))
    is_replaced = torch.from_numpy(generator.random(codes.shape)) < share
    return torch.where(
        is_replaced, torch.from_numpy(generator.integers(num_codes, size=codes.shape)), codes
    )


def noisy_texts(
    tokens: Tensor, texts: TextTokenizer, most: int, generator: np.random.Generator
) -> Tensor:
    """Token ids [B, L] of texts with up to `most` random tokens before each, up to half as many after it, as far as L has room.

    Half of the texts stay as they are.
    """
    if not most:
        return tokens
    noisy = torch.full_like(tokens, texts.pad)
    for row, source in zip(noisy, tokens, strict=True):
        words = source[(source != texts.pad) & (source != texts.end)]
        before, after = generator.integers([most + 1, most // 2 + 1]) * (generator.random() < 0.5)
        before = min(before, len(row) - 1 - len(words))
        after = min(after, len(row) - 1 - len(words) - before)
        # Ids of words follow those of padding and end.
        random = torch.from_numpy(
            generator.integers(texts.end + 1, texts.vocabulary, size=before + after)
        )
        ids = torch.cat([random[:before], words, random[before:], words.new_tensor([texts.end])])
        row[: len(ids)] = ids
    return noisy
