"""Sampling: against a plain loop, what a sample depends on, guidance, filters, streaming, cost."""

import itertools
import os
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import (
    CAPTIONS,
    TEXTS,
    class_and_text,
    class_rotary,
    condition_of,
    double,
    fresh_generator,
    generator,
    new_generator,
    prompts_of,
)

from sitlib.model.config import SamplingConfig
from sitlib.model.generator import AutoregressiveModel
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample import generate as sampling
from sitlib.sample.draw import filtered_probabilities, sample_codes
from sitlib.sample.generate import generate, max_batch_size
from workbook.profile import load_profile

PLAIN = SamplingConfig(batch_size=8)
GUIDED = replace(PLAIN, guidance=3.0)


@cache
def tokenizer_of(decoder_attention="scale_causal", levels=3, grid_size=2):
    torch.manual_seed(0)
    sizes = {"size": 16, "levels": levels, "grid_size": grid_size, "num_codes": 20}
    config = load_profile("smoke").tokenizer_variant("sit4")
    config = replace(config, **sizes, num_codebooks=1, decoder_attention=decoder_attention)
    return SpectralTokenizer(config).eval()


# -- against a plain loop ---------------------------------------------------------------------


def plain_filter(row, config):
    """float64 probabilities of a row of logits, and how near a decision was to the other one."""
    p = (row.double() / config.temperature).softmax(-1)
    order, margin = p.argsort(descending=True).tolist(), 1.0

    def only(kept):
        return torch.zeros_like(p).index_put((torch.tensor(kept),), p[kept]) / p[kept].sum()

    if config.top_k:
        threshold = p[order[min(config.top_k, len(order)) - 1]]
        order = [i for i in order if p[i] >= threshold]
        p = only(order)
    if config.min_p:
        margin = float((p[order] / p.max() / config.min_p - 1).abs().min())
        order = [i for i in order if p[i] >= config.min_p * p.max()]
        p = only(order)
    if config.top_p < 1:
        kept, total = [], 0.0
        for index in order:
            margin = min(margin, abs(total - config.top_p))
            if not kept or total < config.top_p:
                kept.append(index)
            total += float(p[index])
        p = only(kept)
    return p, margin


@torch.no_grad()
def plain_sample(model, cond, index, config):
    """Codes [T] of one sample: the whole sequence through the model for every code, in float64."""
    scales, n = model.config.num_scales, model.config.tokens_per_scale
    codes = torch.zeros(scales * n, dtype=torch.int64)
    uniform = np.random.default_rng([config.seed, index]).random(scales * n, dtype=np.float32)
    for position in model.order.tolist():
        conditional, unconditional = (
            model(codes.view(1, scales, n), c).flatten(1, 2)[0, position]
            for c in (cond, model.unconditional(cond))
        )
        guided = unconditional + config.guidance * (conditional - unconditional)
        p, _ = plain_filter(guided, config)
        codes[position] = (p.cumsum(0) <= float(uniform[position])).sum()
    return codes


OTHERS = ["fine_to_coarse", "by_place", "random"]
every_order = pytest.mark.parametrize("order", ["coarse_to_fine", *OTHERS])
SETTINGS = {
    "plain": {},
    "hot": {"temperature": 1.7, "seed": 3},
    "guided": {"guidance": 5.0},
    "filtered": {"guidance": 1.5, "temperature": 1.3, "top_k": 9, "min_p": 0.05, "top_p": 0.9},
}


@class_rotary
@pytest.mark.parametrize(
    ("name", "order"),
    [*itertools.product(SETTINGS, ["coarse_to_fine"]), *itertools.product(["guided"], OTHERS)],
)
def test_samples_are_those_of_a_plain_loop_without_cache(kind, positions, name, order):
    model = generator(kind, books=3, pos_emb=positions, order=order)
    config = replace(PLAIN, **SETTINGS[name])
    reference, cond = double(model), condition_of(model, 0, 1, 2)
    expected = [plain_sample(reference, cond[i : i + 1], i, config) for i in range(3)]
    drawn = generate(model, prompts_of(kind, 3), config)
    assert torch.equal(drawn.flatten(1), torch.stack(expected))


# -- what a sample depends on -----------------------------------------------------------------


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_a_sample_depends_on_the_seed_and_its_index_only(kind, config):
    model, prompts = generator(kind), prompts_of(kind, 5)
    together = generate(model, prompts, config)
    assert together.shape == (5, 3, 4) and together.dtype == torch.int64
    for size in (0, 1, 3):
        assert torch.equal(generate(model, prompts, replace(config, batch_size=size)), together)
    assert torch.equal(generate(model, prompts[:2], config), together[:2])  # however many follow
    assert torch.equal(generate(model, prompts[3:], config, first_sample=3), together[3:])
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(generate(model, prompts, config), together)
    assert torch.equal(torch.rand(3), expected)  # PyTorch's random state is left alone
    assert not torch.equal(generate(model, prompts, replace(config, seed=1)), together)
    same = generate(model, 6, config)
    assert len({tuple(row.flatten().tolist()) for row in same}) == 6


def test_each_scale_draws_from_a_codebook_of_its_own_size():
    model, labels = new_generator("class", books=3, codes=[5, 20, 3]), torch.arange(60) % 3
    hot = replace(GUIDED, temperature=20.0)
    drawn = generate(model, labels, hot)
    assert drawn.amax(dim=(0, 2)).tolist() == [4, 19, 2]
    first = drawn[:5, :1]  # kept, and the rest is drawn as before
    assert torch.equal(generate(model, labels[:5], hot, prefix_codes=first), drawn[:5])
    with pytest.raises(ValueError, match="codes of scale 1 must lie in 0 ... 4"):
        generate(model, labels[:5], PLAIN, prefix_codes=first + 1)
    nats = fresh_generator("class", books=3, codes=[5, 20, 3]).nats_per_token(drawn, labels)
    torch.testing.assert_close(nats, torch.tensor([5.0, 20, 3]).log())


def test_longer_texts_beside_it_case_and_blanks_do_not_change_a_sample():
    alone = generate(generator("text"), ["a cat"], GUIDED)
    beside = generate(generator("text"), ("  A CAT ", "two green birds and a blue dog"), GUIDED)
    assert torch.equal(beside[:1], alone)


def test_samples_of_a_model_that_is_being_trained_depend_on_the_seed_only(capsys):
    model, prompts = new_generator(dropout=0.5), torch.tensor([0, 1, 2])
    expected = generate(model, prompts, PLAIN)
    assert capsys.readouterr().err == ""
    model.train()
    assert torch.equal(generate(model, prompts, PLAIN, progress="drawing"), expected)
    assert model.training and "drawing" in capsys.readouterr().err


@class_rotary
@pytest.mark.parametrize("config", [PLAIN, replace(GUIDED, batch_size=2)])
def test_first_scales_are_those_of_the_whole_and_may_be_given(kind, positions, config):
    model, prompts = generator(kind, pos_emb=positions), prompts_of(kind, 5)
    whole = generate(model, prompts, config)
    for first, scales in itertools.combinations_with_replacement((0, 1, 2, 3), 2):
        prefix = whole[:, :first] if first else None
        if scales:
            drawn = generate(model, prompts, config, scales=scales, prefix_codes=prefix)
            assert torch.equal(drawn, whole[:, :scales])


@class_rotary
@every_order
@pytest.mark.parametrize("config", [PLAIN, replace(GUIDED, batch_size=2)])
def test_a_half_written_image_is_finished_in_the_order_of_the_model(kind, positions, order, config):
    model, prompts = generator(kind, pos_emb=positions, order=order), prompts_of(kind, 5)
    whole = generate(model, prompts, config)
    for written in (0, 1, 6, 11, 12):
        first = model.order[:written]
        for begun in (whole, (whole + 1) % 20):  # what it would have drawn, and something else
            codes = torch.zeros(5, 12, dtype=torch.int64)
            codes[:, first] = begun.flatten(1)[:, first]  # nothing is told about the others
            options = {"prefix_codes": codes.view(5, 3, 4), "written": written}
            drawn = generate(model, prompts, config, **options)
            assert torch.equal(drawn.flatten(1)[:, first], codes[:, first])
            assert torch.equal(drawn, whole) == (begun is whole or written == 0)


# -- filters ----------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    num_codes=st.integers(2, 30),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 40),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.99)),
    seed=st.integers(0, 10_000),
)
def test_filters_against_a_plain_version(num_codes, temperature, top_k, top_p, min_p, seed):
    logits = torch.randn(3, num_codes, generator=torch.Generator().manual_seed(seed)) * 3
    config = replace(PLAIN, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected, margins = zip(*(plain_filter(row, config) for row in logits), strict=True)
    assume(min(margins) > 1e-4)  # else float32 may decide otherwise
    probs = filtered_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(probs.double(), torch.stack(expected), atol=1e-6, rtol=1e-4)
    assert torch.equal(probs > 0, torch.stack(expected) > 0)


def test_codes_as_likely_as_the_last_of_the_top_k_remain_too():
    probs = filtered_probabilities(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert (probs > 0).tolist() == [[True, True, True, False]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any), st.floats(0, 1, width=32))
def test_sampling_inverts_the_distribution_and_never_draws_what_is_impossible(weights, number):
    p = torch.tensor(weights).double() / sum(weights)
    (code,) = sample_codes(p.float()[None], torch.tensor([number])).tolist()
    assert weights[code] > 0
    cumulative = p.cumsum(0)
    if number < 1 - 1e-5 and (cumulative - number).abs().min() > 1e-5:
        assert code == int((cumulative <= number).sum())


# -- streaming --------------------------------------------------------------------------------


def streamed(model, tokenizer, prompts, config, **options):
    shown = []
    show = lambda *event: shown.append(event)  # noqa: E731
    codes = generate(model, prompts, config, tokenizer=tokenizer, on_scale=show, **options)
    return codes, shown


@class_and_text
@pytest.mark.parametrize("batch_size", [0, 2])
def test_streaming_shows_every_drawn_scale_of_every_batch_once_and_in_order(kind, batch_size):
    model, tokenizer, prompts = generator(kind, num_scales=4), tokenizer_of(), prompts_of(kind, 5)
    config = replace(GUIDED, batch_size=batch_size)
    codes, shown = streamed(model, tokenizer, prompts, config)
    assert torch.equal(codes, generate(model, prompts, config))  # looking changes nothing
    firsts = [0, 2, 4] if batch_size == 2 else [0]
    assert [event[:2] for event in shown] == list(itertools.product(firsts, (1, 2, 3, 4)))
    for first, scale, images in shown:
        expected = tokenizer.decode(codes[first : first + (batch_size or 5), :scale])
        torch.testing.assert_close(images, expected)
        assert images.shape[1:] == (3, 2**scale, 2**scale)
    _, shown = streamed(model, tokenizer, prompts, config, prefix_codes=codes[:, :2])
    assert [event[:2] for event in shown] == list(itertools.product(firsts, (3, 4)))
    _, shown = streamed(model, tokenizer, prompts, config, scales=2)
    assert [event[:2] for event in shown] == list(itertools.product(firsts, (1, 2)))


def test_one_scale_is_shown_by_any_decoder_and_the_first_of_several_are_not_by_a_full_one():
    model, whole = generator(num_scales=1, tokens_per_scale=16), tokenizer_of("full", 0, 4)
    _, shown = streamed(model, whole, torch.tensor([0, 1]), PLAIN)
    assert [event[:2] for event in shown] == [(0, 1)]
    with pytest.raises(ValueError, match="this decoder attends to all"):
        streamed(generator(num_scales=4), tokenizer_of("full"), torch.tensor([0]), PLAIN)


def test_streamed_images_may_be_changed_and_trained_on_outside_of_samplings_precision(monkeypatch):
    autocast = partial(torch.is_autocast_enabled, "cpu")
    bf16 = partial(torch.autocast, "cpu", torch.bfloat16)
    monkeypatch.setattr(sampling, "inference_autocast", lambda device: bf16())
    model, factor = generator(num_scales=4), torch.ones((), requires_grad=True)
    inside, outside = [], []
    hook = model.transformer.register_forward_pre_hook(lambda *_: inside.append(autocast()))

    def on_scale(first, scale, images):
        outside.append(autocast())
        (images * factor).sum().backward()
        images.zero_()

    generate(model, torch.tensor([0]), PLAIN, tokenizer=tokenizer_of(), on_scale=on_scale)
    hook.remove()
    assert factor.grad > 0 and not any(outside) and len(outside) == 4
    assert inside and all(inside)


# -- refusals -----------------------------------------------------------------------------------


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


ONE = torch.tensor([0])
NO_CLASS = r"on a class, not on texts: prompts must be .* in 0 ... 2 \(mountain, water, city\)"
PREFIX = r"prefix_codes must be codes \[1, k, 4\], k <= "
REFUSALS = [
    ("class", ["water"], {}, NO_CLASS),
    ("class", torch.tensor([3]), {}, NO_CLASS),
    ("text", "a red cat", {}, "must be a list of texts"),
    ("text", ONE, {}, "must be a list of texts"),
    ("class", ONE, {"scales": 4}, "scales must lie in 1 ... 3, the scales of the model, it is 4"),
    ("class", ONE, {"prefix_codes": torch.zeros(1, 1, 4)}, PREFIX + "3; these are torch.float32"),
    ("class", ONE, {"prefix_codes": zeros(1, 2, 4), "scales": 1}, PREFIX + "1; "),
    ("class", ONE, {"prefix_codes": zeros(1, 1, 4) + 20}, "scale 1 must lie in 0 ... 19"),
    ("class", ONE, {"on_scale": print}, "give a tokenizer"),
    ("class", ONE, {"written": 1}, r"written must lie in 0 \.\.\. 0, the codes given, it is 1"),
    ("class", ONE, {"prefix_codes": zeros(1, 2, 4), "written": 9}, r"in 0 \.\.\. 8, .* it is 9"),
]


@pytest.mark.parametrize(("kind", "prompts", "options", "sentence"), REFUSALS)
def test_refusals(kind, prompts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(generator(kind), prompts, PLAIN, **options)


@pytest.mark.parametrize("order", OTHERS)
def test_models_of_another_order_have_no_first_scales(order):
    model, given = generator(order=order, num_scales=4), {"prefix_codes": zeros(1, 2, 4)}
    show = {"on_scale": print, "tokenizer": tokenizer_of()}
    for options in ({"scales": 2}, given, given | {"written": 3}, show):
        with pytest.raises(ValueError, match=f"order {order} has no first scales: take one of"):
            generate(model, ONE, PLAIN, **options)


# -- cost -------------------------------------------------------------------------------------


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(("given", "scales"), [(0, 3), (0, 2), (1, 3), (3, 3)])
def test_nothing_is_computed_twice(kind, config, given, scales):
    """Condition and prefix pass the transformer together, then one code after another."""
    model, passed, texts = generator(kind), [], []
    prefix = generate(model, prompts_of(kind, 5), config, scales=given) if given else None
    hooks = [
        module.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(tuple(x[0].shape[:2])))
        for module, seen in ((model.transformer, passed), (model.text_encoder, texts))
        if module is not None
    ]
    generate(model, prompts_of(kind, 5), config, scales=scales, prefix_codes=prefix)
    for hook in hooks:
        hook.remove()
    rows = 5 if config is PLAIN else 10
    steps = [1 + 4 * given] + [1] * (4 * (scales - given) - 1) if given < scales else []
    assert passed == [(rows, length) for length in steps]  # the last code is drawn, not read
    longest = int((TEXTS.encode(CAPTIONS) != TEXTS.pad).sum(1).max())  # padding is not read
    assert texts == ([(rows, longest)] if kind == "text" and given < scales else [])


def test_a_model_in_half_precision_draws_too():
    model = AutoregressiveModel(generator(pos_emb="rotary").config).bfloat16().eval()
    codes = generate(model, torch.tensor([0, 1, 2]), GUIDED)
    assert codes.shape == (3, 3, 4) and 0 <= int(codes.min()) <= int(codes.max()) < 20


@class_and_text
def test_the_largest_batch_has_its_keys_and_values_in_half_of_the_free_memory(monkeypatch, kind):
    model, memory = generator(kind), {"SC_AVPHYS_PAGES": 0, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__, raising=False)
    monkeypatch.setattr(os, "sysconf_names", memory, raising=False)
    for free, scales, halves in itertools.product((2**18, 2**20, 2**21), (1, 3), (1, 2)):
        memory["SC_AVPHYS_PAGES"] = free // 4096
        batch = max_batch_size(model, scales, halves)
        length = 4 * scales + (32 if kind == "text" else 0)
        # Two layers, keys and values of width 16, in float32, for both halves.
        needed = 2 * 2 * batch * halves * length * 16 * 4
        # Beside them are only logits and what the filters make of these.
        assert 1 < batch < 1024 and free / 2 / 8 < needed <= free / 2
    memory["SC_AVPHYS_PAGES"] = 0
    assert max_batch_size(model, 3, 1) == 1
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert 1 <= max_batch_size(model, 3, 1) <= 1024
