"""Confidence intervals by bootstrap over photographs.

Views of one photograph are alike, so whole photographs are resampled with all their views (cluster
bootstrap; Davison and Hinkley 1997, section 3.8). Intervals are percentiles; below about 20
photographs they come out too narrow. They say nothing about training seeds.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 2000


def group_means(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[list, NDArray, NDArray]:
    """Average values [V] over the views of each photograph, of V names or numbers.

    Returns:
        Photographs in sorted order, the mean of each, and its number of views.
    """
    photographs, sums, counts = _sums(values, groups)
    return photographs.tolist(), sums / counts, counts.astype(int)


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    counts: ArrayLike | None = None,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Confidence interval (low, high) of 95 % of the mean over views of photographs.

    Args:
        values: [V], one of each view, or of each photograph the mean over its views.
        groups: photograph of each value, V names or numbers.
        counts: views that each value is the mean of. Default: 1.
        resamples: equal numbers of them and of photographs give equal draws.

    Raises:
        ValueError: lengths differ, values are not finite, or there are fewer than two photographs.
    """
    _, sums, views = _sums(values, groups, counts)
    drawn = _draws(sums, resamples)
    return _percentiles((drawn @ sums) / (drawn @ views))


def paired_interval(
    values: ArrayLike,
    baseline_values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    kind: Literal["difference", "ratio"] = "difference",
    counts: ArrayLike | None = None,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Confidence interval of a model's mean minus, or divided by, a baseline's on the same views.

    Both are resampled together, so that hard photographs do not widen the interval. Arguments and
    errors as for `bootstrap_interval`; a ratio needs baseline means above 0.
    """
    _, sums, views = _sums(values, groups, counts)
    _, baseline_sums, _ = _sums(baseline_values, groups, counts)
    drawn = _draws(np.stack([sums, baseline_sums]), resamples)
    if kind == "difference":
        return _percentiles(drawn @ (sums - baseline_sums) / (drawn @ views))
    if (drawn @ baseline_sums).min() <= 0:
        raise ValueError("A ratio needs baseline values with a positive mean: take the difference.")
    return _percentiles((drawn @ sums) / (drawn @ baseline_sums))


def _sums(
    values: ArrayLike, groups: Sequence[Hashable], counts: ArrayLike | None = None
) -> tuple[NDArray, NDArray, NDArray]:
    """Photographs in sorted order, the sum of the values and the number of views of each, [G]."""
    values = np.asarray(values, np.float64)
    counts = np.ones_like(values) if counts is None else np.asarray(counts, np.float64)
    if not values.shape == counts.shape == (len(groups),):
        raise ValueError(
            f"values and counts must be [V], one for each of the {len(groups)} groups, not "
            f"{list(values.shape)} and {list(counts.shape)}."
        )
    photographs, index = np.unique(np.asarray(groups), return_inverse=True)
    return photographs, np.bincount(index, values * counts), np.bincount(index, counts)


def _draws(sums: NDArray, resamples: int) -> NDArray:
    """Number of times that each resample holds each photograph of sums [..., G], float64 [R, G]."""
    if not np.isfinite(sums).all():
        raise ValueError("values must be finite: leave out the others, in both models of a pair.")
    if (count := sums.shape[-1]) < 2:
        raise ValueError("An interval needs the views of at least 2 photographs.")
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
    return draws.astype(np.float64)


def _percentiles(estimates: NDArray) -> tuple[float, float]:
    low, high = np.quantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
