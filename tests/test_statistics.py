"""Intervals and contrasts against naive loops, all possible resamples and simulated experiments."""

import numpy as np
import pytest

from sitlib.metrics import bootstrap_interval, group_means, paired_interval
from workbook.effects import contrast, power_law, seed_deviation
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


PHOTOGRAPHS = [f"p{i}" for i in range(42)]


def row(values, *, photographs=PHOTOGRAPHS):
    """A row of ablations from scores [seeds, photographs]."""
    seeds = {
        str(i): {"psnr": float(v.mean()), "by_photograph": {"psnr": v.tolist()}}
        for i, v in enumerate(values)
    }
    return {"photographs": photographs, "seeds": seeds}


def experiment(rng, effects, *, seed_sd=0.1, photo_sd=3.0, pair_sd=0.2):
    """Rows whose true means are `effects`; photographs differ much, and all rows alike."""
    difficulty = rng.normal(0, photo_sd, 42)

    def scores(effect):
        pair, seeds = rng.normal(0, pair_sd, 42), rng.normal(0, seed_sd, (3, 1))
        return effect + difficulty + pair + seeds + np.zeros((3, 42))

    return {name: row(scores(effect)) for name, effect in effects.items()}


def difference(rows, name, baseline):
    return contrast(rows, {name: 1.0, baseline: -1.0})


class TestContrasts:
    def test_intervals_cover_the_truth_as_often_as_they_say(self):
        rng, estimates = np.random.default_rng(0), []
        effects = {"a": 24.0, "b": 24.5, **{f"other{i}": 24.0 for i in range(6)}}
        for _ in range(400):
            estimates.append(difference(experiment(rng, effects), "b", "a"))
        assert 0.91 < np.mean([e.low < 0.5 < e.high for e in estimates]) < 0.985
        # Pairing takes the difficulty of photographs out: unpaired it would be 2.6 dB.
        assert np.mean([e.high - e.low for e in estimates]) < 0.5

    def test_the_deviation_of_seeds_is_pooled_without_failed_seeds(self):
        effects = {f"r{i}": 24.0 for i in range(200)}
        rows = experiment(np.random.default_rng(1), effects, seed_sd=0.3)
        rows["r0"]["seeds"]["2"] = {"failed": "the loss is not finite"}
        sigma, freedom = seed_deviation(rows, "psnr")
        assert sigma == pytest.approx(0.3, rel=0.1) and freedom == 199 * 2 + 1
        with pytest.raises(ValueError, match="two seeds"):
            seed_deviation({"a": row(np.zeros((1, 42)))}, "psnr")

    def test_signs_power_laws_and_different_photographs(self):
        rows = experiment(np.random.default_rng(3), {"a": 24.0, "b": 26.0, "c": 24.01})
        assert [difference(rows, *pair).sign for pair in ("ba", "ab", "ca")] == [1, -1, 0]
        law = power_law([1, 10, 100], [3 * x**0.7 for x in (1, 10, 100)])
        assert law == pytest.approx((3, 0.7))
        rows["d"] = row(np.zeros((3, 42)), photographs=[f"q{i}" for i in range(42)])
        with pytest.raises(ValueError, match="same photographs"):
            difference(rows, "d", "a")


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
