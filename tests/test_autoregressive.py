"""The next-code model and its sampler: causality, cache, filters, guidance, reproducibility."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.autoregressive import AutoregressiveModel, CodeModelConfig
from sitlib.config import SamplingConfig, load_profile
from sitlib.sampling import draw, filtered_probabilities, generate

CLASSES = ["mountain", "water", "city"]
PLAIN = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, guidance=1.0, batch_size=8, seed=0)


def model_of(num_scales=3, tokens_per_scale=4, num_codes=20):
    """A small model with weights large enough that every prediction is far from uniform."""
    torch.manual_seed(0)
    shape = replace(load_profile("smoke").autoregressive_variant("ar_sit4"), layers=2)
    model = AutoregressiveModel(
        CodeModelConfig(shape, num_scales, tokens_per_scale, num_codes, CLASSES)
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def codes_of(model, batch=2):
    torch.manual_seed(1)
    return torch.randint(
        model.config.num_codes, (batch, model.config.num_scales, model.config.tokens_per_scale)
    )


@pytest.mark.parametrize("num_scales", [1, 3])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(num_scales):
    model = model_of(num_scales)
    codes, labels = codes_of(model), torch.tensor([0, 2])
    whole = model(codes, labels).flatten(1, 2)  # [B, T, K]
    cache = model.transformer.new_cache(2, model.num_tokens)
    x, steps = model.embed_class(labels), []
    for position in range(model.num_tokens):
        steps.append(model.next_logits(x, cache))
        x = model.embed_codes(codes.flatten(1)[:, position : position + 1], position)
    torch.testing.assert_close(torch.stack(steps, dim=1), whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.1  # the comparison is not one of zeros


@torch.no_grad()
def test_a_code_depends_on_earlier_codes_and_the_class_only():
    model = model_of()
    codes, labels = codes_of(model), torch.tensor([0, 2])
    before = model(codes, labels).flatten(1, 2)
    for position in (0, 3, 4, 10):
        changed = codes.flatten(1).clone()
        changed[:, position] = (changed[:, position] + 1) % model.config.num_codes
        after = model(changed.view_as(codes), labels).flatten(1, 2)
        assert torch.equal(after[:, : position + 1], before[:, : position + 1])
        assert not torch.allclose(after[:, position + 1], before[:, position + 1])
    assert not torch.allclose(model(codes, torch.tensor([1, 1])), before.view(2, 3, 4, -1))


@torch.no_grad()
def test_approximation_and_details_have_own_embeddings_and_heads():
    model = model_of()
    codes, labels = codes_of(model), torch.tensor([0, 2])
    before = model(codes, labels)
    model.heads[1].bias += 1
    assert torch.equal(model(codes, labels)[:, 0], before[:, 0])
    assert not torch.equal(model(codes, labels)[:, 1:], before[:, 1:])


@torch.no_grad()
def test_the_first_predictions_of_a_fresh_model_are_uniform_and_nats_are_cross_entropy():
    shape = load_profile("smoke").autoregressive_variant("ar_sit4")
    fresh = AutoregressiveModel(CodeModelConfig(shape, 3, 4, 20, CLASSES)).eval()
    codes, labels = codes_of(fresh), torch.tensor([0, 2])
    torch.testing.assert_close(fresh.nats_per_token(codes, labels), torch.full((3,), 20.0).log())
    model = model_of()
    log_probability = model(codes, labels).double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    torch.testing.assert_close(
        model.nats_per_token(codes, labels).double(), -log_probability.mean((0, 2)), atol=1e-5, rtol=0
    )


# -- sampling --------------------------------------------------------------------------------------------------------------------------


def test_samples_depend_on_the_seed_and_their_index_only():
    model, labels = model_of(), torch.tensor([0, 1, 2, 1, 0])
    together = generate(model, labels, PLAIN)
    assert together.shape == (5, 3, 4)
    assert torch.equal(generate(model, labels, replace(PLAIN, batch_size=2)), together)
    assert torch.equal(generate(model, labels[:2], PLAIN), together[:2])
    assert not torch.equal(generate(model, labels, replace(PLAIN, seed=1)), together)


def test_guidance_of_one_is_no_guidance_and_top_1_is_greedy():
    model, labels = model_of(), torch.tensor([0, 1, 2])
    guided = generate(model, labels, replace(PLAIN, guidance=1.0 + 1e-7))  # takes the guided path
    assert torch.equal(guided, generate(model, labels, PLAIN))
    assert not torch.equal(
        generate(model, labels, replace(PLAIN, guidance=4.0)), generate(model, labels, PLAIN)
    )
    greedy = generate(model, labels, replace(PLAIN, top_k=1))
    with torch.no_grad():
        assert torch.equal(model(greedy, labels).argmax(-1), greedy)


def test_samples_follow_the_models_distribution():
    """First codes of many samples against the probabilities that the model gives them."""
    model = model_of(num_codes=5)
    count = 4000
    first = generate(model, torch.zeros(count, dtype=torch.int64), replace(PLAIN, batch_size=2000))[:, 0, 0]
    with torch.no_grad():
        expected = model(codes_of(model, 1), torch.tensor([0]))[0, 0, 0].softmax(-1)
    observed = torch.bincount(first, minlength=5) / count
    assert (observed - expected).abs().max() < 4 * (0.25 / count) ** 0.5


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 30), st.floats(0.2, 3.0), st.integers(0, 40), st.floats(0.05, 1.0), st.integers(0, 10_000)
)
def test_filters_against_a_plain_version(num_codes, temperature, top_k, top_p, seed):
    logits = torch.randn(3, num_codes, generator=torch.Generator().manual_seed(seed)) * 3
    result = filtered_probabilities(logits, temperature, top_k, top_p)
    for row, got in zip(logits.double(), result, strict=True):
        p = (row / temperature).softmax(-1)
        order = p.argsort(descending=True).tolist()
        if top_k:
            order = order[:top_k]
        p = p / p[order].sum()
        kept, total = [], 0.0
        for index in order:
            if total < top_p - 1e-6 or not kept:
                kept.append(index)
            total += p[index]
        expected = torch.zeros_like(p)
        expected[kept] = p[kept] / p[kept].sum()
        if torch.equal(expected > 0, got > 0):  # a nucleus may end on a rounding error
            torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
        else:
            assert abs(int((got > 0).sum()) - len(kept)) <= 1
    torch.testing.assert_close(result.sum(-1), torch.ones(3))


@pytest.mark.parametrize(("number", "code"), [(0.0, 1), (0.19, 1), (0.21, 2), (1.0, 2)])
def test_drawing_inverts_the_distribution_and_never_draws_what_is_impossible(number, code):
    assert draw(torch.tensor([[0.0, 0.2, 0.8, 0.0]]), torch.tensor([number])).tolist() == [code]


def test_unknown_classes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"0 ... 2 \(mountain, water, city\)"):
        generate(model_of(), torch.tensor([3]), PLAIN)
    assert generate(model_of(), torch.empty(0, dtype=torch.int64), PLAIN).shape == (0, 3, 4)


def test_a_checkpoint_knows_its_classes(tmp_path):
    model = model_of()
    model.save(tmp_path / "model.safetensors")
    again = AutoregressiveModel.from_checkpoint(tmp_path / "model.safetensors")
    assert again.config == model.config
    labels = torch.tensor([0, 1])
    assert torch.equal(generate(again, labels, PLAIN), generate(model, labels, PLAIN))
