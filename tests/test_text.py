"""Texts: token ids against byte pair encoding by hand, and the encoder against torch's own."""

import json
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.model.block import BlockOptions
from sitlib.model.text import TextEncoder, TextTokenizer

CAPTIONS = ["a cat on a mat", "the cat sat", "A hat, a bat", "that fat rat"]
TOKENIZER = TextTokenizer.train(CAPTIONS, 280, 24)
LONG = TextTokenizer.train(CAPTIONS, 280, 400)
SPACE = "Ġ"  # how byte-level encodings write a space
SMALLEST = 258  # ids: all bytes, padding, end


def words(caption):
    """Units of merging: for lower-case ASCII letters, the words with the space before each."""
    return [SPACE + word for word in caption.split()]


def joined(symbols, pair):
    """One pass from left to right; a symbol that was just made takes in no third one."""
    result, place = [], 0
    while place < len(symbols):
        length = 2 if tuple(symbols[place : place + 2]) == pair else 1
        result.append("".join(symbols[place : place + length]))
        place += length
    return result


def learned_by_hand(captions, count):
    """Textbook BPE: merge the most frequent pair, of equals the one with the lowest ids."""
    frequency = Counter(word for caption in captions for word in words(caption))
    symbols_of = {word: list(word) for word in frequency}
    alphabet = sorted(SPACE + "abcdefghijklmnopqrstuvwxyz")  # ids follow the order of characters
    number_of = {letter: number for number, letter in enumerate(alphabet)}
    learned = []
    while len(learned) < count:
        pairs = Counter()
        for word, times in frequency.items():
            for pair in pairwise(symbols_of[word]):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], number_of[pair[0]], number_of[pair[1]]))
        learned.append(best)
        number_of.setdefault("".join(best), len(number_of))
        symbols_of = {word: joined(symbols, best) for word, symbols in symbols_of.items()}
    return learned


# -- the tokenizer ----------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("abc ", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=6))
def test_merges_and_ids_are_those_of_textbook_bpe(captions):
    tokenizer = TextTokenizer.train(captions, SMALLEST + 6, 200)
    by_hand = learned_by_hand(captions, 6)
    model = json.loads(tokenizer.to_json())["tokenizer"]["model"]
    assert [tuple(pair) for pair in model["merges"]] == by_hand
    assert tokenizer.vocab_size == SMALLEST + len(by_hand)
    for caption in captions:
        expected = []
        for word in words(caption):
            symbols = list(word)
            for pair in by_hand:
                symbols = joined(symbols, pair)
            expected += [model["vocab"][symbol] + 2 for symbol in symbols]
        row = tokenizer.encode([caption])[0].tolist()
        length = len(expected)
        assert row[: length + 1] == [*expected, 1] and not any(row[length + 1 :])


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
    (TextTokenizer.train, ([], 300, 8), "no caption with a word in it"),
    (TextTokenizer.train, (["", "  "], 300, 8), "no caption with a word in it"),
    (TOKENIZER.encode, (["cat", "q" * 24],), "'q{24}' has 25 tokens, at most 23 are allowed"),
    (TOKENIZER.encode, (["q" * 100],), "'q{60}' has 101 tokens"),
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


@torch.no_grad()
def test_it_is_a_transformer_encoder_of_torch():
    encoder = encoder_of(layers=3)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = nn.TransformerEncoderLayer(
        16, 2, 64, 0.0, activation="gelu", batch_first=True, norm_first=True, dtype=torch.float64
    )
    reference = nn.TransformerEncoder(layer, 3, nn.LayerNorm(16, dtype=torch.float64), False).eval()
    for ours, theirs in zip(encoder.transformer.blocks, reference.layers, strict=True):
        theirs.self_attn.in_proj_weight.copy_(ours.qkv[0].weight)
        theirs.self_attn.in_proj_bias.copy_(ours.qkv[0].bias)
        theirs.self_attn.out_proj.load_state_dict(ours.attention_out.state_dict())
        theirs.linear1.load_state_dict(ours.mlp_in[0].state_dict())
        theirs.linear2.load_state_dict(ours.mlp_out[0].state_dict())
        theirs.norm1.load_state_dict(ours.attention_norm[0].state_dict())
        theirs.norm2.load_state_dict(ours.mlp_norm[0].state_dict())
    reference.norm.load_state_dict(encoder.transformer.norm.state_dict())
    tokens = padded([[5, 9, 2, 7], [3], [1, 1, 1, 2, 3, 4]], 6)
    embedded = encoder.token_embedding.weight[tokens] + encoder.position_embedding.weight[:6]
    features, mask = encoder(tokens)
    expected = reference(embedded, src_key_padding_mask=tokens == 0)
    torch.testing.assert_close(features[mask], expected[mask])
