"""Costs of models: tokens as in the paper, and the memory of processes of their own."""

import pytest
import torch

from workbook import costs
from workbook.profile import load_profile

QUICK, SMOKE = map(load_profile, ("quick", "smoke"))


def test_sit_grows_by_a_scale_with_every_doubling_and_the_baseline_fourfold():
    def tokens(variant, size):
        config = costs.scaled_config(QUICK, variant, size)
        return config.num_scales * config.tokens_per_scale

    assert [tokens("sit4", size) for size in (64, 128, 1024)] == [64, 80, 128]
    assert [tokens("vit_vqgan", size) for size in (64, 128, 1024)] == [64, 256, 16384]


@pytest.mark.parametrize(("geometry", "tokens"), [("profile", 64), ("paper", 1024)])
def test_both_models_have_as_many_tokens_and_the_same_transformer(geometry, tokens):
    configs, shape = costs.geometries(QUICK)[geometry]
    models = [costs.random_generator(shape, config) for config in configs.values()]
    assert [model.num_tokens for model in models] == [tokens, tokens]
    shapes = [[tuple(p.shape) for p in model.transformer.parameters()] for model in models]
    assert shapes[0] == shapes[1]


def test_the_peak_of_another_process_is_its_own():
    ballast = torch.ones(300_000_000, dtype=torch.uint8)  # this process has a peak of 300 MB more
    peak = costs.in_own_process(costs.sampling_peaks, SMOKE, costs.BASELINE, "profile", 4)["1"]
    assert 0.5 < peak < 200 and len(ballast)
