"""Judging text-conditional samples: which prompts there are, and that what is right is counted as right."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sitlib.strict import ConfigError, from_dict, to_dict
from workbook import text_evaluation, text_trials
from workbook.codes import captioned
from workbook.figures.ablations import recognition
from workbook.figures.models import retrieval_bars
from workbook.profile import load_profile
from workbook.rows import TextTrial, load_ablations
from workbook.site.compare import r_precision
from workbook.text_evaluation import KINDS, Prompts, prompts, retrieved

PROFILE = load_profile("smoke")
COUNT = PROFILE.text.evaluation.prompts


@cache
def asked(kind):
    return prompts(PROFILE, kind)


def test_each_kind_of_prompts_is_what_its_title_says():
    trained_on = captioned(PROFILE, "train")
    every = {text for captions in trained_on.captions for text in captions}
    for kind in KINDS:
        found = asked(kind)
        assert len(found.captions) == len(set(found.names)) == len(found.images) == COUNT
        assert (set(found.names) <= set(trained_on.names)) == (kind != "held_out")
    assert not set(asked("held_out").names) & set(trained_on.names)
    seen, known = asked("seen"), asked("known")
    assert seen.names == known.names and torch.equal(seen.images, known.images)
    assert seen.known == known.captions and set(known.captions) <= every
    assert not set(seen.captions) & every
    assert asked("held_out").captions == asked("held_out").known


class Judge:
    """Knows the caption that belongs to each image: the brightness of image i is i."""

    def __init__(self, captions):
        self.captions, self.text_tokenizer = captions, self

    def encode(self, texts, truncate):
        return torch.tensor([self.captions.index(text) for text in texts])

    def similarity(self, features, tokens):
        return (features[:, None] == tokens).float()


@pytest.mark.parametrize("wrong", [0, 3, 8])
def test_r_precision_is_the_share_of_samples_that_show_what_was_asked_for(monkeypatch, wrong):
    captions = [f"known {i}" for i in range(8)]
    monkeypatch.setattr(text_evaluation, "judge_features", lambda images, *_: images[:, 0, 0, 0])
    shown = torch.arange(8.0)
    shown[:wrong] += 100  # of nothing that has a caption
    images = shown.view(8, 1, 1, 1).expand(8, 3, 2, 2)
    told = Prompts(
        "seen", [f"new {i}" for i in range(8)], captions, [str(i) for i in range(8)], images
    )
    settings = replace(PROFILE.text.evaluation, candidates=4, prompts=8, kid_subset_size=2)
    profile = replace(PROFILE, text=replace(PROFILE.text, evaluation=settings))
    found = retrieved(Judge(captions), images, told, profile, None, "")
    # Where nothing fits, all candidates are alike and share the first place.
    assert found["r_precision"] == pytest.approx(
        100 * (8 - wrong) / 8 + wrong / 8 * found["chance"]
    )
    low, high = found["interval"]
    assert low <= found["r_precision"] <= high and found["chance"] == 25
    assert found["by_prompt"] == [25.0] * wrong + [100.0] * (8 - wrong)


# -- longer training ---------------------------------------------------------------------------------------------------------------------


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
    def judged(model, variant, real, profile):
        assert profile.text.evaluation.top_p_sweep == profile.text.evaluation.guidance_sweep == []
        return {}, {"r_precision_seen": 12.0}

    model = SimpleNamespace(model=None, curve={"seconds": [1.0, 7.0]})
    monkeypatch.setattr(text_trials, "fetch_weights", lambda: None)
    monkeypatch.setattr(text_trials, "trained_generator", lambda *_: model)
    monkeypatch.setattr(text_trials, "real_text_features", lambda _: {})
    monkeypatch.setattr(text_trials, "judged_generator", judged)
    found = text_trials.run_trial(PROFILE, PROFILE, "ar_captioned_sit4_sc")
    optimizer = PROFILE.generator_optimizer("ar_captioned_sit4_sc")
    names = len(set(captioned(PROFILE, "train").names))
    assert found["draws_per_name"] == pytest.approx(optimizer.steps * optimizer.batch_size / names)
    assert found["seconds"] == 7.0 and found["r_precision_seen"] == 12.0


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
