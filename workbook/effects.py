"""Statistics of ablations: contrasts between rows, with confidence intervals.

A contrast is a weighted sum of rows, such as row - baseline, or the main effect of a factor over
all cells of a factorial. Two variances add up. That of another seed is pooled over rows, because
each has few seeds. That of other photographs is one of paired values, because all rows see the same
photographs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from sitlib.files import read_json
from sitlib.metrics.statistics import LEVEL
from workbook.paths import resolve

Metric = Literal["psnr", "lpips_alex"]


@dataclass(frozen=True)
class Estimate:
    """Value of a contrast, and its confidence interval of 95 %."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def text(self, digits: int = 2) -> str:
        return f"{self.value:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def read_results(folder: str) -> dict[str, dict[str, Any]]:
    """Results of a folder, by name."""
    files = sorted(resolve(folder).glob("*.json"))
    return {file.stem: read_json(file) for file in files}


def read_rows(folder: str = "metrics/ablations") -> dict[str, dict[str, Any]]:
    """Results of ablations by name, of those with a seed that ended well."""
    return {name: row for name, row in read_results(folder).items() if finished_seeds(row)}


def finished_seeds(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores of the seeds whose training ended well."""
    return [scores for scores in row["seeds"].values() if "failed" not in scores]


def mean(row: Mapping[str, Any], metric: str) -> float:
    """Mean of a score over seeds."""
    return float(np.mean([scores[metric] for scores in finished_seeds(row)]))


def seed_deviation(rows: Mapping[str, Mapping[str, Any]], metric: str) -> tuple[float, int]:
    """Standard deviation of a score over seeds, pooled over rows, and its degrees of freedom.

    Raises:
        ValueError: no row has two seeds.
    """
    groups = [np.array([s[metric] for s in finished_seeds(row)]) for row in rows.values()]
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        raise ValueError("no row was trained with two seeds: the deviation of a seed is unknown.")
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return float((squares / freedom) ** 0.5), freedom


def contrast(
    rows: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float],
    metric: Metric = "psnr",
    deviation: tuple[float, int] | None = None,
) -> Estimate:
    """Estimate the weighted sum of rows, as a mean over photographs.

    Args:
        weights: row -> weight.
        deviation: of seeds, from `seed_deviation`. Default: pooled over the rows of the same
            groups, because some trainings (adversarial ones) vary far more than others.

    Raises:
        KeyError: there is no such row.
        ValueError: the rows were judged on different photographs.
    """
    groups = {rows[name].get("group") for name in weights}
    alike = {name: row for name, row in rows.items() if row.get("group") in groups}
    sigma, freedom = deviation or seed_deviation(alike, metric)
    photographs = {tuple(rows[name]["photographs"]) for name in weights}
    if len(photographs) != 1:
        raise ValueError("rows that are compared must have been judged on the same photographs.")
    by_photograph = cast(
        NDArray,
        sum(weight * _by_photograph(rows[name], metric) for name, weight in weights.items()),
    )
    seeds_variance = sum(
        weight**2 * sigma**2 / len(finished_seeds(rows[name])) for name, weight in weights.items()
    )
    photographs_variance = by_photograph.var(ddof=1) / len(by_photograph)
    reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * (seeds_variance + photographs_variance) ** 0.5
    value = float(by_photograph.mean())
    return Estimate(value, float(value - reach), float(value + reach))


def difference(
    rows: Mapping[str, Mapping[str, Any]], name: str, baseline: str, metric: Metric = "psnr"
) -> Estimate:
    """Estimate a row minus a baseline."""
    return contrast(rows, {name: 1.0, baseline: -1.0}, metric)


def factorial_effects(
    rows: Mapping[str, Mapping[str, Any]],
    cells: Mapping[tuple[int, ...], str],
    factors: list[str],
    metric: Metric = "psnr",
) -> dict[str, Estimate]:
    """Estimate main effects and interactions of a full factorial of two levels.

    Args:
        cells: levels of the factors (0 or 1 each) -> row.
        factors: their names.

    Returns:
        factor -> the mean gain over the cells of the others; several factors, joined by " x " -> by
        how much the effect of one is larger with the others than without, for two factors half of
        it.
    """
    effects = {}
    for used in product((0, 1), repeat=len(factors)):
        if not any(used):
            continue
        weights = {
            row: np.prod([2 * level - 1 for level, use in zip(levels, used, strict=True) if use])
            / 2 ** (len(factors) - 1)
            for levels, row in cells.items()
        }
        name = " x ".join(factor for factor, use in zip(factors, used, strict=True) if use)
        effects[name] = contrast(rows, weights, metric)
    return dict(sorted(effects.items(), key=lambda item: item[0].count(" x ")))


def power_law(x: list[float], y: list[float]) -> tuple[float, float]:
    """Fit y = a x^b by least squares on logarithms: (a, b)."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(intercept)), float(slope)


def _by_photograph(row: Mapping[str, Any], metric: str) -> NDArray[np.float64]:
    """Mean over seeds of each photograph's score."""
    return np.mean([scores["by_photograph"][metric] for scores in finished_seeds(row)], axis=0)
