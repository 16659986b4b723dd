"""The grid of experiments: every entry is sound, and what it trains and judges is what it says."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tiny import fresh_generator, model_of, photographs, random_codes, tokenizer_of

from sitlib.data import TokenShards, open_images
from sitlib.evaluate import features_of
from sitlib.files import read_json
from sitlib.sample.generate import generate
from sitlib.strict import ConfigError, from_dict, to_dict
from workbook import runs, study
from workbook.codes import Codes
from workbook.effects import load_claims
from workbook.evaluate import writing
from workbook.paths import ROOT
from workbook.profile import load_profile
from workbook.study import Generator, Grid, Row, Trials, load_grid
from workbook.tokenizers import held_out_set, open_split, trained_tokenizer

GRID = load_grid()
SMALL = {"optimizer": {"steps": 3, "warmup_steps": 1, "batch_size": 2}, "num_codes": 16}
SMALL["data"] = {"normalization_views": 8}
FEW = {"data.validation_percent": 30, "autoregressive.optimizer.steps": 2}
GENERATOR_TRIALS = Trials({"ar_sit4": {}}, FEW, {"x": {}})
TRIALS = Trials({"vit_vqgan": {}, "sit4": {}}, {"data.validation_percent": 30}, {"x": {}})
ROW = Row("test", "sit4", changes=SMALL, seeds=[0, 1])


def grid(rows=None, generators=None, trials=TRIALS):
    return Grid("smoke", trials, GENERATOR_TRIALS, rows or {}, generators or {})


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """Models, states and metrics are written below tmp_path."""

    def resolve(path):
        is_written = str(path).startswith(("scratch", ".ckpt", "models", "metrics"))
        return (tmp_path if is_written else ROOT) / path

    for module in (study, runs):
        monkeypatch.setattr(module, "resolve", resolve)
    return tmp_path


def test_every_row_is_a_tokenizer_and_every_trial_one_of_each_model():
    for name in GRID.rows:
        profile = GRID.row_profile(name)
        assert list(profile.tokenizer.variants) == [f"row_{name}"]
    for name, model in itertools.product(GRID.trials.changes, GRID.trials.models):
        profile = GRID.trial_profile(name, model)
        assert list(profile.tokenizer.variants) == [f"{name}_{model}"]
        assert profile.data.validation_percent > 0  # chosen by nothing that was held out
    for name in GRID.generator_trials.changes:
        profile = GRID.generator_trial_profile(name)
        assert profile.data.validation_percent > 0
        assert set(GRID.generator_trials.models) <= set(profile.autoregressive.variants)


def test_every_claim_is_about_rows_with_several_seeds():
    for claim in load_claims().values():
        assert all(len(GRID.rows[name].seeds) > 1 for name in claim.rows)
        assert sum(claim.rows.values()) == pytest.approx(0)


def test_every_generator_is_the_profile_but_for_itself():
    usual, orders = load_profile(GRID.profile), set()
    for name, entry in GRID.generators.items():
        profile = GRID.generator_profile(name)
        assert profile.tokenizer == usual.tokenizer
        section = profile.generator_section(entry.of)
        assert section.evaluation == usual.generator_section(entry.of).evaluation
        orders.add(profile.autoregressive_variant(entry.of).order)
    assert len(orders) == 4


def grid_with(**changes):
    return from_dict(Grid, to_dict(GRID) | changes)


MANY = to_dict(GENERATOR_TRIALS) | {"models": {"ar_sit4": {"layers": 2}}}
FASTER = Trials({"sit4": {}}, {}, {"x": {"data.speed": 2}})
FLIPPED = {"of": "ar_sit4", "changes": {"data.flip": False}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GRID.row_profile("sit4_ourss"), "did you mean 'sit4_ours'"),
        (lambda: grid({"x": Row("x", "sit4", changes={"gird": 4})}).row_profile("x"), "x.*gird"),
        (lambda: grid_with(rows={"x": {}}), "rows.x.*group"),
        (lambda: from_dict(Generator, FLIPPED), r"are of autoregressive or text, not data\.flip"),
        (lambda: GRID.generator_profile("photographs_by_plaec"), "mean 'photographs_by_place'"),
        (lambda: grid_with(generator_trials=MANY), "models are taken as the profile has them"),
        (lambda: grid(trials=FASTER).trial_profile("x", "sit4"), "data.speed, which the profile"),
    ],
)
def test_mistakes_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_row_is_trained_and_judged_with_every_seed(own_folder, monkeypatch, weights_folder):
    monkeypatch.setattr(study, "held_out_set", partial(held_out_set, count=6))
    monkeypatch.setattr(study, "load_grid", lambda: grid({"row": ROW}))
    study.judge_row(load_profile("smoke"), "row")
    result = read_json(own_folder / "metrics/study/rows/row.json")
    assert set(result["seeds"]) == {"0", "1"} and result["steps"] == 3
    first, second = result["seeds"].values()
    assert first["psnr"] != second["psnr"] and 0 <= first["usage"] <= 100
    assert len(first["by_photograph"]["lpips_vgg"]) == len(result["photographs"])
    assert first["preview_psnr"][3:] == [pytest.approx(first["psnr"])]
    assert sum(first["error_by_scale"]) > 0 and len(first["error_by_scale"]) == 4
    assert 0 < first["coded_bits"] < result["bits"] + 64  # hardly trained codes are no more even
    assert result["parameters"] > 1000 and result["flops_per_image"] > 1e6
    assert not list((own_folder / "scratch/tokenizer").glob("row_row-*"))  # models are not kept


def test_a_trial_trains_on_other_photographs_than_it_is_judged_by(
    own_folder, monkeypatch, weights_folder
):
    seen = []

    def trained_and_noted(profile, name, seed):
        seen.append(set(open_split(profile.tokenizer_data(name), "train").keys))
        return trained_tokenizer(profile, name, seed)

    monkeypatch.setattr(study, "trained_tokenizer", trained_and_noted)
    trials = replace(TRIALS, common=TRIALS.common | SMALL_KEYS)
    monkeypatch.setattr(study, "load_grid", lambda: grid(trials=trials))
    study.judge_recipe(load_profile("smoke"), "x")
    models = read_json(own_folder / "metrics/study/trials/x.json")["models"]
    held_out = set(open_images(ROOT / "data/landscapes", "test").keys)
    for scores, keys in zip(models.values(), seen, strict=True):
        assert not {*scores["photographs"]} & (keys | held_out)


SMALL_KEYS = {f"tokenizer.optimizer.{key}": x for key, x in SMALL["optimizer"].items()}
SMALL_KEYS |= {"tokenizer.common.num_codes": 16, "data.normalization_views": 8}
SMALL_KEYS["tokenizer.evaluation.sets.landscapes.views"] = 6


def test_a_training_that_fails_is_a_result(own_folder, monkeypatch):
    def fails(profile, name, seed):
        raise FloatingPointError("the loss is not finite at step 7")

    monkeypatch.setattr(study, "trained_tokenizer", fails)
    monkeypatch.setattr(study, "load_grid", lambda: grid({"row": replace(ROW, seeds=[0])}))
    study.judge_row(load_profile("smoke"), "row")
    result = read_json(own_folder / "metrics/study/rows/row.json")
    assert result["seeds"] == {"0": {"failed": "the loss is not finite at step 7"}}


def test_a_generator_is_judged_with_every_seed_and_without_sweeps(monkeypatch):
    def measured(model, profile, *_):
        assert profile.text.evaluation.top_p_sweep == profile.text.evaluation.guidance_sweep == []
        return {"nats_per_image": float(model.seed)}

    def trained(profile, variant, seed):
        (model := fresh_generator("text")).seed = seed
        return SimpleNamespace(model=model, curve={"seconds": [1.0, 7.0]})

    entry = Generator("ar_captioned_sit4_sc", {"text.optimizer.steps": 5}, [0, 3])
    fakes = {"fetch_weights": lambda: None, "half_written": lambda *_: 1, "by_passes": lambda *_: 2}
    fakes |= {"trained_generator": trained, "load_grid": lambda: grid(generators={"x": entry})}
    fakes |= {"generation.draw_all": lambda *_: None, "generation.measure_generator": measured}
    fakes["generation.real_features"] = lambda *_: {"held_out": None}
    for name, function in fakes.items():
        monkeypatch.setattr(f"workbook.study.{name}", function)
    scores = study.run_generator(load_profile("smoke"), "x")
    assert scores["steps"] == 5 and [*scores["seeds"]] == ["0", "3"]
    told = {"nats_per_image": 3.0, "half_written": 1, "by_passes": 2, "seconds": 7.0}
    assert scores["seeds"]["3"] == told


def test_half_written_images_keep_the_first_half_of_their_codes(monkeypatch, weights_folder):
    model, tokenizer, profile = model_of("class"), tokenizer_of(), load_profile("smoke")
    codes, drawn = random_codes(model, 6), []
    held_out = Codes(cast(TokenShards, codes), torch.zeros(6), codes, torch.zeros(6), ["a"])
    monkeypatch.setattr(writing, "load_codes", lambda *_: held_out)
    monkeypatch.setattr(study.generation, "tokenizer_of", lambda *_: tokenizer)
    monkeypatch.setattr(study.generation, "held_out_prompts", lambda *_: torch.zeros(6).long())

    def noted(*arguments, **given):
        drawn.append(generate(*arguments, **given))
        return drawn[-1]

    monkeypatch.setattr(writing, "generate", noted)
    scores = writing.half_written(model, profile, "ar_sit5_sc")
    same = (drawn[0] == codes).flatten(1).float().mean(0)
    assert same[:40].min() == 1 and same[40:].mean() < 0.5
    errors = (tokenizer.decode(drawn[0]) - tokenizer.decode(codes)).square().mean(dim=(1, 2, 3))
    assert scores["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-4)


def test_the_list_has_every_result_as_it_is(tmp_path, monkeypatch):
    committed = (ROOT / study.LIST).read_text()
    monkeypatch.setattr(study, "LIST", tmp_path / "results.csv")
    study.write_list()
    assert (tmp_path / "results.csv").read_text() == committed


def test_a_masked_model_is_measured_at_several_passes_and_another_once(monkeypatch, weights_folder):
    profile, tokenizer = load_profile("smoke"), tokenizer_of()
    c, views = tokenizer.config, photographs(12)
    sizes = (c.num_scales, c.tokens_per_scale, c.num_codebooks, c.codebook_sizes)
    monkeypatch.setattr(writing.generation, "tokenizer_of", lambda *_: tokenizer)
    monkeypatch.setattr(writing.generation, "held_out_images", lambda *_: [views])
    asked = torch.arange(12) % 3
    monkeypatch.setattr(writing.generation, "asked_in_sweeps", lambda *_: asked)
    real = features_of([views])
    for is_masked, passes in ((True, [1, 2, 4, 8, 16]), (False, [None])):
        model = fresh_generator("class", *sizes, width=32, masked=is_masked)
        rows = writing.by_passes(model, profile, "ar_sit5_sc", real)
        assert [row["passes"] for row in rows] == passes
        for row in rows:
            assert row["images_per_second"] > 0
            assert row["fd_lite0"] != row["to_reconstructions"]["fd_lite0"]
