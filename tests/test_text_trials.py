"""Figures and comparisons of recognition."""

import numpy as np
import pytest

from workbook.evaluate.text import KINDS
from workbook.figures.ablations import recognition
from workbook.site.compare import r_precision


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
