"""Ablations: the list is sound, and a row is trained and judged as it says."""

from dataclasses import replace

import pytest
import yaml

from sitlib.strict import ConfigError, from_dict
from workbook import ablations as module
from workbook.ablations import gradient_statistics, run_row
from workbook.claims import CLAIMS, METRICS, finding_rows, findings, mechanism_effects
from workbook.paths import ROOT
from workbook.rows import AblationRow, Ablations, load_ablations

SMALL = {
    "tokenizer.optimizer.steps": 3,
    "tokenizer.optimizer.warmup_steps": 1,
    "tokenizer.optimizer.batch_size": 2,
    "tokenizer.loss.quant_warmup_steps": 0,
    "tokenizer.common.num_codes": 16,
    "data.normalization_views": 8,
}


def test_every_row_is_a_tokenizer_and_every_claim_is_about_rows():
    listed = load_ablations()
    for name in listed.rows:
        profile = listed.profile_of(name)
        assert list(profile.tokenizer.variants) == [name]
        assert profile.tokenizer_training(name).optimizer.steps in (300, 500)
    runs = {str(listed.profile_of(name).tokenizer_variant(name)) for name in listed.rows}
    assert len(runs) >= len(listed.rows) - 12  # those of the losses differ in their training only
    for claim in CLAIMS:
        assert set(claim.weights) <= set(listed.rows), claim.claim
        assert sum(claim.weights.values()) == pytest.approx(0)


def test_the_core_rows_of_the_pipeline_are_rows_of_the_grid():
    parameters = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert set(parameters["core_ablations"]) <= set(load_ablations().rows)


def test_rows_in_the_parameters_group_have_as_many_parameters_as_typed_ones():
    listed = load_ablations()

    def parameters(name):
        config = listed.profile_of(name).tokenizer_variant(name)
        return module.cost(module.SpectralTokenizer(config))["parameters"]

    for way in ("wavelet", "pyramid", "raster"):
        typed, wide, shared = (
            parameters(f"{way}_{kind}_full") for kind in ("typed", "wide", "shared")
        )
        assert wide == pytest.approx(typed, rel=0.01) and shared < 0.7 * typed


def test_a_row_is_trained_and_judged_with_every_seed(tmp_path, monkeypatch):
    for part in ("runs", "ablations"):
        monkeypatch.setattr(f"workbook.{part}.resolve", lambda path: _kept(tmp_path, path))
    causal = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}
    row = AblationRow("test", {"levels": 3, "grid_size": 4, **causal})
    listed = Ablations("smoke", [0, 1], SMALL, {"row": row}, {}, {})
    real = module.held_out_set

    def few(profile, size):
        views, keys = real(profile, size=size)
        return views[:6], keys[:6]

    monkeypatch.setattr(module, "held_out_set", few)
    result = run_row(listed, "row")
    assert set(result["seeds"]) == {"0", "1"} and result["steps"] == 3
    first, second = result["seeds"].values()
    assert first["psnr"] != second["psnr"]
    assert len(first["by_photograph"]["psnr"]) == len(result["photographs"])
    assert len(first["first_scales"]) == 4
    assert first["first_scales"][-1] == pytest.approx(first["psnr"], abs=1e-3)
    again = run_row(listed, "row")  # found again, not trained again
    assert again["seeds"]["0"]["psnr"] == first["psnr"]
    assert again["seeds"]["0"]["seconds"] == first["seconds"]
    module.forget(listed, "row")
    assert not list((tmp_path / "scratch/tokenizer").glob("row-*"))


def _kept(folder, path):
    """Models and states of a test in its own folder, everything else where it is."""
    own = ("scratch", ".ckpt", "models", "metrics")
    return folder / path if str(path).startswith(own) else ROOT / path


def test_a_training_that_fails_is_a_result(monkeypatch):
    def fails(profile, name, seed):
        raise FloatingPointError("the loss is not finite at step 7")

    monkeypatch.setattr(module, "trained_tokenizer", fails)
    row = AblationRow("test", {"levels": 3, "grid_size": 4})
    result = run_row(Ablations("smoke", [0], SMALL, {"row": row}, {}, {}), "row")
    assert result["seeds"] == {"0": {"failed": "the loss is not finite at step 7"}}


def test_rows_with_a_mistake_are_refused_by_name():
    listed = load_ablations()
    wrong = replace(listed, rows={"broken": AblationRow("x", {"levels": 3, "gird": 4})})
    with pytest.raises(ConfigError, match="broken.*gird|gird"):
        wrong.profile_of("broken")
    with pytest.raises(ConfigError, match="did you mean 'cdf97'"):
        listed.profile_of("cdf79")
    with pytest.raises(ConfigError, match="kind"):
        from_dict(
            Ablations,
            {**yaml.safe_load((ROOT / "ablations/params.yaml").read_text()), "ladder": {"x": {}}},
        )


def test_gradient_statistics_find_the_spike():
    norms = [1.0] * 60 + [7.0] + [1.0] * 40 + [4.0]
    found = gradient_statistics(norms)
    assert found == {"median": 1.0, "largest": 7.0, "spikes": 1}


def test_claims_without_rows_say_so():
    found = findings({})
    assert {item.verdict for item in found} == {"not run"} and len(finding_rows(found)) == len(
        CLAIMS
    )


def judged(psnr, lpips_alex):
    """A row with these means over three seeds and four photographs that differ little."""
    spread, photographs = (-0.001, 0.0, 0.001), ("a", "b", "c", "d")

    def scores(seed):
        about = {"psnr": psnr, "lpips_alex": lpips_alex}
        own = {
            metric: [value + seed + spread[i % 3] for i in range(4)]
            for metric, value in about.items()
        }
        return {**about, "by_photograph": own}

    return {
        "photographs": photographs,
        "seeds": {str(i): scores(seed) for i, seed in enumerate(spread)},
    }


@pytest.mark.parametrize(
    ("better_psnr", "better_lpips", "better", "worse"),
    [
        (0.5, 0.1, "holds", "does not hold"),
        (0.5, 0.0, "holds", "does not hold"),
        (0.0, 0.1, "holds", "does not hold"),
        (0.0, 0.0, "cannot be told", "cannot be told"),
        (0.5, -0.1, "cannot be told", "cannot be told"),
        (-0.5, 0.0, "does not hold", "holds"),
    ],
)
def test_a_claim_holds_where_one_score_moves_its_way_and_none_against_it(
    better_psnr, better_lpips, better, worse
):
    """`better`: of a claim that the second row is the better one; `worse`: of one that it is the worse one."""
    rows = {
        "wavelet_shared_full": judged(20.0, 0.3),
        "wavelet_typed_full": judged(20.0 + better_psnr, 0.3 - better_lpips),
        "wavelet_typed_decoder_causal": judged(20.0 + 2 * better_psnr, 0.3 - 2 * better_lpips),
    }
    verdicts = {item.claim.source: item for item in findings(rows) if item.psnr is not None}
    assert verdicts["First experiment 2; mechanism 1"].verdict == better
    costs = verdicts["First experiment 3; trade-offs"]
    assert costs.claim.expected == -1 and costs.verdict == worse
    assert costs.psnr.value == pytest.approx(better_psnr, abs=1e-6)


def test_effects_of_mechanisms_are_what_each_adds():
    added = {"wavelet": 0.4, "typed": 0.3, "causal": -0.2}
    rows = {
        f"{way}_{kind}_{attention}": judged(
            20.0 + sum(added.get(level, 0.0) for level in (way, kind, attention)), 0.3
        )
        for way in ("wavelet", "raster")
        for kind in ("shared", "typed")
        for attention in ("full", "causal")
    }
    found = mechanism_effects(rows)
    assert all(
        title.startswith("against blocks: ") for title in found
    )  # no row of a pyramid is there
    effects = [found[f"against blocks: {name}"] for name in ("wavelets", "typed parameters")]
    assert [effect["psnr"].value for effect in effects] == pytest.approx([0.4, 0.3])
    assert found["against blocks: scale-causal attention"]["psnr"].value == pytest.approx(-0.2)
    assert len(found) == 7 and set(effects[0]) == set(METRICS)
    assert found["against blocks: wavelets x typed parameters"]["psnr"].value == pytest.approx(
        0, abs=1e-9
    )
