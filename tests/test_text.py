"""Texts as token ids that come back, and features that depend on nothing but a text."""

import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sitlib.model.block import BlockOptions
from sitlib.model.text import TextEncoder, TextTokenizer

CAPTIONS = ["a cat on a mat", "the cat sat", "A hat, a bat", "that fat rat"]
TOKENIZER = TextTokenizer.train(CAPTIONS, 280, 24)
LONG = TextTokenizer.train(CAPTIONS, 280, 400)
SMALLEST = 258  # ids: all bytes, padding, end


# -- the tokenizer ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
@example("<pad> <end> [unk] end pad")  # no characters are special
@example("\x00 漢字 ñ 👍🏽 \u200d")
def test_any_text_comes_back_normalized_with_end_and_padding(text):
    expected = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    if not expected:
        with pytest.raises(ValueError, match="is empty"):
            LONG.encode([text])
        return
    (row,) = LONG.encode([text])
    length = int((row != LONG.pad).sum())
    assert row[length - 1] == LONG.end and not row[length:].any()
    assert row[: length - 1].min() > LONG.end and row.max() < LONG.vocab_size
    assert LONG.decode(row) == LONG.decode(row.tolist()) == LONG.decode(row[: length - 1])
    assert LONG.decode(row) == expected


def test_equal_captions_give_equal_tokenizers_and_json_holds_everything():
    again = TextTokenizer.train((text for text in CAPTIONS), 280, 24)
    restored = TextTokenizer.from_json(TOKENIZER.to_json())
    assert again.to_json() == restored.to_json() == TOKENIZER.to_json()
    text = ["something ñew 漢"]
    assert torch.equal(restored.encode(text), TOKENIZER.encode(text))
    # No more ids than the captions have pairs to merge.
    assert TextTokenizer.train(["ab"], 5000, 8).vocab_size == SMALLEST + 2


def test_long_texts_may_be_cut():
    text = "q" * 24
    cut = TOKENIZER.encode(["cat", text], truncate=True)
    assert cut.shape == (2, 24) and cut[1, -1] == TOKENIZER.end
    assert TOKENIZER.decode(cut[1]) == "q" * 22
    assert torch.equal(cut[:1], TOKENIZER.encode(["cat"]))
    assert torch.equal(cut[1, :-1], LONG.encode([text])[0][:23])
    small = TextTokenizer.train(CAPTIONS, 280, 3)  # a cut character is shown as such
    assert small.decode(small.encode(["漢"], truncate=True)[0]) == "\ufffd"


REFUSALS = [
    (TextTokenizer.train, (["", "  "], 300, 8), "no caption with a word in it"),
    (TOKENIZER.encode, (["cat", "q" * 24],), "'q{24}' has 25 tokens, at most 23 are allowed"),
    (TOKENIZER.encode, (["cat", ""],), "is empty; write what the image shows"),
    (TOKENIZER.encode, (["cat", "\u3000"], True), "is empty; write what the image shows"),
    (TOKENIZER.encode, ("cat",), "must be a list of texts"),
]


@pytest.mark.parametrize(("function", "arguments", "sentence"), REFUSALS)
def test_refusals(function, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(*arguments)


# -- the encoder ------------------------------------------------------------------------------

OPTIONS = {
    "default": BlockOptions(),
    "llama": BlockOptions(norm="rms", mlp="swiglu", bias=False),
    "qk_norm": BlockOptions(qk_norm=True),
}
VOCABULARY, LONGEST = 30, 9


def encoder_of(layers=2, **options):
    torch.manual_seed(0)
    return TextEncoder(VOCABULARY, LONGEST, layers, 16, 2, **options).double().eval()


def padded(texts, length):
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])


texts = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=LONGEST)


@settings(max_examples=20, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from(list(OPTIONS)))
@torch.no_grad()
def test_a_texts_features_depend_neither_on_its_padding_nor_on_other_texts(batch, name):
    encoder, tokens = encoder_of(options=OPTIONS[name]), padded(batch, LONGEST)
    together, mask = encoder(tokens)
    assert torch.equal(mask, tokens > 0)
    for text, features in zip(batch, together, strict=True):
        alone, mask = encoder(torch.tensor([text]))
        assert mask.all()
        torch.testing.assert_close(features[: len(text)], alone[0])
    encoder.token_embedding.weight[0] += 100  # padding is never seen, to the bit
    again, _ = encoder(tokens)
    assert torch.equal(again[tokens > 0], together[tokens > 0])
    forth, back = (encoder(torch.tensor([order]))[0] for order in ([3, 5, 7], [7, 5, 3]))
    assert not torch.allclose(forth, back.flip(1))  # positions count
