"""The text encoder: what its features may depend on, and torch's own layers as a reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sitlib.model.sequence import BlockOptions
from sitlib.model.text import TextEncoder, TextTokenizer

OPTIONS = {
    "default": BlockOptions(),
    "llama": BlockOptions(norm="rms", mlp="swiglu", bias=False),
    "qk_norm": BlockOptions(qk_norm=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
VOCABULARY, LONGEST = 30, 9


def encoder_of(options=None, layers=2, dtype=torch.float64):
    torch.manual_seed(0)
    return TextEncoder(VOCABULARY, LONGEST, layers, 16, 2, options=options).to(dtype).eval()


def padded(texts, length=None):
    length = length or max(map(len, texts))
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])


texts = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=LONGEST)
ONE, TWO = [5, 9, 2, 7], [3]


@settings(max_examples=20, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from(list(OPTIONS)))
@torch.no_grad()
def test_a_texts_features_depend_neither_on_its_padding_nor_on_other_texts(batch, name):
    encoder = encoder_of(OPTIONS[name])
    tokens = padded(batch, LONGEST)
    together, mask = encoder(tokens)
    assert torch.equal(mask, tokens > 0)
    for text, features in zip(batch, together, strict=True):
        alone, mask = encoder(torch.tensor([text]))
        assert mask.all()
        torch.testing.assert_close(features[: len(text)], alone[0])


@every_option
@torch.no_grad()
def test_what_stands_at_hidden_places_is_never_seen(options):
    """Exactly: the bits are the same, whatever the embedding of padding and of the places behind the end."""
    encoder, tokens = encoder_of(options, dtype=torch.float32), padded([ONE, TWO], LONGEST)
    before, mask = encoder(tokens)
    encoder.token_embedding.weight[0] += 100
    encoder.position_embedding.weight[len(ONE) :] -= 100
    after, _ = encoder(tokens)
    assert torch.equal(before[mask], after[mask])
    assert not torch.equal(before[~mask], after[~mask])


@every_option
def test_padding_gets_no_gradient(options):
    encoder, tokens = encoder_of(options), padded([ONE, TWO], LONGEST)
    features, mask = encoder(tokens)
    features[mask].square().sum().backward()
    used = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, torch.tensor(ONE + TWO), True)
    gradient = encoder.token_embedding.weight.grad
    assert not gradient[~used].any() and gradient[used].any(dim=-1).all()
    gradient = encoder.position_embedding.weight.grad
    assert not gradient[len(ONE) :].any() and gradient[: len(ONE)].any(dim=-1).all()


@every_option
@torch.no_grad()
def test_the_order_of_words_matters_and_every_word_sees_every_other(options):
    encoder = encoder_of(options)
    features = encoder(torch.tensor([ONE]))[0][0]
    backwards = encoder(torch.tensor([ONE[::-1]]))[0][0].flip(0)  # of the same words
    assert (features - backwards).abs().amax(-1).min() > 0.01
    for place in range(len(ONE)):
        changed = [*ONE]
        changed[place] = 20
        difference = (encoder(torch.tensor([changed]))[0][0] - features).abs().amax(-1)
        assert difference.min() > 1e-4  # of the words before it, and of those after it


@torch.no_grad()
def test_without_positions_the_order_would_not_matter():
    encoder = encoder_of()
    encoder.position_embedding.weight.zero_()
    one, other = (encoder(torch.tensor([text]))[0][0] for text in (ONE, ONE[::-1]))
    torch.testing.assert_close(one, other.flip(0))


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
        theirs.self_attn.in_proj_weight.copy_(ours.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(ours.qkv.bias)
        theirs.self_attn.out_proj.load_state_dict(ours.attention_out.state_dict())
        theirs.linear1.load_state_dict(ours.mlp_in.state_dict())
        theirs.linear2.load_state_dict(ours.mlp_out.state_dict())
        theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
        theirs.norm2.load_state_dict(ours.mlp_norm.state_dict())
    reference.norm.load_state_dict(encoder.transformer.norm.state_dict())
    tokens = padded([ONE, TWO, [1, 1, 1, 2, 3, 4]])
    word, place = encoder.token_embedding.weight, encoder.position_embedding.weight
    embedded = torch.stack(
        [torch.stack([word[t] + place[i] for i, t in enumerate(row)]) for row in tokens]
    )
    features, mask = encoder(tokens)
    torch.testing.assert_close(
        features[mask], reference(embedded, src_key_padding_mask=tokens == 0)[mask]
    )


@torch.no_grad()
def test_it_reads_what_the_text_tokenizer_writes():
    tokenizer = TextTokenizer.train(["a red cat", "a blue dog"], 270, 24)
    torch.manual_seed(0)
    encoder = TextEncoder(tokenizer.vocabulary, tokenizer.max_tokens, 1, 16, 2).eval()
    features, mask = encoder(tokenizer.encode(["a red dog", "  A  RED dog", "a blue cat"]))
    assert features.shape == (3, 24, 16) and features.isfinite().all()
    assert torch.equal(features[0], features[1]) and not torch.equal(features[0], features[2])
    nothing, mask = encoder(tokenizer.no_text(2))
    assert mask.sum(1).tolist() == [1, 1] and nothing.isfinite().all()


@torch.no_grad()
def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    encoder, tokens = TextEncoder(VOCABULARY, LONGEST, 1, 16, 2, dropout=0.5), torch.tensor([ONE])
    assert not torch.equal(encoder(tokens)[0], encoder(tokens)[0])
    encoder.eval()
    assert torch.equal(encoder(tokens)[0], encoder(tokens)[0])
