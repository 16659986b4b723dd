"""Rows of the study, contrasts between them, and verdicts on claims.

Other seeds and other photographs would change a score; both errors add up. Each is distributed as
Student's t with its own degrees of freedom (Behrens-Fisher), as a bootstrap of three seeds never
lies beyond them; tests simulate how often intervals hold the truth.
Photographs count alike, with few or many views.
A row's variance over seeds is its own, moderated by those of all rows; of the rows of a contrast,
the fewest degrees of freedom count.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic.dataclasses import dataclass
from scipy.optimize import minimize, root_scalar
from scipy.special import betaln, stdtr
from scipy.stats import t as students_t

from sitlib.files import read_json
from sitlib.metrics import GENERATION_METRICS, METRICS
from sitlib.metrics.statistics import LEVEL
from sitlib.model.config import STRICT
from sitlib.strict import from_dict, require
from workbook.params import read_yaml
from workbook.paths import resolve

COUNTED = 0.5  # share of the degrees of freedom of a prior, which is an estimate, that counts
MOST = 1000  # degrees of freedom of a fit: rows that vary alike
Row = Mapping[str, Any]
Rows = Mapping[str, Row]


class Estimate(NamedTuple):
    """A value, its interval of 95 %, the two-sided p-value of 0, and the fewest seeds of a row."""

    value: float
    low: float = -np.inf
    high: float = np.inf
    p: float = 1.0
    seeds: int = 0


@dataclass(frozen=True, config=STRICT)
class Claim:
    """It holds if the sum of rows by these weights is on the better side of 0 in its measure."""

    rows: dict[str, float]
    measure: Literal["psnr", "ssim", "lpips_vgg", "lpips_alex", "fd_lite0"] = "lpips_vgg"
    paper: bool = False  # the paper claims it


def load_claims() -> dict[str, Claim]:
    """Claims of `study/claims.yaml` by their sentences."""
    values = read_yaml(resolve("study/claims.yaml"))
    return {name: from_dict(Claim, entry, f"claim {name!r}") for name, entry in values.items()}


def read_results(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Results of a folder, by name."""
    return {path.stem: read_json(path) for path in sorted(resolve(folder).glob("*.json"))}


def finished_seeds(row: Row) -> list[dict[str, Any]]:
    """Scores of the seeds whose training ended well."""
    return [scores for scores in row["seeds"].values() if "failed" not in scores]


def mean(row: Row, metric: str) -> float:
    """Mean of a score over seeds."""
    return float(np.mean([scores[metric] for scores in finished_seeds(row)]))


def interval(row: Row, metric: str) -> Estimate:
    """Mean over seeds and photographs, of the row alone: `contrast` has what others say of seeds.

    With one seed the interval is over photographs alone.
    """
    return _estimate([(1.0, _scores(row, metric))])


def contrast(
    rows: Rows, weights: Mapping[str, float], metric: str = "psnr", counted: float = COUNTED
) -> Estimate:
    """The sum of rows by `weights`, row -> weight, as a mean over seeds and photographs.

    Of fd_lite0, which is of all photographs together, seeds are the only error. A variance over
    seeds is moderated by `seed_prior` of all rows of as many steps that were judged
    on the same photographs. Where a row has one seed, the interval is infinite; where one has no
    result, the value is NaN.
    """
    if not all(name in rows and finished_seeds(rows[name]) for name in weights):
        return Estimate(np.nan)
    first = rows[next(iter(weights))]
    same = all(rows[name]["photographs"] == first["photographs"] for name in weights)
    require(same, "Rows that are compared must have been judged on the same photographs.")
    terms = [(weight, _scores(rows[name], metric)) for name, weight in weights.items()]
    estimate = _estimate(terms, seed_prior(alike(rows, first), metric, counted))
    return estimate if estimate.seeds > 1 else Estimate(estimate.value, seeds=estimate.seeds)


def alike(rows: Rows, row: Row) -> Rows:
    """Rows of as many steps as a row, judged on the same photographs."""
    keys = ("steps", "photographs")
    return {name: of for name, of in rows.items() if all(of[key] == row[key] for key in keys)}


def seed_prior(rows: Rows, metric: str, counted: float = COUNTED) -> tuple[float, float]:
    """What rows say together of the variance over seeds: degrees of freedom, and its size.

    Variances of rows are taken for draws from a scaled inverse chi-squared distribution (Smyth
    2004, doi 10.2202/1544-6115.1027): the more alike they are, the more degrees of freedom. Those
    measured then follow a scaled F distribution, fitted by maximum likelihood, which no single row
    of seeds that happen to agree can move far; moments of their logarithms, Smyth's fit, it can.
    `counted` of the degrees count; of fewer than three rows there are none.
    """
    means = [_scores(row, metric).mean(1) for row in rows.values() if finished_seeds(row)]
    means = [scores for scores in means if len(scores) > 1 and np.ptp(scores) > 0]
    if len(means) < 3:
        return 0.0, 0.0
    own = np.array([len(scores) - 1 for scores in means])
    measured = np.array([scores.var(ddof=1) for scores in means])

    def surprise(logs: NDArray) -> float:
        freedom, size = np.exp(logs)
        ratio = own * measured / (freedom * size)  # of the density's logarithm, what depends on it
        terms = own * np.log(ratio) - (own + freedom) * np.log1p(ratio)
        return float(np.sum(betaln(own / 2, freedom / 2) - terms / 2))

    bounds = np.log([[0.02, MOST], [measured.min() / 100, measured.max() * 100]])
    fit = minimize(surprise, np.log([4, np.median(measured)]), bounds=bounds)
    freedom, size = np.exp(fit.x)
    # With its own, no row has more than all of them together (as in limma).
    return min(counted * float(freedom), float(own.sum() - own.mean())), float(size)


def _scores(row: Row, metric: str) -> NDArray:
    """Scores [seeds, photographs]; [seeds, 1] of all photographs together, such as fd_lite0."""
    seeds = finished_seeds(row)
    return np.array([seed["by_photograph"].get(metric, [seed[metric]]) for seed in seeds])


def _estimate(terms: list[tuple[float, NDArray]], prior: tuple[float, float] = (0, 0)) -> Estimate:
    """The weighted sum of the means of rows, which vary independently: (weight, scores) of each."""
    by_photograph = np.sum([weight * scores.mean(0) for weight, scores in terms], axis=0)
    value, counts = float(by_photograph.mean()), np.array([len(scores) for _, scores in terms])
    parts, photographs = [], len(by_photograph)
    if counts.min() > 1:
        own = np.array([scores.mean(1).var(ddof=1) for _, scores in terms])
        freedom, size = prior
        variances = (freedom * size + (counts - 1) * own) / (freedom + counts - 1)
        weights = np.array([weight for weight, _ in terms])
        parts.append(((weights**2 * variances / counts).sum(), freedom + counts.min() - 1))
    if photographs > 1:
        parts.append((by_photograph.var(ddof=1) / photographs, photographs - 1))
    if not parts:
        return Estimate(value, seeds=int(counts.min()))
    scales = sorted(((variance + 1e-30) ** 0.5, freedom) for variance, freedom in parts)
    most = 1e6 * scales[-1][0]
    found = root_scalar(lambda x: error_beyond(x, scales) - (1 - LEVEL), bracket=(0, most))
    half = float(found.root)
    p = error_beyond(abs(value), scales)
    return Estimate(value, value - half, value + half, p, int(counts.min()))


def error_beyond(size: float, scales: Sequence[tuple[float, float]]) -> float:
    """Probability that a sum of one or two Student's t, of ascending (scale, degrees of freedom),
    is at least so large, with either sign.
    """
    (scale, freedom), *smaller = scales[::-1]
    if not smaller:
        return float(2 * stdtr(freedom, -size / scale))
    z, step = np.linspace(-14, 14, 2801, retstep=True)  # x = sinh z: far into the tails
    x, ((other, own),) = np.sinh(z), smaller
    density = students_t.pdf(x, own) * np.cosh(z) * step
    return float(2 * np.sum(density * stdtr(freedom, (other * x - size) / scale)))


def holm(p_values: ArrayLike) -> NDArray:
    """P-values adjusted for their number, by Holm's step-down method."""
    p = np.asarray(p_values, np.float64)
    order, adjusted = np.argsort(p), np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def verdicts(
    rows: Rows, claims: Mapping[str, Claim], counted: float = COUNTED
) -> dict[str, dict[str, Any]]:
    """Each claim, its estimate, `holm`, its p-value adjusted for all claims, and `verdict`."""
    found = [contrast(rows, claim.rows, claim.measure, counted) for claim in claims.values()]
    table, adjusted = {}, holm([estimate.p for estimate in found]).tolist()
    for (name, claim), estimate, p in zip(claims.items(), found, adjusted, strict=True):
        measure = (METRICS | GENERATION_METRICS)[claim.measure]
        is_better = (estimate.value > 0) == measure.higher_is_better
        verdict = "holds" if is_better else "the other way round"
        verdict = verdict if p < 1 - LEVEL else "undecided" if estimate.seeds else "not run"
        table[name] = {**vars(claim), **estimate._asdict(), "holm": p, "verdict": verdict}
    return table


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Factor a and exponent b of y = a x^b, by least squares on logarithms."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(intercept)), float(slope)
