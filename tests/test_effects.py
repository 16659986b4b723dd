"""Intervals, contrasts and verdicts against scipy, definitions and simulated studies."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from workbook import effects
from workbook.effects import Claim, contrast, holm, interval, power_law, seed_prior, verdicts


def row(values, *, names="012", failed=(), photographs="p"):
    """A row of the study from scores [seeds, photographs]."""
    seeds = {
        name: {"psnr": v.mean(), "fd_lite0": v[0], "by_photograph": {"psnr": v.tolist()}}
        for name, v in zip(names, values, strict=False)
    }
    seeds |= {name: {"failed": "the loss is not finite"} for name in failed}
    names = [f"{photographs}{i}" for i in range(values.shape[1])]
    return {"steps": 1400, "photographs": names, "seeds": seeds}


def scores(rng, mean, *, seed_sd, photo_sd, pair_sd=0.0, count=3, photographs=23):
    """Scores of a row: what seeds add, what photographs add, what a seed does to each of them."""
    seeds, photos = rng.normal(0, seed_sd, (count, 1)), rng.normal(0, photo_sd, photographs)
    return mean + seeds + photos + rng.normal(0, pair_sd, (count, photographs))


def level(*values, photographs=23):
    """Scores of seeds that are the same on all photographs."""
    return np.repeat(np.array(values)[:, None], photographs, axis=1)


def minus(first, second):
    return {first: 1.0, second: -1.0}


@given(
    scales=st.tuples(st.floats(0, 1), st.just(1.0)),
    freedoms=st.tuples(st.floats(2, 50), st.floats(2, 50)),
    size=st.floats(0.1, 30),
)
@settings(max_examples=15, deadline=None)
def test_errors_of_seeds_and_photographs_add_up_as_drawn_ones_do(scales, freedoms, size):
    found = effects.error_beyond(size, [*zip(scales, freedoms, strict=True)])
    rng = np.random.default_rng(0)
    drawn = sum(s * rng.standard_t(f, 400_000) for s, f in zip(scales, freedoms, strict=True))
    p = np.mean(abs(drawn) >= size)
    assert found == pytest.approx(p, abs=4 * np.sqrt((p + 1e-5) / 400_000))
    assert effects.error_beyond(0, [*zip(scales, freedoms, strict=True)]) == pytest.approx(1)
    alone = 2 * stats.t.sf(size, freedoms[1])
    assert effects.error_beyond(size, [(1e-12, 2.0), (1.0, freedoms[1])]) == pytest.approx(alone)


class TestIntervals:
    @pytest.mark.parametrize("seed_sd, photo_sd", [(0.1, 2.0), (1.0, 3.0), (1.0, 1.0), (1.0, 0.1)])
    def test_three_seeds_cover_the_truth_as_often_as_they_say(self, seed_sd, photo_sd):
        rng = np.random.default_rng(0)
        sds = {"seed_sd": seed_sd, "photo_sd": photo_sd, "pair_sd": 0.2}
        found = [interval(row(scores(rng, 24, **sds)), "psnr") for _ in range(300)]
        assert 0.93 <= np.mean([e.low < 24 < e.high for e in found]) <= 0.99

    def test_one_seed_has_the_interval_of_a_bootstrap_over_photographs(self):
        values = scores(np.random.default_rng(1), 24, seed_sd=0, photo_sd=2, photographs=42)[:1]
        found = interval(row(values), "psnr")
        bounds = stats.bootstrap(values, np.mean, method="BCa", random_state=0).confidence_interval
        assert found.seeds == 1 and found.value == pytest.approx(values.mean())
        assert found[1:3] == pytest.approx(bounds, abs=0.08 * (bounds.high - bounds.low))

    def test_a_score_of_all_photographs_has_an_interval_of_seeds(self):
        values = np.array([3.0, 4.0, 6.0])
        found = interval(row(level(*values)), "fd_lite0")
        bounds = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
        assert found[1:3] == pytest.approx(bounds, rel=0.05)
        assert interval(row(level(3.0)), "fd_lite0")[1:] == (-np.inf, np.inf, 1, 1)


class TestContrasts:
    a, b = np.array([24.1, 24.3, 24.15]), np.array([24.4, 24.55, 24.5, 24.2])

    def agrees(self, found, test):
        low, high = test.confidence_interval(0.95)
        assert found.p == pytest.approx(test.pvalue, rel=0.03)
        assert found[1:3] == pytest.approx((low, high), abs=0.01 * (high - low))

    def test_rows_have_variances_of_their_own(self):
        rows = {"a": row(level(*self.a)), "b": row(level(*self.b), names="0345", failed="12")}
        found, value = contrast(rows, minus("b", "a")), self.b.mean() - self.a.mean()
        error = np.hypot(stats.sem(self.a), stats.sem(self.b))  # as Welch's, of the fewest seeds
        assert found[1:3] == pytest.approx(stats.t.interval(0.95, 2, value, error), abs=0.01)
        assert found.p == pytest.approx(2 * stats.t.sf(value / error, 2), rel=0.03)

    def test_few_seeds_are_helped_by_what_all_rows_say_of_variances(self):
        """Variances differ by row, some tenfold: intervals keep to their level and are narrower."""
        rng, alone, together = np.random.default_rng(6), [], []
        for _ in range(150):
            sds = 0.1 * np.sqrt(4 / rng.chisquare(4, 16))
            rows = {
                f"row{i}": row(scores(rng, 24, seed_sd=sd, photo_sd=0.01))
                for i, sd in enumerate(sds)
            }
            weights = minus("row1", "row0")
            together.append(contrast(rows, weights))
            alone.append(contrast({name: rows[name] for name in weights}, weights))
        held = np.mean([e.low < 0 < e.high for e in together])
        widths = [np.mean([e.high - e.low for e in found]) for found in (alone, together)]
        assert 0.93 <= held <= 0.99 and widths[1] < 0.75 * widths[0]

    def test_the_prior_of_variances_is_that_which_drew_them(self):
        rng = np.random.default_rng(7)
        sds = np.sqrt(0.04 * 6 / rng.chisquare(6, 4000))
        rows = {str(i): row(level(*rng.normal(24, sd, 3))) for i, sd in enumerate(sds)}
        freedom, size = seed_prior(rows, "psnr")
        assert freedom == pytest.approx(3, rel=0.2) and size == pytest.approx(0.04, rel=0.1)
        alike = {str(i): row(level(*rng.normal(24, 0.2, 3))) for i in range(500)}
        assert seed_prior(alike, "psnr")[0] > 10

    def test_a_row_of_seeds_that_happen_to_agree_moves_the_prior_little(self):
        rng = np.random.default_rng(8)
        sds = 0.2 * np.sqrt(4 / rng.chisquare(4, 24))
        rows = {str(i): row(level(*rng.normal(24, sd, 3))) for i, sd in enumerate(sds)}
        before = seed_prior(rows, "psnr")
        after = seed_prior(rows | {"agreed": row(level(24, 24.001, 24.002))}, "psnr")
        assert after == pytest.approx(before, rel=0.35)

    def test_photographs_are_paired(self):
        rng = np.random.default_rng(2)
        a, difference = rng.normal(24, 3, 23), rng.normal(0.1, 0.2, 23)
        rows = {"a": row(np.tile(a, (3, 1))), "b": row(np.tile(a + difference, (3, 1)))}
        found = contrast(rows, minus("b", "a"))
        self.agrees(found, stats.ttest_1samp(difference, 0))
        told = contrast(rows, {"a": 1, "b": -1})
        for other in ({"steps": 700}, {"photographs": ["another"]}):  # do not say how these vary
            others = {str(k): row(level(20, 20.0, 20.1 + k)) | other for k in range(9)}
            assert contrast(rows | others, {"a": 1, "b": -1}) == told
        rows["b"]["photographs"][0] = "another"
        with pytest.raises(ValueError, match="same photographs"):
            contrast(rows, minus("b", "a"))

    def test_seeds_and_photographs_add_up_in_an_effect_of_a_factorial(self):
        rng, found = np.random.default_rng(3), []
        weights = {"a": 0.5, "b": 0.5, "c": -0.5, "d": -0.5}
        for _ in range(300):
            hard = rng.normal(0, 3, 23)
            rows = {
                name: row(scores(rng, 24, seed_sd=0.3, photo_sd=0.6) + hard, names=seeds)
                for name, seeds in zip("abcd", ["012"] * 3 + ["345"], strict=True)
            }
            found.append(contrast(rows, weights))
        assert 0.93 <= np.mean([e.low < 0 < e.high for e in found]) <= 0.99
        assert np.mean([e.high - e.low for e in found]) < 1.3  # of photographs unpaired 2.5

    def test_one_seed_or_none_tells_nothing(self):
        rows = {"a": row(level(24.0)), "b": row(level(25.0)), "c": row(level(), failed="012")}
        assert contrast(rows, minus("b", "a")) == (1.0, -np.inf, np.inf, 1.0, 1)
        for name in "cd":
            value, *rest = contrast(rows, minus("a", name))
            assert np.isnan(value) and rest == [-np.inf, np.inf, 1.0, 0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_all_intersections(p_values):
    sets = [s for n in range(len(p_values)) for s in combinations(range(len(p_values)), n + 1)]
    bonferroni = {s: min(1, len(s) * min(p_values[i] for i in s)) for s in sets}
    expected = [max(bonferroni[s] for s in sets if i in s) for i in range(len(p_values))]
    assert holm(p_values) == pytest.approx(expected)


class TestVerdicts:
    def test_say_which_way_a_claim_goes(self):
        rng = np.random.default_rng(4)
        means = {"base": 24, "better": 25, "worse": 23, "equal": 24}
        rows = {n: row(scores(rng, m, seed_sd=0.05, photo_sd=0.2)) for n, m in means.items()}
        claims = {n: Claim(minus(n, "base"), "psnr") for n in [*means, "new"][1:]}
        claims["costs"] = Claim(minus("base", "worse"), "psnr")
        table = verdicts(rows, claims)
        told = ["holds", "the other way round", "undecided", "not run", "holds"]
        assert [judged["verdict"] for judged in table.values()] == told
        adjusted = holm([judged["p"] for judged in table.values()])
        assert [judged["holm"] for judged in table.values()] == pytest.approx(adjusted)
        assert table["better"]["p"] < table["better"]["holm"] < 0.05
        assert table["costs"]["value"] == -table["worse"]["value"]

    def test_few_studies_of_equal_rows_tell_any_apart(self):
        rng, names = np.random.default_rng(5), [f"row{i}" for i in range(10)]
        claims = {name: Claim(minus(name, "base"), "psnr") for name in names}
        told = 0
        for _ in range(80):
            rows = {n: row(scores(rng, 24, seed_sd=0.2, photo_sd=0.3)) for n in [*names, "base"]}
            told += any(j["verdict"] != "undecided" for j in verdicts(rows, claims).values())
        assert told <= 6


def test_power_laws_are_recovered():
    assert power_law([1, 10, 100], [3 * x**0.7 for x in (1, 10, 100)]) == pytest.approx((3, 0.7))
