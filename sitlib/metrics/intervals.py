"""Confidence intervals by bootstrap over photographs.

Several views are cut from one photograph and are alike, so a second sample of images would be one of other photographs, not of other
views: whole photographs are resampled, with all their views (cluster bootstrap; Davison and Hinkley 1997, section 3.8). Intervals are
percentiles; over fewer than about 20 photographs these come out too narrow. They say nothing of training seeds.
"""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 2000


def group_means(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[list, NDArray, NDArray]:
    """Photographs in sorted order, the mean of `values` [V] over the views of each, and the number of these views.

    Args:
        groups: the photograph of each view, V names or numbers.
    """
    values, places, photographs = _grouped(values, groups)
    counts = np.bincount(places)
    return photographs.tolist(), np.bincount(places, values) / counts, counts


def bootstrap_interval(
    values: ArrayLike,
    groups: Sequence[Hashable],
    *,
    counts: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of the mean of `values` [V] over views of photographs.

    Args:
        values: one for each view, or one for each photograph: the mean over its views.
        groups: the photograph of each value, V names or numbers.
        counts: views of which each value is the mean; default: 1 each.
        level: share of resamples inside the interval, in (0, 1).
        resamples: how often as many photographs as there are get drawn with replacement.
        seed: of the draws. Equal photographs, seed and resamples give equal draws.

    Raises `ValueError` for lengths that differ, values that are not finite, or fewer than two photographs.
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
    """Confidence interval of the mean of `values` minus, or divided by, the mean of `baseline_values` on the same views.

    Both are resampled together, so that how hard a photograph is does not widen the interval.

    Args:
        values, baseline_values: [V], of two models on the same views in the same order.
        kind: "difference", or "ratio" of the two means.
        groups, counts, level, resamples, seed: as for `bootstrap_interval`.

    Raises `ValueError` as `bootstrap_interval` does, and for a ratio to a mean that is not positive.
    """
    (sums, views), (baseline_sums, _) = (
        _sums(v, groups, counts) for v in (values, baseline_values)
    )
    drawn = _draws(len(views), resamples, seed)
    if kind == "difference":
        return _percentiles(drawn @ (sums - baseline_sums) / (drawn @ views), level)
    if kind != "ratio":
        raise ValueError(f'kind must be "difference" or "ratio", not {kind!r}.')
    below = drawn @ baseline_sums
    if below.min() <= 0:
        raise ValueError("A ratio needs baseline values with a positive mean; take the difference.")
    return _percentiles(drawn @ sums / below, level)


def _grouped(values: ArrayLike, groups: Sequence[Hashable]) -> tuple[NDArray, NDArray, NDArray]:
    """Values [V] in float64, the place of each one's photograph among the sorted photographs, and these."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) != len(groups):
        raise ValueError(
            f"values must be [V], one for each of the {len(groups)} groups, not {list(values.shape)}."
        )
    photographs, places = np.unique(np.asarray(groups), return_inverse=True)
    return values, places, photographs


def _sums(
    values: ArrayLike, groups: Sequence[Hashable], counts: ArrayLike | None
) -> tuple[NDArray, NDArray]:
    """Sum of the values and number of views of each photograph, [G] each."""
    values, places, photographs = _grouped(values, groups)
    if not np.isfinite(values).all():
        raise ValueError(
            "values must be finite: leave out what is not, from both models of a pair."
        )
    if len(photographs) < 2:
        raise ValueError("An interval needs the views of at least 2 photographs.")
    counts = np.ones_like(values) if counts is None else np.asarray(counts, np.float64)
    if counts.shape != values.shape or counts.min() <= 0:
        raise ValueError(f"counts must be {len(values)} positive numbers, one for each value.")
    return np.bincount(places, values * counts), np.bincount(places, counts)


def _draws(photographs: int, resamples: int, seed: int) -> NDArray:
    """How often each resample holds each photograph, [R, G]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(photographs, np.full(photographs, 1 / photographs), resamples).astype(
        np.float64
    )


def _percentiles(estimates: NDArray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), it is {level}.")
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
