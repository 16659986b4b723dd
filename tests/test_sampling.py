"""Drawing codes: what a sample depends on, against a plain loop without cache, filters, prefixes, streaming, cost."""

import itertools
import os
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import sitlib.model.sequence
from sitlib.model.config import SamplingConfig, TextEncoderConfig
from sitlib.model.generator import AutoregressiveModel, CodeModelConfig
from sitlib.model.text import TextTokenizer
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.sample import generate as sampling
from sitlib.sample.generate import (
    _uniform,
    filtered_probabilities,
    generate,
    guidance_of_scale,
    max_batch_size,
    sample_codes,
)
from workbook.profile import load_profile

CLASSES = ["mountain", "water", "city"]
CAPTIONS = [
    "a red cat",
    "a blue dog that sleeps",
    "two green birds",
    "a cat and a dog",
    "a red bird",
]
TEXTS = TextTokenizer.train(CAPTIONS, 300, 32)
SMOKE = load_profile("smoke")
PLAIN = SamplingConfig(
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    guidance=1.0,
    guidance_growth="constant",
    batch_size=8,
    seed=0,
)
GUIDED = replace(PLAIN, guidance=3.0)
class_and_text = pytest.mark.parametrize("kind", ["class", "text"])


@cache
def model_of(
    kind="class", positions="learned", num_scales=3, tokens_per_scale=4, num_codes=20, dropout=0.0
):
    """A small model with weights large enough that every prediction is far from uniform; a codebook for every scale."""
    torch.manual_seed(0)
    is_text = kind == "text"
    shape = replace(
        SMOKE.autoregressive_variant("ar_sit4"),
        layers=2,
        width=16,
        positions=positions,
        dropout=dropout,
        text=TextEncoderConfig(layers=1, vocabulary=300, max_tokens=32) if is_text else None,
    )
    classes, texts = ([], TEXTS.to_json()) if is_text else (CLASSES, None)
    config = CodeModelConfig(
        shape, num_scales, tokens_per_scale, num_codes, num_scales, classes, texts
    )
    model = AutoregressiveModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def prompts_of(model, count=5):
    if model.text_tokenizer is None:
        return torch.tensor([0, 1, 2, 1, 0])[:count]
    return CAPTIONS[:count]


def condition_of(model, prompts):
    return prompts if model.text_tokenizer is None else model.text_tokenizer.encode(prompts)


@cache
def tokenizer_of(decoder_attention="scale_causal", levels=3, grid=2):
    torch.manual_seed(0)
    changes = {
        "size": 16,
        "levels": levels,
        "grid": grid,
        "num_codes": 20,
        "num_codebooks": levels + 1,
    }
    config = replace(
        SMOKE.tokenizer_variant("sit4"), decoder_attention=decoder_attention, **changes
    )
    return SpectralTokenizer(config).eval()


# -- against a plain loop --------------------------------------------------------------------------------------------------------------


def plain_filter(row, config):
    """float64 probabilities of one row of logits; and how near a filter's decision was to falling the other way."""
    p = (row.double() / config.temperature).softmax(-1)
    order, margin = p.argsort(descending=True).tolist(), 1.0
    if config.top_k:
        threshold = p[order[min(config.top_k, len(order)) - 1]]
        order = [i for i in order if p[i] >= threshold]
    p = torch.zeros_like(p).index_put((torch.tensor(order),), p[order]) / p[order].sum()
    if config.min_p:
        margin = float((p[order] / p.max() / config.min_p - 1).abs().min())
        order = [i for i in order if p[i] >= config.min_p * p.max()]
        p = torch.zeros_like(p).index_put((torch.tensor(order),), p[order]) / p[order].sum()
    if config.top_p < 1:
        kept, total = [], 0.0
        for index in order:
            margin = min(margin, abs(total - config.top_p))
            if not kept or total < config.top_p:
                kept.append(index)
            total += float(p[index])
        p = torch.zeros_like(p).index_put((torch.tensor(kept),), p[kept]) / p[kept].sum()
    return p, margin


@torch.no_grad()
def plain_sample(model, condition, index, config):
    """Codes [T] of one sample: the whole sequence through the model for every code, in float64; condition [1] or [1, L]."""
    shape, codes = model.config, []
    numbers = _uniform(config.seed, index, model.num_tokens)
    for position in range(model.num_tokens):
        padded = torch.tensor(codes + [0] * (model.num_tokens - position))
        padded = padded.view(1, shape.num_scales, shape.tokens_per_scale)
        given, hidden = (
            model(padded, c).flatten(1, 2)[0, position]
            for c in (condition, model.unconditional(condition))
        )
        weight = config.guidance
        if config.guidance_growth == "linear" and shape.num_scales > 1:
            weight = 1 + (weight - 1) * (position // shape.tokens_per_scale) / (
                shape.num_scales - 1
            )
        p, _ = plain_filter(hidden + weight * (given - hidden), config)
        total, code = 0.0, -1
        while total <= float(numbers[position]):
            code += 1
            total += float(p[code])
        codes.append(code)
    return torch.tensor(codes)


SETTINGS = {
    "plain": {},
    "hot": {"temperature": 1.7, "seed": 3},
    "guided": {"guidance": 3.0},
    "growing": {"guidance": 5.0, "guidance_growth": "linear"},
    "filtered": {"guidance": 1.5, "temperature": 1.3, "top_k": 9, "min_p": 0.05, "top_p": 0.9},
}


@class_and_text
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
def test_samples_are_those_of_a_plain_loop_without_cache(kind, positions, changes):
    model, config = model_of(kind, positions), replace(PLAIN, **changes)
    prompts = prompts_of(model, 3)
    reference, condition = _double(model), condition_of(model, prompts)
    expected = [plain_sample(reference, condition[i : i + 1], i, config) for i in range(3)]
    assert torch.equal(generate(model, prompts, config).flatten(1), torch.stack(expected))


def _double(model):
    again = AutoregressiveModel(model.config)
    again.load_state_dict(model.state_dict())
    return again.double().eval()


# -- what a sample depends on ----------------------------------------------------------------------------------------------------------


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_a_sample_depends_on_the_seed_and_its_index_only(kind, config):
    model = model_of(kind)
    prompts = prompts_of(model)
    together = generate(model, prompts, config)
    assert together.shape == (5, 3, 4) and together.dtype == torch.int64
    for batch_size in (0, 1, 3, 5):
        assert torch.equal(
            generate(model, prompts, replace(config, batch_size=batch_size)), together
        )
    assert torch.equal(generate(model, prompts[:2], config), together[:2])  # however many follow
    torch.manual_seed(99)
    assert torch.equal(generate(model, prompts, config), together)  # whatever else is drawn
    assert not torch.equal(generate(model, prompts, replace(config, seed=1)), together)


@class_and_text
def test_equal_prompts_have_different_samples_and_different_prompts_too(kind):
    model = model_of(kind)
    prompts = torch.zeros(6, dtype=torch.int64) if kind == "class" else ["a red cat"] * 6
    codes = generate(model, prompts, PLAIN)
    assert len({tuple(row.flatten().tolist()) for row in codes}) == 6
    other = torch.ones(6, dtype=torch.int64) if kind == "class" else ["a blue dog"] * 6
    assert (generate(model, other, PLAIN) != codes).flatten(1).any(1).all()


def test_samples_leave_the_random_state_alone():
    model = model_of()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    generate(model, torch.tensor([0, 1]), GUIDED)
    assert torch.equal(torch.rand(3), expected)


def test_a_longer_text_beside_it_does_not_change_a_sample():
    model = model_of("text")
    alone = generate(model, ["a cat"], GUIDED)
    beside = generate(model, ["a cat", "two green birds and a blue dog"], GUIDED)
    assert torch.equal(beside[:1], alone)


def test_samples_of_a_model_that_is_being_trained_depend_on_the_seed_only():
    model, prompts = model_of(dropout=0.5), torch.tensor([0, 1, 2])
    expected = generate(model, prompts, PLAIN)
    model.train()
    try:
        assert torch.equal(generate(model, prompts, PLAIN), expected) and model.training
    finally:
        model.eval()


def test_codes_follow_the_models_distribution():
    """First codes, and second codes given them, of many samples against the probabilities that the model gives them."""
    model, count = model_of(num_scales=2, tokens_per_scale=1, num_codes=4), 4000
    config = replace(PLAIN, batch_size=2000, temperature=0.7)
    codes = generate(model, torch.zeros(count, dtype=torch.int64), config)[:, :, 0]
    observed = torch.bincount(4 * codes[:, 0] + codes[:, 1], minlength=16).view(4, 4) / count
    with torch.no_grad():
        logits = model(
            torch.arange(4)[:, None, None].expand(4, 2, 1), torch.zeros(4, dtype=torch.int64)
        )
    first, second = (logits[:, :, 0] / 0.7).softmax(-1).unbind(1)
    assert (observed - first[0][:, None] * second).abs().max() < 4 * (0.25 / count) ** 0.5


# -- scales and prefixes ---------------------------------------------------------------------------------------------------------------


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED, replace(GUIDED, guidance_growth="linear")])
def test_the_first_scales_are_those_of_the_whole(kind, config):
    model = model_of(kind)
    whole = generate(model, prompts_of(model), config)
    for scales in (1, 2, 3):
        assert torch.equal(
            generate(model, prompts_of(model), config, scales=scales), whole[:, :scales]
        )


@class_and_text
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("config", [PLAIN, replace(GUIDED, guidance_growth="linear", batch_size=2)])
def test_a_prefix_of_what_would_be_drawn_changes_nothing(kind, positions, config):
    model = model_of(kind, positions)
    whole = generate(model, prompts_of(model), config)
    for first in (0, 1, 2, 3):
        for scales in range(max(first, 1), 4):
            drawn = generate(
                model, prompts_of(model), config, scales=scales, prefix_codes=whole[:, :first]
            )
            assert torch.equal(drawn, whole[:, :scales])


def test_another_prefix_is_kept_and_changes_what_follows():
    model = model_of()
    whole = generate(model, prompts_of(model), PLAIN)
    prefix = (whole[:, :1] + 1) % 20
    drawn = generate(model, prompts_of(model), PLAIN, prefix_codes=prefix.int())
    assert torch.equal(drawn[:, :1], prefix) and drawn.dtype == torch.int64
    assert not torch.equal(drawn[:, 1:], whole[:, 1:])


# -- guidance --------------------------------------------------------------------------------------------------------------------------


@class_and_text
def test_guidance_of_one_is_no_guidance(kind):
    model = model_of(kind)
    expected, seen = generate(model, prompts_of(model), PLAIN), []
    hook = model.transformer.register_forward_pre_hook(
        lambda _, inputs: seen.append(len(inputs[0]))
    )
    generate(model, prompts_of(model), PLAIN)
    assert set(seen) == {5}  # no unconditional half
    seen.clear()
    for growth in ("constant", "linear"):  # takes the guided path
        guided = replace(PLAIN, guidance=1.0 + 1e-7, guidance_growth=growth)
        assert torch.equal(generate(model, prompts_of(model), guided), expected)
    assert set(seen) == {10}
    hook.remove()
    assert not torch.equal(
        generate(model, prompts_of(model), replace(PLAIN, guidance=4.0)), expected
    )


@class_and_text
def test_guidance_of_zero_does_not_see_the_prompt(kind):
    model = model_of(kind)
    one, other = prompts_of(model, 3), prompts_of(model, 4)[1:]
    config = replace(PLAIN, guidance=0.0)
    assert torch.equal(generate(model, one, config), generate(model, other, config))


def test_growing_guidance_starts_at_one_and_ends_at_the_weight():
    config = replace(PLAIN, guidance=4.0, guidance_growth="linear")
    for num_scales in (2, 3, 6):
        weights = [
            guidance_of_scale(scale, num_scales, config) for scale in range(1, num_scales + 1)
        ]
        assert weights[0] == 1.0 and weights[-1] == 4.0
        steps = [after - before for before, after in itertools.pairwise(weights)]
        assert steps == pytest.approx([3.0 / (num_scales - 1)] * (num_scales - 1))
        constant = replace(config, guidance_growth="constant")
        assert {guidance_of_scale(s, num_scales, constant) for s in range(1, num_scales + 1)} == {
            4.0
        }
    assert guidance_of_scale(1, 1, config) == 4.0  # of one scale


@class_and_text
def test_growing_guidance_leaves_the_first_scale_as_it_is(kind):
    model = model_of(kind)
    plain = generate(model, prompts_of(model), PLAIN)
    constant, growing = (
        generate(model, prompts_of(model), replace(PLAIN, guidance=8.0, guidance_growth=growth))
        for growth in ("constant", "linear")
    )
    assert torch.equal(growing[:, 0], plain[:, 0]) and not torch.equal(growing[:, 1:], plain[:, 1:])
    assert not torch.equal(constant[:, 0], plain[:, 0])
    # In the last scale they agree, given the same codes before it.
    config = replace(PLAIN, guidance=8.0, guidance_growth="constant")
    last = generate(model, prompts_of(model), config, prefix_codes=growing[:, :2])
    assert torch.equal(last, growing)


# -- filters ---------------------------------------------------------------------------------------------------------------------------


@class_and_text
def test_top_1_is_the_most_likely_code_of_the_uncached_model(kind):
    model = model_of(kind)
    prompts = prompts_of(model)
    greedy = generate(model, prompts, replace(PLAIN, top_k=1))
    with torch.no_grad():
        assert torch.equal(model(greedy, condition_of(model, prompts)).argmax(-1), greedy)
    assert torch.equal(generate(model, prompts, replace(PLAIN, top_k=1, seed=5)), greedy)
    assert torch.equal(generate(model, prompts, replace(PLAIN, top_p=1e-6)), greedy)
    assert torch.equal(generate(model, prompts, replace(PLAIN, min_p=0.999999)), greedy)


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
    result = filtered_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(result.double(), torch.stack(expected), atol=1e-6, rtol=1e-4)
    assert torch.equal(result > 0, torch.stack(expected) > 0)
    torch.testing.assert_close(result.sum(-1), torch.ones(3))


def test_filters_by_hand():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()

    def kept(**filters):
        return [round(p, 4) for p in filtered_probabilities(logits, **filters)[0].tolist()]

    assert kept() == [0.1, 0.4, 0.3, 0.2]
    assert kept(top_k=2) == [0.0, 0.5714, 0.4286, 0.0]
    assert kept(top_p=0.39) == [0.0, 1.0, 0.0, 0.0]
    assert kept(top_p=0.41) == [0.0, 0.5714, 0.4286, 0.0]
    assert kept(min_p=0.51) == [0.0, 0.5714, 0.4286, 0.0]
    assert kept(min_p=0.49) == [0.0, 0.4444, 0.3333, 0.2222]
    assert kept(top_k=3, top_p=0.75) == [
        0.0,
        0.5714,
        0.4286,
        0.0,
    ]  # the share is of what top-k has left
    assert kept(min_p=0.49, top_p=0.75) == [0.0, 0.5714, 0.4286, 0.0]  # and of what min-p has left
    assert kept(temperature=0.5) == [0.0333, 0.5333, 0.3, 0.1333]


def test_codes_as_likely_as_the_last_of_the_top_k_remain_too():
    probabilities = filtered_probabilities(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), top_k=2)
    assert (probabilities > 0).tolist() == [[True, True, True, False]]


def test_filters_of_half_precision_are_computed_in_single_precision():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    result = filtered_probabilities(logits, 0.9, 20, 0.8, 0.01)
    assert result.dtype == torch.float32
    assert torch.equal(result, filtered_probabilities(logits.float(), 0.9, 20, 0.8, 0.01))


@pytest.mark.parametrize(("number", "code"), [(0.0, 1), (0.19, 1), (0.21, 2), (1.0, 2)])
def test_drawing_inverts_the_distribution_and_never_draws_what_is_impossible(number, code):
    assert sample_codes(torch.tensor([[0.0, 0.2, 0.8, 0.0]]), torch.tensor([number])).tolist() == [
        code
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12).filter(any), st.floats(0, 1, width=32))
def test_drawing_against_a_loop(weights, number):
    p = torch.tensor(weights).double() / sum(weights)
    expected, total = -1, 0.0
    while expected + 1 < len(weights) and total <= number:
        expected += 1
        total += float(p[expected])
        assume(abs(total - number) > 1e-5 or expected == len(weights) - 1)
    (code,) = sample_codes(p.float()[None], torch.tensor([number])).tolist()
    assert weights[code] > 0
    if number < 1 - 1e-5:
        assert code == expected


# -- streaming -------------------------------------------------------------------------------------------------------------------------


def streamed(model, tokenizer, prompts, config, **options):
    shown = []
    codes = generate(
        model,
        prompts,
        config,
        tokenizer=tokenizer,
        on_scale=lambda first, scale, images: shown.append((first, scale, images)),
        **options,
    )
    return codes, shown


@class_and_text
@pytest.mark.parametrize("batch_size", [0, 2, 5])
def test_streaming_shows_every_scale_of_every_batch_once_and_in_order(kind, batch_size):
    model, tokenizer = model_of(kind, num_scales=4), tokenizer_of()
    config = replace(GUIDED, batch_size=batch_size)
    codes, shown = streamed(model, tokenizer, prompts_of(model), config)
    assert torch.equal(codes, generate(model, prompts_of(model), config))  # looking changes nothing
    firsts = [0, 2, 4] if batch_size == 2 else [0]
    assert [event[:2] for event in shown] == list(itertools.product(firsts, (1, 2, 3, 4)))
    for first, scale, images in shown:
        expected = tokenizer.decode(codes[first : first + (batch_size or 5), :scale])
        torch.testing.assert_close(images, expected)
        assert images.shape[1:] == (3, 2 * 2 ** (scale - 1), 2 * 2 ** (scale - 1))
        assert not images.is_inference()
    assert not torch.allclose(shown[3][2][0], shown[3][2][1])


def test_streaming_shows_what_is_drawn():
    model, tokenizer = model_of(num_scales=4), tokenizer_of()
    prompts = torch.tensor([0, 1])
    whole, _ = streamed(model, tokenizer, prompts, PLAIN)
    _, shown = streamed(model, tokenizer, prompts, PLAIN, prefix_codes=whole[:, :2])
    assert [event[:2] for event in shown] == [(0, 3), (0, 4)]  # the first two are the caller's
    _, shown = streamed(model, tokenizer, prompts, PLAIN, scales=2)
    assert [event[:2] for event in shown] == [(0, 1), (0, 2)]
    assert streamed(model, tokenizer, prompts[:0], PLAIN)[1] == []


def test_streamed_images_may_be_changed_and_trained_on():
    model, tokenizer = model_of(num_scales=4), tokenizer_of()
    factor = torch.ones((), requires_grad=True)

    def on_scale(first, scale, images):
        (images * factor).sum().backward()
        images.zero_()

    codes = generate(model, torch.tensor([0, 1]), PLAIN, tokenizer=tokenizer, on_scale=on_scale)
    assert factor.grad > 0 and torch.equal(codes, generate(model, torch.tensor([0, 1]), PLAIN))


def test_on_scale_runs_outside_of_the_precision_of_sampling(monkeypatch):
    autocast = partial(torch.is_autocast_enabled, "cpu")
    monkeypatch.setattr(
        sampling, "inference_autocast", lambda device: torch.autocast("cpu", torch.bfloat16)
    )
    model, seen = model_of(num_scales=4), []
    step = AutoregressiveModel.decode_one_token
    monkeypatch.setattr(
        AutoregressiveModel,
        "decode_one_token",
        lambda *arguments: seen.append(autocast()) or step(*arguments),
    )
    generate(
        model,
        torch.tensor([0, 1]),
        PLAIN,
        tokenizer=tokenizer_of(),
        on_scale=lambda *_: seen.append(autocast()),
    )
    assert seen == [*[True] * 4, False] * 3 + [*[True] * 3, False]


def test_one_scale_is_shown_by_any_decoder():
    model, prompts = model_of(num_scales=1, tokens_per_scale=16), torch.tensor([0])
    tokenizer = tokenizer_of("full", levels=0, grid=4)
    codes, shown = streamed(model, tokenizer, prompts, PLAIN)
    assert [event[:2] for event in shown] == [(0, 1)]
    torch.testing.assert_close(shown[0][2], tokenizer.decode(codes))


# -- prompts ---------------------------------------------------------------------------------------------------------------------------


def test_texts_and_their_token_ids_give_the_same_samples():
    model = model_of("text")
    tokens = TEXTS.encode(CAPTIONS)
    expected = generate(model, CAPTIONS, GUIDED)
    for prompts in (
        tuple(CAPTIONS),
        [f"  {text.upper()} " for text in CAPTIONS],
        tokens,
        tokens[:, :-1],
    ):
        assert torch.equal(generate(model, prompts, GUIDED), expected)


@class_and_text
def test_no_prompt_has_no_sample(kind):
    model = model_of(kind)
    nothing = torch.empty(0, dtype=torch.int64) if kind == "class" else []
    assert generate(model, nothing, PLAIN).shape == (0, 3, 4)
    assert generate(model, nothing, PLAIN, scales=2).dtype == torch.int64


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


ONE = torch.tensor([0])
NO_CLASS = r"on a class, not on texts: prompts must be .* in 0 ... 2 \(mountain, water, city\)"
NO_TEXT = "conditioned on texts: give a list of texts, one for each sample"
NO_IDS = r"conditioned on texts: give a list of texts, or token ids \[B, L\] with L <= 32"
PREFIX = r"prefix_codes must be codes \[1, k, 4\] in 0 ... 19, k <= "
REFUSALS = [
    ("class", ["water"], {}, NO_CLASS),
    ("class", "water", {}, NO_CLASS),
    ("class", [0, 1], {}, NO_CLASS),
    ("class", torch.tensor([0.0]), {}, NO_CLASS),
    ("class", torch.tensor([3]), {}, NO_CLASS),
    ("class", torch.tensor([-1]), {}, NO_CLASS),
    ("class", torch.tensor(0), {}, NO_CLASS),
    ("class", -1, {}, "must not be negative, it is -1"),
    ("text", "a red cat", {}, NO_TEXT),
    ("text", ["a red cat", 1], {}, NO_TEXT),
    ("text", ["a red cat", ""], {}, "the caption '' is empty; write what the image shows"),
    ("text", ["a very long text " * 10], {}, "tokens, at most 31 are allowed: shorten it"),
    ("text", torch.tensor([0, 1]), {}, NO_IDS),
    ("text", torch.zeros(1, 4), {}, NO_IDS),
    ("text", torch.tensor([[5, TEXTS.vocabulary, 1]]), {}, NO_IDS),
    ("text", torch.tensor([[5] * 40]), {}, NO_IDS),
    ("text", torch.tensor([[5, 1], [0, 0]]), {}, NO_IDS),
    ("text", torch.tensor([[5, 0, 1]]), {}, NO_IDS),
    ("class", ONE, {"scales": 0}, "scales must lie in 1 ... 3, the scales of the model, it is 0"),
    ("class", ONE, {"scales": 4}, "scales must lie in 1 ... 3, the scales of the model, it is 4"),
    ("class", ONE, {"prefix_codes": torch.zeros(1, 1, 4)}, PREFIX + "3; these are torch.float32"),
    ("class", ONE, {"prefix_codes": zeros(1, 4)}, PREFIX + r"3; .* \[1, 4\]"),
    ("class", ONE, {"prefix_codes": zeros(3, 1, 4)}, PREFIX + r"3; .* \[3, 1, 4\]"),
    ("class", ONE, {"prefix_codes": zeros(1, 1, 5)}, PREFIX + r"3; .* \[1, 1, 5\]"),
    ("class", ONE, {"prefix_codes": zeros(1, 2, 4), "scales": 1}, PREFIX + "1; "),
    ("class", ONE, {"prefix_codes": zeros(1, 1, 4) + 20}, PREFIX),
    ("class", ONE, {"prefix_codes": zeros(1, 1, 4) - 1}, PREFIX),
    ("class", ONE, {"on_scale": print}, "scale_causal"),
    ("class", ONE, {"on_scale": print, "tokenizer": tokenizer_of("full")}, "scale_causal"),
]


@pytest.mark.parametrize(("kind", "prompts", "options", "sentence"), REFUSALS)
def test_refusals(kind, prompts, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        generate(model_of(kind), prompts, PLAIN, **options)


# -- cost ------------------------------------------------------------------------------------------------------------------------------


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_keys_and_values_have_memory_of_their_own_once_for_each_batch(monkeypatch, kind, config):
    made, places = [], []

    class Counted(sitlib.model.sequence.KVCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

        def update(self, layer, k_BHTD, v_BHTD):
            places.append((len(made), self.store.data_ptr()))
            k, v = super().update(layer, k_BHTD, v_BHTD)
            for part in (k, v):  # views, not copies
                assert part.untyped_storage().data_ptr() == self.store.untyped_storage().data_ptr()
            return k, v

    monkeypatch.setattr(sitlib.model.sequence, "KVCache", Counted)
    model = model_of(kind)
    generate(model, prompts_of(model), replace(config, batch_size=2))
    halves = 1 if config is PLAIN else 2
    assert [cache.store.shape[2] for cache in made] == [2 * halves, 2 * halves, halves]
    assert [(cache.capacity, cache.length) for cache in made] == [(12, 12)] * 3
    assert len(places) == 3 * 12 * 2 and len(set(places)) == 3  # batches, codes, layers


@class_and_text
@pytest.mark.parametrize("config", [PLAIN, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(("given", "scales"), [(0, 3), (0, 2), (1, 3), (2, 3), (3, 3)])
def test_nothing_is_computed_twice(kind, config, given, scales):
    """Every position goes through the transformer once: the prompt and what is given together, then one code after another."""
    model, passed, read = model_of(kind), [], []
    prefix = generate(model, prompts_of(model), config, scales=given) if given else None
    hooks = [
        model.transformer.register_forward_pre_hook(
            lambda _, inputs: passed.append(tuple(inputs[0].shape[:2]))
        )
    ]
    if kind == "text":
        hook = model.text_encoder.register_forward_pre_hook(
            lambda _, inputs: read.append(inputs[0].shape)
        )
        hooks.append(hook)
    try:
        generate(model, prompts_of(model), config, scales=scales, prefix_codes=prefix)
    finally:
        for hook in hooks:
            hook.remove()
    rows = 5 if config is PLAIN else 10
    steps = [1 + 4 * given] + [1] * (4 * (scales - given) - 1) if given < scales else []
    assert passed == [(rows, length) for length in steps]
    assert sum(steps) == (4 * scales if given < scales else 0)  # the last code is drawn, not read
    longest = max(
        int((row != TEXTS.pad).sum()) for row in TEXTS.encode(CAPTIONS)
    )  # padding is not read
    assert read == ([(rows, longest)] if kind == "text" and given < scales else [])


@class_and_text
def test_samples_can_be_used_in_training(kind):
    model = model_of(kind)
    for prefix in (None, torch.zeros(5, 3, 4, dtype=torch.int64)):
        codes = generate(model, prompts_of(model), GUIDED, prefix_codes=prefix)
        assert not codes.is_inference()
        loss = model.nats_per_token(codes, condition_of(model, prompts_of(model))).sum()
        gradients = torch.autograd.grad(loss, list(model.heads.parameters()))
        assert all(gradient.any() for gradient in gradients)
        codes += 1  # and changed
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    "positions",
    [
        "learned",
        "rotary",
    ],
)
def test_a_model_in_half_precision_draws_too(positions):
    model = AutoregressiveModel(model_of(positions=positions).config).bfloat16().eval()
    codes = generate(model, torch.tensor([0, 1, 2]), GUIDED)
    assert codes.shape == (3, 3, 4) and 0 <= int(codes.min()) <= int(codes.max()) < 20


def test_progress_is_shown_on_request_only(capsys):
    generate(model_of(), torch.tensor([0, 1]), PLAIN)
    assert capsys.readouterr().err == ""
    generate(model_of(), torch.tensor([0, 1]), PLAIN, progress="drawing")
    assert "drawing" in capsys.readouterr().err


def with_memory(monkeypatch, free):
    values = {"SC_AVPHYS_PAGES": free // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", values.__getitem__, raising=False)
    monkeypatch.setattr(os, "sysconf_names", values, raising=False)


@pytest.mark.parametrize(
    "kind",
    [
        "class",
        "text",
    ],
)
def test_the_largest_batch_has_its_keys_and_values_in_half_of_the_free_memory(monkeypatch, kind):
    model = model_of(kind)
    for free, scales, config in itertools.product((2**18, 2**20, 2**21), (1, 3), (PLAIN, GUIDED)):
        with_memory(monkeypatch, free)
        batch = max_batch_size(model, scales, config is GUIDED)
        assert 1 < batch < 1024
        rows = batch if config is PLAIN else 2 * batch

        def needed(rows, scales=scales):
            cache = model.transformer.new_cache(rows, 4 * scales).store.nbytes
            if kind == "text":  # two layers, keys and values, of 32 tokens, in float32
                cache += 2 * 2 * rows * 32 * 16 * 4
            return cache

        assert needed(rows) <= free / 2
        # Nor is much of it left unused: beside them are only logits and what the filters make of these.
        assert needed(rows) > free / 2 / 8


def test_the_largest_batch_is_between_1_and_1024(monkeypatch):
    model = model_of()
    with_memory(monkeypatch, 0)
    assert max_batch_size(model, 3, False) == 1
    with_memory(monkeypatch, 2**50)
    assert max_batch_size(model, 3, False) == 1024
    with_memory(monkeypatch, 2**20)
    sizes = [max_batch_size(model, scales, False) for scales in (1, 2, 3)]
    assert (
        sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    )  # longer sequences need more
    # Two halves need twice as much, and so does double precision.
    assert max_batch_size(model, 1, True) == pytest.approx(sizes[0] / 2, abs=1)
    assert max_batch_size(_double(model), 1, False) == pytest.approx(sizes[0] / 2, abs=1)
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert 1 <= max_batch_size(model, 3, False) <= 1024
    assert torch.equal(
        generate(model, torch.tensor([0, 1]), replace(PLAIN, batch_size=0)),
        generate(model, torch.tensor([0, 1]), PLAIN),
    )
