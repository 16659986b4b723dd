"""Masked models: what a code may depend on, the cache, samples that follow from their seeds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import class_and_text, condition_of, fresh_generator, prompts_of, random_codes

from sitlib.model.config import SamplingConfig
from sitlib.sample.generate import generate
from sitlib.sample.masked import hidden_after
from sitlib.train.generator import hidden_codes

SAMPLING = SamplingConfig(steps_per_scale=3, seed=4, batch_size=2)
both_positions = pytest.mark.parametrize("pos_emb", ["learned", "rotary"])


def masked(kind="class", **changes):
    model = fresh_generator(kind, tokens_per_scale=9, width=32, masked=True, **changes)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 or name == "hidden":
            torch.nn.init.normal_(parameter, std=0.4)
    return model.double()


@class_and_text
def test_a_code_depends_on_coarser_scales_and_on_what_is_visible_of_its_own(kind):
    model = masked(kind)
    codes, cond = random_codes(model), condition_of(model, 0, 1)
    is_hidden = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    is_hidden[:, 1, 0], is_hidden[:, 1, 1] = True, False
    logits = model(codes, cond, is_hidden)[:, 1]
    for scale, place, is_read in ((0, 4, True), (1, 0, False), (1, 1, True), (2, 3, False)):
        other = codes.clone()
        other[:, scale, place] = (other[:, scale, place] + 1) % 20
        same = torch.allclose(model(other, cond, is_hidden)[:, 1], logits, atol=1e-9)
        assert same != is_read, (scale, place)


@class_and_text
@both_positions
def test_scale_by_scale_with_a_cache_is_one_pass_over_all(kind, pos_emb):
    model = masked(kind, pos_emb=pos_emb, heads=2)
    codes, cond = random_codes(model, 3), condition_of(model, 0, 1, 2)
    is_hidden = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    expected = model(codes, cond, is_hidden)
    with torch.inference_mode():
        state = model.start_scales(cond)
        for scale in range(3):
            of_scale = codes[:, scale], is_hidden[:, scale]
            model.read_scale(state, of_scale[0], ~of_scale[1])  # leaves no trace
            logits = model.read_scale(state, *of_scale)
            torch.testing.assert_close(logits, expected[:, scale], atol=1e-9, rtol=0)
            model.read_scale(state, codes[:, scale])


@class_and_text
def test_samples_follow_from_seed_and_index(kind):
    model = masked(kind)
    asked = prompts_of(kind)
    codes = generate(model, asked, SAMPLING)
    assert codes.shape == (3, 3, 9) and len(codes.unique()) > 9
    assert torch.equal(codes, generate(model, asked, replace(SAMPLING, batch_size=0)))
    assert torch.equal(codes[2:], generate(model, asked[2:], SAMPLING, first_sample=2))
    assert torch.equal(codes[:, :2], generate(model, asked, SAMPLING, scales=2))
    again = generate(model, asked, SAMPLING, prefix_codes=codes[:, :1])
    assert torch.equal(codes, again)
    guided = generate(model, asked, replace(SAMPLING, guidance=2.0))
    assert not torch.equal(codes, guided)
    for steps in (1, 9, 50):
        other = generate(model, asked, replace(SAMPLING, steps_per_scale=steps))
        assert other.shape == codes.shape and not torch.equal(other, codes)


def test_one_pass_draws_from_the_likelihood_of_a_scale():
    """Greedily: the likeliest code of every place, given the scales before."""
    model = masked()
    greedy = SamplingConfig(temperature=1e-5, steps_per_scale=1)
    codes = generate(model, torch.tensor([1]), greedy)
    for scale in range(3):
        logits = model(codes, torch.tensor([1]))[:, scale, :, :20]
        assert torch.equal(codes[:, scale], logits.argmax(-1))


def hidden_in_each_pass(model, sampling, monkeypatch):
    """What is hidden [N] in every pass over the first scale of a sample."""
    read, passes = type(model).read_scale, []

    def noted(self, state, codes, is_hidden=None):
        passes.extend([] if is_hidden is None else is_hidden[:1])
        return read(self, state, codes, is_hidden)

    monkeypatch.setattr(type(model), "read_scale", noted)
    generate(model, torch.tensor([1]), sampling, scales=1)
    return torch.stack(passes)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"temperature": 1e-4}, {"min_p": 0.99}])
def test_the_surest_stay_by_the_models_own_probabilities(filters, monkeypatch):
    model = masked()
    p = model(random_codes(model, 1), torch.tensor([1]))[0, 0, :, :20].softmax(-1).amax(-1)
    greedy = SamplingConfig(**filters, steps_per_scale=3, choice_temperature=0)
    left = hidden_in_each_pass(model, greedy, monkeypatch)[1]
    unsure = p.argsort()[: hidden_after(1, 3, 9)]
    assert left.nonzero().flatten().tolist() == sorted(unsure.tolist())


def test_every_pass_uncovers_something(monkeypatch):
    many = replace(SAMPLING, steps_per_scale=50)
    counts = hidden_in_each_pass(masked(), many, monkeypatch).sum(1).tolist()
    assert counts[0] == 9 and all(more > less for more, less in itertools.pairwise(counts))


def test_scales_are_shown_as_they_are_finished():
    model, shown = masked(), []
    tokenizer = type("Shows", (), {"decode": lambda self, codes: codes.clone()})()
    show = {"tokenizer": tokenizer, "on_scale": lambda *x: shown.append(x)}
    codes = generate(model, torch.tensor([0, 1, 2]), SAMPLING, **show)
    assert [x[:2] for x in shown] == [(0, 1), (0, 2), (0, 3), (2, 1), (2, 2), (2, 3)]
    assert torch.equal(shown[1][2], codes[:2, :2])
    with pytest.raises(ValueError, match="writes whole scales"):
        generate(model, torch.tensor([0]), SAMPLING, prefix_codes=codes[:1], written=12)
    with pytest.raises(ValueError, match="masked models write coarse_to_fine"):
        masked(order="random")


def test_every_scale_has_something_to_predict():
    shares = hidden_codes((500, 4, 16), np.random.default_rng(0)).float().mean(2)
    assert shares.min() >= 1 / 16 and shares.max() == 1
    # The mean of cos(pi u / 2) is 2 / pi; rounding up adds half a code.
    assert float(shares.mean()) == pytest.approx(2 / 3.14159 + 0.5 / 16, abs=0.02)
