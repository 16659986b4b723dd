"""Noise in what an autoregressive model reads in training: as much as said, where said."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CAPTIONS, TEXTS

from sitlib.train.generator import corrupt_codes, corrupt_texts


def test_no_noise_is_the_very_input():
    codes, tokens, rng = torch.zeros(2, 3, 4), TEXTS.encode(CAPTIONS), np.random.default_rng(0)
    assert corrupt_codes(codes, 9, 0.0, rng) is codes
    assert corrupt_texts(tokens, TEXTS, 0, rng) is tokens


def test_half_of_the_codes_at_most_is_a_quarter_on_average_and_sequences_differ():
    codes = torch.full((400, 5, 16), -1)
    noisy = corrupt_codes(codes, 7, 0.5, np.random.default_rng(0))
    assert noisy[noisy != -1].unique().tolist() == list(range(7))
    share = (noisy != -1).flatten(1).float().mean(1)
    assert abs(share.mean() - 0.25) < 0.02 and share.max() < 0.7 and share.std() > 0.1


@settings(max_examples=60, deadline=None)
@given(most=st.integers(1, 30), seed=st.integers(0, 999))
def test_every_text_stays_whole_between_random_tokens_and_ends_once(most, seed):
    tokens = TEXTS.encode(CAPTIONS)
    noisy = corrupt_texts(tokens, TEXTS, most, np.random.default_rng(seed))
    assert noisy.shape == tokens.shape and not (noisy == TEXTS.pad).all(1).any()
    for before, after in zip(tokens.tolist(), noisy.tolist(), strict=True):
        words = before[: before.index(TEXTS.end)]
        kept = after[: after.index(TEXTS.end)]
        assert set(after[len(kept) + 1 :]) <= {TEXTS.pad} and TEXTS.pad not in kept
        starts = [i for i in range(len(kept) - len(words) + 1) if kept[i : i + len(words)] == words]
        assert starts and any(i <= most and len(kept) - len(words) - i <= most // 2 for i in starts)


def test_some_texts_get_noise_and_some_do_not():
    tokens = TEXTS.encode(CAPTIONS * 50)
    same = (corrupt_texts(tokens, TEXTS, 6, np.random.default_rng(0)) == tokens).all(1)
    assert 0.4 < float(same.float().mean()) < 0.7  # half of them, and those that draw no token
