"""Text-conditional models trained otherwise, and figures and comparisons of recognition."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sitlib.strict import ConfigError, from_dict, to_dict
from workbook import text_trials
from workbook.codes import captioned
from workbook.evaluate.text import KINDS
from workbook.figures.ablations import recognition
from workbook.figures.models import retrieval_bars
from workbook.profile import load_profile
from workbook.rows import TextTrial, load_ablations
from workbook.site.compare import r_precision

PROFILE = load_profile("smoke")


def test_every_trial_of_the_grid_is_a_model_of_the_profile_trained_otherwise():
    listed = load_ablations()
    usual = load_profile(listed.profile)
    for trial in listed.text.values():
        profile = trial.profile_of(listed.values())
        assert trial.variant in usual.text.variants
        assert (
            profile.tokenizer == usual.tokenizer
            and profile.text.evaluation == usual.text.evaluation
        )
        assert (profile == usual) == (not trial.changes)


def test_a_trial_that_is_not_about_texts_or_of_no_model_is_refused():
    values = to_dict(load_profile("smoke"))
    with pytest.raises(ConfigError, match=r"changes keys of `text`, not data\.flip"):
        from_dict(TextTrial, {"tokenizer": "captioned_sit4_sc", "changes": {"data.flip": False}})
    with pytest.raises(ConfigError, match="did you mean 'ar_captioned_sit4_sc'"):
        TextTrial("captioned_sit4", {}).profile_of(values)


def test_a_trial_says_how_often_each_name_was_drawn_and_is_judged_without_a_sweep(monkeypatch):
    def measured(model, variant, asked, samples, real, profile):
        assert profile.text.evaluation.top_p_sweep == profile.text.evaluation.guidance_sweep == []
        return {"r_precision_seen": 12.0}

    model = SimpleNamespace(model=torch.nn.Identity(), curve={"seconds": [1.0, 7.0]})
    monkeypatch.setattr(text_trials, "trained_generator", lambda *_: model)
    monkeypatch.setattr(text_trials, "draw_text_samples", lambda *_: {})
    monkeypatch.setattr(text_trials, "measure_text_generator", measured)
    scores = text_trials.run_trial(PROFILE, PROFILE, "ar_captioned_sit4_sc")
    optimizer = PROFILE.generator_optimizer("ar_captioned_sit4_sc")
    names = len(set(captioned(PROFILE, "train").names))
    assert scores["draws_per_name"] == optimizer.steps * optimizer.batch_size / names
    assert scores["seconds"] == 7.0 and scores["r_precision_seen"] == 12.0


def test_recognition_is_drawn_against_draws_with_intervals_and_bounds():
    def judged(value):
        return {"r_precision": value, "interval": [value - 2, value + 3], "chance": 1.0}

    def shown(
        kind, draws
    ):  # of the last kind much more is found: the panels share an axis, which has to hold it
        return judged(draws if kind == list(KINDS)[-1] else draws / 10)

    trials = [
        {
            "variant": f"ar_captioned_{name}",
            "changes": {"text.optimizer.steps": draws},
            "draws_per_name": draws,
            "kinds": {
                kind: {"samples": shown(kind, draws), "reconstruction": judged(50.0)}
                for kind in KINDS
            },
        }
        for name in ("vit_vqgan", "sit4_sc")
        for draws in (60, 30)
    ]
    axes = recognition(trials, KINDS).axes
    assert len(axes) == len(KINDS) and axes[0].get_ylim()[0] == 0 and axes[0].get_ylim()[1] > 63
    line = axes[0].containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[30, 3], [60, 6]])
    other = {**trials[0], "changes": {"text.optimizer.steps": 60, "text.captions.per_image": 43}}
    axis = recognition([*trials, other], KINDS).axes[0]
    assert len(axis.containers) == 3
    assert axis.get_legend_handles_labels()[1][-1].endswith(", 43 captions an image")


# -- comparing models --------------------------------------------------------------------------------------------------------------------


def seeds_of(*by_prompt):
    """Scores of a model's seeds, found captions of one kind of prompts each."""

    def judged(values):
        return {
            "r_precision": float(np.mean(values)),
            "interval": [0.0, 100.0],
            "chance": 1.0,
            "by_prompt": values,
        }

    bounds = {"reconstruction": judged([50.0]), "real": judged([70.0])}
    return [{"kinds": {"seen": {"samples": judged(values), **bounds}}} for values in by_prompt]


def test_recognition_is_a_mean_over_seeds_and_its_difference_is_taken_prompt_by_prompt():
    hard = [0.0, 100.0] * 40  # every other prompt is found by everyone
    ours = seeds_of(hard, hard[:-2] + [100.0, 100.0])
    value, low, high = r_precision(ours, "seen")
    assert value == pytest.approx(np.mean(hard) + 100 / 160) and low < value < high
    assert high - low == pytest.approx(4 * 50 / 80**0.5, rel=0.15)  # of a mean of eighty coins
    value, low, high = r_precision(ours, "seen", seeds_of(hard))
    assert (
        value == pytest.approx(100 / 160) and 0 <= low <= value <= high < 3
    )  # how hard a prompt is drops out
    assert r_precision(ours, "seen", ours) == (0, 0, 0)


def test_bars_of_samples_have_intervals_over_prompts():
    found = [0.0, 100.0, 0.0, 0.0] * 10
    axis = retrieval_bars({"ar_captioned_sit4_sc": seeds_of(found)}, {"seen": "seen names"}).axes[0]
    (bar,) = [
        container
        for container in axis.containers
        if hasattr(container, "has_yerr") and container.has_yerr
    ]
    ((x, low), (_, high)) = bar.lines[2][0].get_segments()[0]
    assert [low, high] == pytest.approx(r_precision(seeds_of(found), "seen")[1:]) and x == -0.2
