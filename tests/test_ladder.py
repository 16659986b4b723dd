"""The ladder of model sizes, and costs at growing image sizes."""

from dataclasses import replace

import pytest
import torch

from sitlib.model.tokenizer import SpectralTokenizer
from workbook import ladder
from workbook import train_or_load as runs
from workbook.codes import Codes
from workbook.efficiency import configuration, exponents, measured
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.rows import Rung, load_ablations

PROFILE = load_profile("smoke")
RUNG = Rung("diffusion", "sit4", 1, 16, 2, 1e-3, 3, 4, sampling_steps=2)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A tiny diffusion model over random codes, in a folder of its own; and what it takes to train it again."""

    def kept(path):
        return (
            tmp_path / path
            if str(path).startswith(("scratch", ".ckpt", "models", "metrics"))
            else ROOT / path
        )

    monkeypatch.setattr(runs, "resolve", kept)
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(PROFILE.tokenizer_variant("sit4")).eval()
    train, held_out = (torch.randint(64, (count, 4, 16)) for count in (12, 5))
    codes = Codes(
        train,
        torch.zeros(12, dtype=torch.int64),
        held_out,
        torch.zeros(5, dtype=torch.int64),
        ["a"],
    )
    profile = replace(
        PROFILE,
        autoregressive=replace(
            PROFILE.autoregressive,
            optimizer=replace(PROFILE.autoregressive.optimizer, warmup_steps=1),
        ),
    )
    profile = ladder.with_rung(profile, RUNG, "tiny")
    return (
        lambda: ladder.trained_diffusion(profile, "ar_tiny", RUNG, codes, tokenizer, 0),
        codes,
        tokenizer,
    )


def test_a_diffusion_model_is_trained_once_and_found_again(trained):
    train, codes, tokenizer = trained
    (first, run), (again, same) = train(), train()
    assert run == same and len(first.curve["step"]) > 0
    for ours, theirs in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert first.model.config.shape.width == RUNG.width
    error = ladder.held_out_velocity_error(first.model, codes, tokenizer)
    assert error == pytest.approx(
        2.0, abs=0.35
    )  # hardly trained, it says about 0: the variance of the velocity
    assert error == ladder.held_out_velocity_error(first.model, codes, tokenizer)


def test_every_rung_is_a_model_and_sizes_of_a_family_are_the_same():
    listed, profile = load_ablations(), load_profile("quick")
    shapes = {}
    for name, rung in listed.ladder.items():
        config = ladder.with_rung(profile, rung, name).autoregressive_variant(f"ar_{name}")
        assert config.tokenizer == rung.tokenizer
        family, _, size = name.rpartition("_")
        shapes.setdefault(size, set()).add((config.layers, config.width, config.heads))
    assert len(shapes) >= 4 and all(len(found) == 1 for found in shapes.values())


def test_sit_grows_by_a_scale_a_doubling_and_the_baseline_fourfold():
    profile = load_profile("quick")

    def tokens(variant, size):
        config = configuration(profile, variant, size)
        return config.num_scales * config.tokens_per_scale

    assert [tokens("sit4", size) for size in (64, 128, 1024)] == [64, 80, 128]
    assert [tokens("vit_vqgan", size) for size in (64, 128, 1024)] == [64, 256, 16384]


def test_exponents_are_those_of_the_costs():
    rows = [
        {
            "variant": "v",
            "size": size,
            "batch_size": batch,
            "encode": 3.0 * size**2.4,
            "sample": None,
        }
        | dict.fromkeys(("tokens", "parameters", "flops", "decode", "train", "memory_mb"), size**2)
        for size in (64, 128, 256)
        for batch in (1, 4)
    ]
    found = exponents(rows)["v"]
    assert found["encode"] == pytest.approx(1.2) and found["tokens"] == pytest.approx(1.0)
    assert "sample" not in found  # not measured


def test_costs_are_measured_of_the_model_that_is_asked_for():
    found = measured(PROFILE, "vit_vqgan", 64)
    assert found["tokens"] == 64 and found["flops"] > 1e6 and found["memory_mb"] >= 0
    assert all(found[key] > 0 for key in ("encode", "decode", "train", "sample"))
