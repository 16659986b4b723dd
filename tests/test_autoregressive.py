"""The generator: what a code may depend on, orders, cache against no cache, conditions, sizes."""

import itertools

import pytest
import tiny
import torch

from sitlib.model.block import rope_freqs
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig, code_nats
from sitlib.model.text import TextTokenizer
from sitlib.strict import ConfigError, from_dict, to_dict
from workbook.profile import load_profile

ORDERS = {  # positions in codes [S = 3, N = 4], as they follow one another
    "coarse_to_fine": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "fine_to_coarse": [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3],
    "by_place": [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
    # Checkpoints do not hold it: it must never change.
    "random": [9, 2, 7, 4, 5, 11, 0, 3, 6, 10, 8, 1],
}
CASES = [
    *itertools.product(["class", "text"], [1, 2, 3], ["learned", "rotary"], ["coarse_to_fine"]),
    *itertools.product(["class"], [2], ["learned"], [*ORDERS][1:]),
    *itertools.product(["text"], [3], ["rotary"], [*ORDERS][1:]),
]
every_case = pytest.mark.parametrize(("kind", "books", "positions", "order"), CASES)
every_order = pytest.mark.parametrize("order", ORDERS)


# -- likelihood -------------------------------------------------------------------------------


@every_case
@torch.no_grad()
def test_logits_are_those_of_a_loop_over_positions_with_the_codebook_of_their_scale(
    kind, books, positions, order
):
    """Inputs and heads from their definitions; the transformer itself is tested elsewhere."""
    model = tiny.double(tiny.generator(kind, books=books, pos_emb=positions, order=order))
    codes, cond = tiny.random_codes(model), tiny.condition_of(model, 0, 2)
    book_of = {1: [0, 0, 0], 2: [0, 1, 1], 3: [0, 1, 2]}[books]
    context, inputs = None, []
    if kind == "text":
        context = model.transformer.encode_context(*model.text_encoder(cond))
        inputs.append(model.start.expand(2, -1))
    else:
        inputs.append(model.class_embedding.weight[cond])
    places = [(0.0, 0.0)]  # the prefix; the grid begins at (1, 1)
    for scale, place in (divmod(position, 4) for position in ORDERS[order]):
        embedding = model.code_embedding[book_of[scale]]
        table = embedding.vectors @ embedding.embed.weight.T if kind == "text" else embedding.weight
        x = table[codes[:, scale, place]]
        x = x + model.scale_embedding.weight[scale]
        if positions == "learned":
            x = x + model.position_embedding.weight[place]
        inputs.append(x)
        places.append((1.0 + place // 2, 1.0 + place % 2))
    rope = rope_freqs(torch.tensor(places[:-1]), 8) if positions == "rotary" else None
    x_BTC = torch.stack(inputs[:-1], dim=1)
    x_BTC = model.transformer(x_BTC, causal=True, rope_2TF=rope, context=context)
    logits = model(codes, cond)
    assert logits.shape == (2, 3, 4, 20) and len(model.heads) == len(model.code_embedding) == books
    for step, (scale, place) in enumerate(divmod(position, 4) for position in ORDERS[order]):
        x, book = x_BTC[:, step], book_of[scale]
        expected = model.heads[book](x)
        if kind == "text":
            embedding = model.code_embedding[book]
            expected += x @ embedding.score.weight.T @ embedding.vectors.T
        torch.testing.assert_close(logits[:, scale, place], expected)
    assert logits.std() > 0.1  # the comparison is not one of zeros


@tiny.class_rotary
@every_order
@torch.no_grad()
def test_a_code_depends_on_all_earlier_codes_and_the_condition_only(kind, positions, order):
    model = tiny.generator(kind, pos_emb=positions, order=order)
    codes, cond = tiny.random_codes(model), tiny.condition_of(model, 0, 2)
    before = model(codes, cond).flatten(1, 2)
    for step, position in enumerate(ORDERS[order], 1):
        changed = codes.flatten(1).clone()
        changed[:, position] = (changed[:, position] + 1) % 20
        after = model(changed.view_as(codes), cond).flatten(1, 2)
        earlier, later = ORDERS[order][:step], ORDERS[order][step:]
        assert torch.equal(after[:, earlier], before[:, earlier])
        assert ((after - before)[:, later].abs().amax((0, 2)) > 1e-4).all()
    other = model(codes, tiny.condition_of(model, 1, 1)).flatten(1, 2)
    assert (other - before).abs().amax(2).min() > 1e-4


@every_order
@torch.no_grad()
def test_probabilities_of_all_sequences_sum_to_one(order):
    """So nats of a model are those of a distribution over the same codes, whatever the order."""
    sizes = {"num_scales": 2, "tokens_per_scale": 4, "codes": [3, 2]}
    model = tiny.double(tiny.new_generator(**sizes, pos_emb="rotary", order=order))
    every = [*itertools.product(*[range(3)] * 4, *[range(2)] * 4)]
    codes = torch.tensor(every).view(-1, 2, 4)
    logits = model(codes, torch.zeros(len(codes), dtype=torch.int64))
    log_p = -code_nats(logits, codes).sum((1, 2))
    assert len(log_p) == 1296 and log_p.std() > 0.5
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0).double())


@every_case
def test_every_parameter_learns(kind, books, positions, order):
    model = tiny.new_generator(kind, books=books, pos_emb=positions, order=order).train()
    cond = tiny.condition_of(model, *[0, 1, 2, 0, 1, 2, 0, 1])
    model.nats_per_token(tiny.random_codes(model, 8), cond).mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@tiny.class_and_text
@torch.no_grad()
def test_nats_are_cross_entropy_and_those_of_a_fresh_model_uniform(kind):
    model = tiny.generator(kind)
    codes, cond = tiny.random_codes(model), tiny.condition_of(model, 0, 2)
    nats = -model(codes, cond).double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    mean = model.nats_per_token(codes, cond).double()
    torch.testing.assert_close(mean, nats.mean((0, 2)), atol=1e-5, rtol=0)
    for options in ({}, tiny.LLAMA):
        assert not tiny.fresh_generator(kind, **options)(codes, cond).any()


# -- decoding, one token after another --------------------------------------------------------


@every_case
@pytest.mark.parametrize("options", [{}, tiny.LLAMA], ids=["default", "llama"])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(kind, books, positions, order, options):
    model = tiny.double(
        tiny.generator(kind, books=books, pos_emb=positions, order=order, **options)
    )
    codes, cond = tiny.random_codes(model), tiny.condition_of(model, 0, 2)
    expected = model(codes, cond).flatten(1, 2)[:, ORDERS[order]]
    codes_BT = codes.flatten(1)[:, ORDERS[order]]
    for given in (0, 1, 4, 11):
        state, logits = model.prefill(cond, codes_Bt=codes_BT[:, :given])
        logits = [logits]
        for position in range(given, 11):
            logits.append(model.decode_one_token(state, codes_BT[:, position]))
        torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, given:])
        assert state.cache.length == state.cache.capacity == 12
    assert expected.std() > 0.1


# -- conditions -------------------------------------------------------------------------------


@tiny.class_and_text
@torch.no_grad()
def test_an_empty_condition_says_nothing_and_may_stand_beside_others(kind):
    model = tiny.generator(kind)
    codes, cond = tiny.random_codes(model, 3)[:1].repeat(3, 1, 1), tiny.condition_of(model, 0, 1, 2)
    empty = model.unconditional(cond)
    assert empty.shape == cond.shape and empty.dtype == cond.dtype
    logits = model(codes, empty)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    for conditional in model(codes, cond):
        assert not torch.allclose(conditional, logits[0])
    if kind == "class":
        assert empty.tolist() == [model.no_class] * 3 == [3, 3, 3]
    else:  # its end alone
        assert empty[:, 0].tolist() == [tiny.TEXTS.end] * 3 and not empty[:, 1:].any()
    # As in training: some of a batch are hidden.
    is_hidden = torch.tensor([False, True, False])
    mixed = torch.where(is_hidden if kind == "class" else is_hidden[:, None], empty, cond)
    expected = torch.where(is_hidden[:, None, None, None], logits, model(codes, cond))
    torch.testing.assert_close(model(codes, mixed), expected, atol=1e-4, rtol=0)


def test_a_configuration_that_contradicts_itself_is_refused():
    values = to_dict(tiny.new_generator("class").config)
    both = {"classes": [], "text_tokenizer": "{}"}
    for changes, sentence in (({"num_scales": "3"}, "num_scales"), (both, "give both or neither")):
        with pytest.raises(ConfigError, match=sentence):
            from_dict(CodeModelConfig, values | changes)


# -- sizes of the paper's models --------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "prefixes", "published", "tolerance"),
    [
        # VIM-Base (arXiv 2110.04627) is said to have 650M; its 24 blocks alone are 680M.
        ("ar_sit4", ("transformer.",), 650e6, 0.05),
        ("ar_sit4", ("",), 650e6, 0.13),
        # LlamaGen-L (arXiv 2406.06525), with one codebook of 16,384 codes; here two of 8,192.
        ("ar_sit4_improved", ("",), 343e6, 0.002),
        # Parti-350M (arXiv 2206.10789): 12 + 12 layers of width 1024.
        ("ar_captioned_sit4_scd", ("transformer.", "text_encoder.transformer."), 350e6, 0.01),
    ],
)
def test_the_models_of_the_paper_have_the_published_sizes(variant, prefixes, published, tolerance):
    profile = load_profile("paper")
    c = profile.autoregressive_variant(variant)
    codes = profile.tokenizer_variant(c.tokenizer)
    sizes = (codes.num_scales, codes.tokens_per_scale, codes.codebook_sizes, codes.num_codebooks)
    classes, texts = [f"class {i}" for i in range(1000)], None
    if c.text is not None:
        classes, texts = [], TextTokenizer.of_size(c.text.vocab_size, c.text.max_tokens).to_json()
    with torch.device("meta"):  # without its memory
        model = AutoregressiveModel(CodeModelConfig(c, *sizes, classes, texts))
    found = sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefixes))
    assert found == pytest.approx(published, rel=tolerance)
