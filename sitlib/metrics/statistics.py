"""Confidence intervals by bootstrap over photographs.

Views of one photograph are alike, so whole photographs are resampled with all their views (cluster
bootstrap; Davison and Hinkley 1997, section 3.8). Intervals are percentiles; below about 20
photographs they come out too narrow. They say nothing about training seeds.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sitlib.strict import require

LEVEL = 0.95
RESAMPLES = 2000


def group_means(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[list, NDArray, NDArray]:
    """Photographs, sorted, and means [G] of values [V] over the views of each, and their counts."""
    photographs, sums, counts = _sums(values, groups)
    return photographs.tolist(), sums / counts, counts.astype(int)


def bootstrap_interval(
    values: ArrayLike, groups: Sequence[Hashable], *, counts: ArrayLike | None = None
) -> tuple[float, float]:
    """Confidence interval (low, high) of 95 % of the mean over views of photographs.

    Values [V] are of views of the photographs `groups`, or means of so many views as `counts` says.
    """
    return paired_interval(values, np.zeros(len(groups)), groups, counts=counts)


def paired_interval(
    values: ArrayLike,
    baseline_values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    kind: Literal["difference", "ratio"] = "difference",
    counts: ArrayLike | None = None,
) -> tuple[float, float]:
    """Confidence interval of a model's mean minus, or divided by, a baseline's on the same views.

    Both are resampled together, so that hard photographs do not widen the interval.
    """
    _, sums, views = _sums(values, groups, counts)
    _, baseline_sums, _ = _sums(baseline_values, groups, counts)
    is_finite = bool(np.isfinite([sums, baseline_sums]).all())
    require(is_finite, "values must be finite: leave out the others, in both models of a pair.")
    count = len(sums)
    require(count >= 2, "An interval needs the views of at least 2 photographs.")
    # How many times each resample holds each photograph, [R, G].
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    draws = draws.astype(np.float64)
    if kind == "difference":
        estimates = draws @ (sums - baseline_sums) / (draws @ views)
    else:
        below = draws @ baseline_sums
        sentence = "A ratio needs a baseline with a positive mean: take the difference."
        require(below.min() > 0, sentence)
        estimates = draws @ sums / below
    low, high = np.quantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _sums(
    values: ArrayLike, groups: Sequence[Hashable], counts: ArrayLike | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Photographs in sorted order, the sum of the values and the number of views of each, [G]."""
    values = np.asarray(values, np.float64)
    counts = np.ones_like(values) if counts is None else np.asarray(counts, np.float64)
    photographs, index = np.unique(np.asarray(groups), return_inverse=True)
    return photographs, np.bincount(index, values * counts), np.bincount(index, counts)
