"""Bootstrap intervals against a naive loop, all possible resamples and repeated experiments."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.metrics import bootstrap_interval, group_means, paired_interval


def views_of_photographs(seed, photographs=12, spread=1.0):
    """Values of 1 to 5 views of each photograph, in no order, and the photographs' names."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"photo{i}" for i in range(photographs)], rng.integers(1, 6, photographs))
    levels = {name: rng.normal(scale=spread) for name in np.unique(groups)}
    order = rng.permutation(len(groups))
    values = np.array([20 + levels[name] + 0.3 * rng.normal() for name in groups])
    return values[order], groups[order].tolist()


def resampled(statistic, groups, resamples, seed):
    """`statistic` of the places of the views in each resample of photographs: the definition, in a loop."""
    places = [np.flatnonzero(np.array(groups) == name) for name in sorted(set(groups))]
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), resamples)
    return [
        statistic(
            np.concatenate(
                [np.repeat(place, times) for place, times in zip(places, row, strict=True)]
            )
        )
        for row in draws
    ]


class TestInterval:
    @given(seed=st.integers(0, 2**31), level=st.floats(0.5, 0.99))
    @settings(max_examples=10, deadline=None)
    def test_is_that_of_a_naive_loop(self, seed, level):
        values, groups = views_of_photographs(seed)
        means = resampled(lambda views: values[views].mean(), groups, 300, 5)
        expected = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
        found = bootstrap_interval(values, groups, level=level, resamples=300, seed=5)
        np.testing.assert_allclose(found, expected, rtol=1e-9)

    def test_is_that_of_all_possible_resamples(self):
        """Five photographs have 5^5 resamples; many random ones have nearly the same percentiles."""
        values = np.array([3.0, 4.5, 1.2, 9.1, 6.6])
        means = [values[list(drawn)].mean() for drawn in product(range(5), repeat=5)]
        found = bootstrap_interval(torch.from_numpy(values), range(5), resamples=50_000)
        np.testing.assert_allclose(found, np.percentile(means, [2.5, 97.5]), atol=0.05)

    def test_more_equal_views_of_a_photograph_do_not_narrow_it(self):
        values, groups = np.arange(10.0), [f"photo{i}" for i in range(10)]
        once, often = (
            bootstrap_interval(np.repeat(values, n), np.repeat(groups, n)) for n in (1, 20)
        )
        assert often == pytest.approx(once)
        as_if_independent = bootstrap_interval(np.repeat(values, 20), range(200))
        assert np.diff(as_if_independent) < 0.4 * np.diff(once)

    def test_covers_the_truth_as_often_as_it_says(self):
        """With three alike views of each of 40 photographs; intervals over views are far too narrow."""
        rng, hits = np.random.default_rng(0), {"photographs": 0, "views": 0}
        for seed in range(300):
            values = np.repeat(rng.normal(size=40), 3) + 0.2 * rng.normal(size=120)
            for name, groups in (
                ("photographs", np.repeat(np.arange(40), 3)),
                ("views", np.arange(120)),
            ):
                low, high = bootstrap_interval(values, groups, resamples=500, seed=seed)
                hits[name] += low < 0 < high
        assert 0.88 < hits["photographs"] / 300 < 0.98
        assert hits["views"] / 300 < 0.85

    def test_means_and_counts_of_photographs_give_the_interval_of_the_views(self):
        values, groups = views_of_photographs(1)
        photographs, means, counts = group_means(values, groups)
        assert photographs == sorted(set(groups)) and counts.sum() == len(values)
        assert np.average(means, weights=counts) == pytest.approx(values.mean())
        found = bootstrap_interval(means, photographs, counts=counts)
        assert found == pytest.approx(bootstrap_interval(values, groups))
        assert found != pytest.approx(bootstrap_interval(means, photographs))

    def test_is_seeded_and_leaves_the_random_states_alone(self):
        values, groups = views_of_photographs(2)
        state = np.random.get_state()[1].tolist(), torch.get_rng_state()
        first, again, other = (bootstrap_interval(values, groups, seed=seed) for seed in (0, 0, 1))
        assert first == again != other
        assert np.random.get_state()[1].tolist() == state[0]
        assert torch.equal(torch.get_rng_state(), state[1])


class TestPairs:
    @pytest.mark.parametrize("kind", ["difference", "ratio"])
    def test_is_that_of_a_naive_loop(self, kind):
        (values, groups), baseline = views_of_photographs(3), views_of_photographs(3)[0] ** 0.9
        combine = np.subtract if kind == "difference" else np.divide
        estimates = resampled(
            lambda views: combine(values[views].mean(), baseline[views].mean()), groups, 300, 5
        )
        found = paired_interval(values, baseline, groups, kind=kind, resamples=300, seed=5)
        np.testing.assert_allclose(found, np.percentile(estimates, [2.5, 97.5]), rtol=1e-9)

    def test_hard_photographs_do_not_hide_a_small_constant_gain(self):
        values, groups = views_of_photographs(4, spread=5)
        assert paired_interval(values + 0.3, values, groups) == pytest.approx((0.3, 0.3))
        assert paired_interval(1.1 * values, values, groups, kind="ratio") == pytest.approx(
            (1.1, 1.1)
        )
        alone = bootstrap_interval(values + 0.3, groups), bootstrap_interval(values, groups)
        assert alone[0][0] < alone[1][1]  # the intervals of the two models overlap by far

    def test_of_means_and_counts(self):
        values, groups = views_of_photographs(5)
        baseline = values + np.random.default_rng(0).normal(size=len(values))
        (photographs, means, counts), (_, others, _) = (
            group_means(v, groups) for v in (values, baseline)
        )
        found = paired_interval(means, others, photographs, counts=counts)
        assert found == pytest.approx(paired_interval(values, baseline, groups))


@pytest.mark.parametrize(
    "values, groups, options, message",
    [
        ([1.0, 2.0], ["a"], {}, "one for each of the 1 groups"),
        ([[1.0, 2.0]], ["a"], {}, r"\[V\]"),
        ([1.0, float("inf")], ["a", "b"], {}, "finite"),
        ([1.0, 2.0], ["a", "a"], {}, "at least 2 photographs"),
        ([1.0, 2.0], ["a", "b"], {"counts": [1, 0]}, "positive"),
        ([1.0, 2.0], ["a", "b"], {"counts": [1]}, "one for each value"),
        ([1.0, 2.0], ["a", "b"], {"level": 95}, r"\(0, 1\)"),
    ],
)
def test_bad_input(values, groups, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values, groups, **options)
    with pytest.raises(ValueError, match=message):
        paired_interval(values, values, groups, **options)


def test_bad_pairs():
    with pytest.raises(ValueError, match="ratio"):
        paired_interval([1.0, 2.0], [1.0, 2.0], ["a", "b"], kind="quotient")
    with pytest.raises(ValueError, match="positive mean"):
        paired_interval([1.0, 2.0], [-1.0, 2.0], ["a", "b"], kind="ratio")
