"""Recognition of text-conditional samples: means over seeds, differences prompt by prompt."""

import numpy as np
import pytest

from workbook.site.compare import r_precision


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
