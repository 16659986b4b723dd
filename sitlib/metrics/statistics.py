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
    """Average values [V] over the views of each photograph.

    Args:
        groups: photograph of each view, V names or numbers.

    Returns:
        Photographs in sorted order, the mean of each, and its number of views.
    """
    values, index, photographs = _grouped(values, groups)
    counts = np.bincount(index)
    return photographs.tolist(), np.bincount(index, values) / counts, counts


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    counts: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval (low, high) of the mean over views of photographs.

    Args:
        values: [V], one of each view, or of each photograph the mean over its views.
        groups: photograph of each value, V names or numbers.
        counts: views that each value is the mean of. Default: 1.
        level: share of resamples inside the interval, in (0, 1).
        seed: of the resamples. Equal photographs, seed and `resamples` give equal draws.

    Raises:
        ValueError: lengths differ, values are not finite, or there are fewer than two photographs.
    """
    sums, views = _sums(values, groups, counts)
    drawn = _draws(len(views), resamples, seed)
    return _percentiles((drawn @ sums) / (drawn @ views), level)


def paired_interval(
    values: ArrayLike,
    baseline_values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    kind: Literal["difference", "ratio"] = "difference",
    counts: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a model's mean minus, or divided by, a baseline's on the same views.

    Both are resampled together, so that hard photographs do not widen the interval.

    Args:
        values, baseline_values: [V] of two models, on the same views in the same order.
        kind: "difference", or "ratio" of the two means.

    Raises:
        ValueError: as `bootstrap_interval`, or a ratio to a mean that is not positive.
    """
    sums, views = _sums(values, groups, counts)
    baseline_sums, _ = _sums(baseline_values, groups, counts)
    drawn = _draws(len(views), resamples, seed)
    if kind == "difference":
        return _percentiles(drawn @ (sums - baseline_sums) / (drawn @ views), level)
    if kind != "ratio":
        raise ValueError(f'kind must be "difference" or "ratio", not {kind!r}.')
    denominator = drawn @ baseline_sums
    if denominator.min() <= 0:
        raise ValueError("A ratio needs baseline values with a positive mean: take the difference.")
    return _percentiles(drawn @ sums / denominator, level)


def _grouped(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[NDArray, NDArray, NDArray]:
    """Values float64 [V], the index of each one's photograph [V], and the photographs, sorted."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) != len(groups):
        raise ValueError(
            f"values must be [V], one for each of the {len(groups)} groups, "
            f"not {list(values.shape)}."
        )
    photographs, index = np.unique(np.asarray(groups), return_inverse=True)
    return values, index, photographs


def _sums(
    values: ArrayLike, groups: Sequence[Hashable], counts: ArrayLike | None
) -> tuple[NDArray, NDArray]:
    """Sum of the values and number of views of each photograph, [G] each."""
    values, index, photographs = _grouped(values, groups)
    if not np.isfinite(values).all():
        raise ValueError("values must be finite: leave out the others, in both models of a pair.")
    if len(photographs) < 2:
        raise ValueError("An interval needs the views of at least 2 photographs.")
    counts = np.ones_like(values) if counts is None else np.asarray(counts, np.float64)
    if counts.shape != values.shape or counts.min() <= 0:
        raise ValueError(f"counts must be {len(values)} positive numbers, one for each value.")
    return np.bincount(index, values * counts), np.bincount(index, counts)


def _draws(photographs: int, resamples: int, seed: int) -> NDArray:
    """Number of times that each resample holds each photograph, float64 [R, G]."""
    probabilities = np.full(photographs, 1 / photographs)
    draws = np.random.default_rng(seed).multinomial(photographs, probabilities, resamples)
    return draws.astype(np.float64)


def _percentiles(estimates: NDArray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), not {level}.")
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
