"""Costs of models: sizes and tokens as in the paper, times and memory of what is asked for."""

import pytest
import torch

from workbook import costs
from workbook.profile import load_profile

PAPER, QUICK, SMOKE = map(load_profile, ("paper", "quick", "smoke"))


def test_sit_grows_by_a_scale_with_every_doubling_and_the_baseline_fourfold():
    def tokens(variant, size):
        config = costs.scaled_config(QUICK, variant, size)
        return config.num_scales * config.tokens_per_scale

    assert [tokens("sit4", size) for size in (64, 128, 1024)] == [64, 80, 128]
    assert [tokens("vit_vqgan", size) for size in (64, 128, 1024)] == [64, 256, 16384]


def test_costs_are_those_of_the_model_that_is_asked_for():
    row = costs.size_costs(SMOKE, "vit_vqgan", 64)
    assert row["tokens"] == 64 and row["flops"] > 1e6 and row["memory_mb"] >= 0
    assert all(row[key] > 0 for key in ("encode", "decode", "train", "sample"))


@pytest.mark.parametrize(("geometry", "tokens"), [("profile", 64), ("paper", 1024)])
def test_both_models_have_as_many_tokens_and_the_same_transformer(geometry, tokens):
    configs, shape = costs.geometries(QUICK)[geometry]
    models = [costs.random_generator(shape, config) for config in configs.values()]
    assert [model.num_tokens for model in models] == [tokens, tokens]
    shapes = [[tuple(p.shape) for p in model.transformer.parameters()] for model in models]
    assert shapes[0] == shapes[1]


def test_the_papers_table_is_of_its_text_conditional_model():
    configs, shape = costs.geometries(PAPER)["paper"]
    assert (shape.layers, shape.width, shape.text.layers) == (12, 1024, 12)
    assert {config.size for config in configs.values()} == {256}


@pytest.mark.parametrize("told", ["profile", "paper"])  # a class, a text
@pytest.mark.parametrize("name", costs.GENERATORS)
def test_images_have_the_size_that_is_asked_for(name, told, monkeypatch):
    of_each = costs.geometries(SMOKE)
    small = of_each["profile"][0], of_each[told][1]
    monkeypatch.setattr(costs, "geometries", lambda _: {told: small})
    draw = costs.sampler(SMOKE, name, told, 2)
    for share in costs.SHARES:
        assert draw(share).shape == (2, 3, 64 // share, 64 // share)


def test_the_peak_of_another_process_is_its_own():
    ballast = torch.ones(300_000_000, dtype=torch.uint8)  # this process has a peak of 300 MB more
    peak = costs.in_own_process(costs.sampling_peaks, SMOKE, costs.BASELINE, "profile", 4)["1"]
    assert 0.5 < peak < 200 and len(ballast)
