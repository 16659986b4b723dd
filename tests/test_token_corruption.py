"""Noise in what an autoregressive model reads in training: as much as said, where said, and none at 0."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.text import TextTokenizer
from sitlib.train.generator import corrupt_codes, corrupt_texts

CAPTIONS = ["a red cat", "a blue dog that sleeps", "two green birds", "a cat and a dog"]
TEXTS = TextTokenizer.train(CAPTIONS, 300, 16)


def test_no_noise_is_the_very_input():
    codes, tokens, generator = (
        torch.zeros(2, 3, 4).long(),
        TEXTS.encode(CAPTIONS),
        np.random.default_rng(0),
    )
    assert corrupt_codes(codes, 9, 0.0, generator) is codes
    assert corrupt_texts(tokens, TEXTS, 0, generator) is tokens


def test_half_of_the_codes_at_most_is_a_quarter_on_average_and_sequences_differ():
    codes = torch.full((400, 5, 16), -1)
    noisy = corrupt_codes(codes, 7, 0.5, np.random.default_rng(0))
    replaced = noisy != -1
    assert noisy[replaced].unique().tolist() == list(range(7))
    share = replaced.flatten(1).float().mean(1)
    assert (
        abs(float(share.mean()) - 0.25) < 0.02
        and float(share.max()) < 0.7
        and float(share.std()) > 0.1
    )


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
    same = (
        (corrupt_texts(tokens, TEXTS, 6, np.random.default_rng(0)) == tokens).all(1).float().mean()
    )
    assert 0.4 < float(same) < 0.7  # half of them, and those that draw no token
