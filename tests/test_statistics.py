"""Intervals over photographs against naive loops, and the recognition of captions."""

import numpy as np
import pytest

from sitlib.metrics import bootstrap_interval, group_means, paired_interval
from workbook.site.compare import r_precision


def views_of_photographs(seed, photographs=12):
    """Values of 1 to 5 views of each photograph, in no order, and the photographs' names."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"photo{i}" for i in range(photographs)], rng.integers(1, 6, photographs))
    levels = {name: rng.normal() for name in np.unique(groups)}
    order = rng.permutation(len(groups))
    values = np.array([20 + levels[name] + 0.3 * rng.normal() for name in groups])
    return values[order], groups[order].tolist()


def resampled(statistic, groups):
    """Percentiles of `statistic` of the views in each resample of photographs, by definition."""
    views_of = [np.flatnonzero(np.array(groups) == name) for name in sorted(set(groups))]
    rng, count = np.random.default_rng(0), len(views_of)
    draws = rng.multinomial(count, np.full(count, 1 / count), 2000)
    repeated = (map(np.repeat, views_of, times) for times in draws)
    return np.percentile([statistic(np.concatenate(list(v))) for v in repeated], [2.5, 97.5])


class TestInterval:
    @pytest.mark.parametrize("kind", ["mean", "difference", "ratio"])
    def test_equals_a_naive_loop(self, kind):
        values, groups = views_of_photographs(3)
        if kind == "mean":
            expected = resampled(lambda views: values[views].mean(), groups)
            interval = bootstrap_interval(values, groups)
        else:
            baseline, combine = values**0.9, np.subtract if kind == "difference" else np.divide
            expected = resampled(
                lambda views: combine(values[views].mean(), baseline[views].mean()), groups
            )
            interval = paired_interval(values, baseline, groups, kind=kind)
        np.testing.assert_allclose(interval, expected, rtol=1e-9)

    def test_means_and_counts_of_photographs_give_the_interval_of_views(self):
        values, groups = views_of_photographs(1)
        photographs, means, counts = group_means(values, groups)
        assert photographs == sorted(set(groups)) and counts.sum() == len(values)
        assert np.average(means, weights=counts) == pytest.approx(values.mean())
        interval = bootstrap_interval(means, photographs, counts=counts)
        assert interval == pytest.approx(bootstrap_interval(values, groups))

    @pytest.mark.parametrize(
        "values, groups, message",
        [
            ([1.0, 2.0], ["a"], "same length"),
            ([1.0, float("inf")], ["a", "b"], "finite"),
            ([1.0, 2.0], ["a", "a"], "at least 2 photographs"),
        ],
    )
    def test_bad_input(self, values, groups, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(values, groups)
        with pytest.raises(ValueError, match="positive mean"):
            paired_interval([1.0, 2.0], [-1.0, 2.0], ["a", "b"], kind="ratio")


def seeds_of(*by_prompt):
    """Scores of a model's seeds, found captions of one kind of prompts each."""
    return [{"kinds": {"seen": {"samples": {"by_prompt": values}}}} for values in by_prompt]


def test_recognition_is_a_mean_over_seeds_and_its_difference_is_taken_prompt_by_prompt():
    hard = [0.0, 100.0] * 40  # every other prompt is found by everyone
    ours = seeds_of(hard, hard[:-2] + [100.0, 100.0])
    value, low, high = r_precision(ours, "seen")
    assert value == pytest.approx(np.mean(hard) + 100 / 160) and low < value < high
    assert high - low == pytest.approx(4 * 50 / 80**0.5, rel=0.15)  # of a mean of eighty coins
    value, low, high = r_precision(ours, "seen", seeds_of(hard))
    assert value == pytest.approx(100 / 160)
    assert 0 <= low <= value <= high < 3  # how hard a prompt is drops out
    assert r_precision(ours, "seen", ours) == (0, 0, 0)
