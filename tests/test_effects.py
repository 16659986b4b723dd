"""Contrasts of ablations against simulated experiments whose truth is known."""

import numpy as np
import pytest

from workbook.effects import (
    contrast,
    difference,
    factorial_effects,
    power_law,
    seed_deviation,
)

PHOTOGRAPHS = [f"p{i}" for i in range(42)]


def row(values, *, photographs=PHOTOGRAPHS):
    """A row from scores [seeds, photographs]."""
    seeds = {
        str(i): {"psnr": float(v.mean()), "by_photograph": {"psnr": v.tolist()}}
        for i, v in enumerate(values)
    }
    return {"photographs": photographs, "seeds": seeds}


def experiment(rng, effects, *, seed_sd=0.1, photo_sd=3.0, pair_sd=0.2):
    """Rows whose true means are `effects`; photographs differ much, and all rows alike."""
    difficulty = rng.normal(0, photo_sd, 42)
    return {
        name: row(
            effect
            + difficulty
            + rng.normal(0, pair_sd, 42)
            + rng.normal(0, seed_sd, (3, 1))
            + np.zeros((3, 42))
        )
        for name, effect in effects.items()
    }


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered, lengths = [], []
    for _ in range(400):
        rows = experiment(rng, {"a": 24.0, "b": 24.5, **{f"other{i}": 24.0 for i in range(6)}})
        found = difference(rows, "b", "a")
        covered.append(found.low < 0.5 < found.high)
        lengths.append(found.high - found.low)
    assert 0.91 < np.mean(covered) < 0.985
    assert (
        np.mean(lengths) < 0.5
    )  # pairing took the difficulty of photographs out: unpaired it would be 2.6 dB


def test_the_deviation_of_seeds_is_pooled_and_failed_seeds_are_left_out():
    rng = np.random.default_rng(1)
    rows = experiment(rng, {f"r{i}": 24.0 for i in range(200)}, seed_sd=0.3)
    rows["r0"]["seeds"]["2"] = {"failed": "the loss is not finite"}
    sigma, freedom = seed_deviation(rows, "psnr")
    assert sigma == pytest.approx(0.3, rel=0.1) and freedom == 199 * 2 + 1
    with pytest.raises(ValueError, match="two seeds"):
        seed_deviation({"a": row(np.zeros((1, 42)))}, "psnr")


def test_factorial_effects_are_those_that_were_put_in():
    truth = {"A": 1.0, "B": -0.5, "A x B": 0.25}
    cells, effects = {}, {}
    for a in (0, 1):
        for b in (0, 1):
            x, y = a - 0.5, b - 0.5
            cells[(a, b)] = f"cell{a}{b}"
            effects[f"cell{a}{b}"] = 24 + x * 1.0 + y * -0.5 + 2 * x * y * 0.25
    rng = np.random.default_rng(2)
    rows = experiment(rng, effects, seed_sd=1e-6, pair_sd=1e-6)
    found = factorial_effects(rows, cells, ["A", "B"])
    assert {name: round(e.value, 4) for name, e in found.items()} == truth
    with_b, without_b = (
        contrast(rows, {cells[(1, b)]: 1.0, cells[(0, b)]: -1.0}).value for b in (1, 0)
    )
    assert found["A x B"].value == pytest.approx((with_b - without_b) / 2)


def test_signs_power_laws_and_different_photographs():
    rng = np.random.default_rng(3)
    rows = experiment(rng, {"a": 24.0, "b": 26.0, "c": 24.01})
    assert [difference(rows, *pair).sign for pair in ("ba", "ab", "ca")] == [1, -1, 0]
    assert power_law([1, 10, 100], [3, 3 * 10**0.7, 3 * 100**0.7]) == pytest.approx((3.0, 0.7))
    rows["d"] = row(np.zeros((3, 42)), photographs=[f"q{i}" for i in range(42)])
    with pytest.raises(ValueError, match="same photographs"):
        difference(rows, "d", "a")
