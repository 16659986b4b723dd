"""Contrasts between rows of ablations, with intervals over seeds and photographs.

A contrast is a weighted sum of rows, such as row - baseline, or the main effect of a factor over
all cells of a factorial. Two things make it uncertain: another seed, and other photographs. Rows
have few seeds, so the deviation of a seed is pooled over rows; all rows are judged on the same
photographs, so the contrast is taken photograph by photograph. Both variances add up.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from sitlib.files import read_json
from sitlib.metrics.statistics import LEVEL
from workbook.paths import resolve

Row = Mapping[str, Any]
Rows = Mapping[str, Row]


class Estimate(NamedTuple):
    """A contrast, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def read_results(folder: str) -> dict[str, dict[str, Any]]:
    """Results of a folder, by name."""
    return {path.stem: read_json(path) for path in sorted(resolve(folder).glob("*.json"))}


def finished_seeds(row: Row) -> list[dict[str, Any]]:
    """Scores of the seeds whose training ended well."""
    return [scores for scores in row["seeds"].values() if "failed" not in scores]


def mean(row: Row, metric: str) -> float:
    """Mean of a score over seeds."""
    return float(np.mean([scores[metric] for scores in finished_seeds(row)]))


def seed_deviation(rows: Rows, metric: str) -> tuple[float, int]:
    """Standard deviation that another seed makes, pooled over rows, and its degrees of freedom.

    Raises `ValueError` if no row has two seeds.
    """
    scores = [np.array([s[metric] for s in finished_seeds(row)]) for row in rows.values()]
    freedom = sum(len(values) - 1 for values in scores)
    if not freedom:
        raise ValueError("No row was trained with two seeds: nothing is known of their deviation.")
    squares = sum(((values - values.mean()) ** 2).sum() for values in scores)
    return float((squares / freedom) ** 0.5), freedom


def contrast(rows: Rows, weights: Mapping[str, float], metric: str = "psnr") -> Estimate:
    """The sum of rows by `weights`, row -> weight, as a mean over photographs.

    Raises `ValueError` if the rows were judged on different photographs.
    """
    if len({tuple(rows[name]["photographs"]) for name in weights}) != 1:
        raise ValueError("Rows that are compared must have been judged on the same photographs.")
    # Seeds are pooled over groups, because some trainings (adversarial ones) vary far more.
    groups = {rows[name].get("group") for name in weights}
    pooled = {name: row for name, row in rows.items() if row.get("group") in groups}
    sigma, freedom = seed_deviation(pooled, metric)
    by_photograph, seed_variance = 0.0, 0.0  # the first becomes [P]
    for name, weight in weights.items():
        seeds = [scores["by_photograph"][metric] for scores in finished_seeds(rows[name])]
        by_photograph += weight * np.mean(seeds, axis=0)
        seed_variance += weight**2 * sigma**2 / len(seeds)
    photograph_variance = np.var(by_photograph, ddof=1) / np.size(by_photograph)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * (seed_variance + photograph_variance) ** 0.5
    value = float(np.mean(by_photograph))
    return Estimate(value, float(value - half), float(value + half))


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Factor a and exponent b of y = a x^b, by least squares on logarithms."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(intercept)), float(slope)
