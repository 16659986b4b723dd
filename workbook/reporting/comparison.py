"""Tokenizers beside their baseline and beside the paper: rows of tables, with intervals over photographs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, Literal

import numpy as np

from sitlib.metrics import bootstrap_interval, paired_interval
from workbook.reporting.names import label
from workbook.reporting.paper import FULL_SIZE, RECONSTRUCTION, Reported

Scores = Mapping[str, Any]  # what `tokenizer_evaluation.evaluate_tokenizer` returns
BASELINE = "vit_vqgan"


def require_baseline(scores: Mapping[str, Any]) -> None:
    """Raises ValueError where there is nothing to compare with."""
    if BASELINE not in scores:
        raise ValueError(
            f"every comparison is with {BASELINE}: add it to tokenizers in params.yaml."
        )


def at(scores: Scores, images: str, size: int) -> Mapping[str, Any]:
    """Scores of one set of images at one size in px."""
    return scores["sets"][images][str(size)]


def change(
    scores: Sequence[Scores],
    baseline: Sequence[Scores],
    metric: str,
    kind: Literal["difference", "ratio"],
    images: str,
    size: int,
    baseline_size: int | None = None,
) -> tuple[float, float, float]:
    """How a metric differs from a baseline's on the photographs that both saw: (value, low, high), an interval of 95 % over photographs.

    Args:
        scores, baseline: of all seeds; per-photograph values are averaged over seeds before photographs are drawn.
        kind: "difference" or "ratio" (of means).
        baseline_size: size at which the baseline was judged, where that differs.
    """
    ours = _by_photograph(scores, metric, images, size)
    theirs = _by_photograph(baseline, metric, images, baseline_size or size)
    names = [name for name in ours if name in theirs]
    pairs = np.array([(ours[name][0], theirs[name][0]) for name in names])
    counts = np.array([ours[name][1] for name in names])
    first, second = np.average(pairs, axis=0, weights=counts)
    low, high = paired_interval(pairs[:, 0], pairs[:, 1], names, kind=kind, counts=counts)
    return float(first - second if kind == "difference" else first / second), low, high


def _by_photograph(
    scores: Sequence[Scores], metric: str, images: str, size: int
) -> dict[str, tuple[float, int]]:
    """Photograph -> mean of a metric over seeds, and the number of views that it is the mean of."""
    records = [at(seed, images, size) for seed in scores]
    values = np.mean([record["by_photograph"][metric] for record in records], axis=0)
    return dict(
        zip(records[0]["photographs"], zip(values, records[0]["counts"], strict=True), strict=True)
    )


def interval(
    scores: Sequence[Scores], metric: str, images: str, size: int
) -> tuple[float, float, float]:
    """Mean of a metric over seeds, and its interval of 95 % over photographs: (value, low, high)."""
    found = _by_photograph(scores, metric, images, size)
    values, counts = np.array(list(found.values())).T
    return float(np.average(values, weights=counts)), *bootstrap_interval(
        values, list(found), counts=counts
    )


def recognised(scores: Sequence[Scores], kind: str) -> tuple[float, float, float]:
    """R-precision, %, of samples for one kind of prompts: a mean over seeds, and its interval of 95 % over prompts: (value, low, high)."""
    values = _by_prompt(scores, kind)
    return float(values.mean()), *bootstrap_interval(values, range(len(values)))


def recognised_more(
    scores: Sequence[Scores], others: Sequence[Scores], kind: str
) -> tuple[float, float, float]:
    """By how many percentage points the R-precision of samples is above that of others for the same prompts: (value, low, high)."""
    ours, theirs = _by_prompt(scores, kind), _by_prompt(others, kind)
    return float((ours - theirs).mean()), *paired_interval(ours, theirs, range(len(ours)))


def _by_prompt(scores: Sequence[Scores], kind: str) -> np.ndarray:
    return np.mean([seed["kinds"][kind]["samples"]["by_prompt"] for seed in scores], axis=0)


def with_interval(value: float, low: float, high: float, digits: int = 2, sign: str = "") -> str:
    """ "0.83 [0.81, 0.85]"; `sign` "+" shows the sign of positive numbers."""
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _reported(
    scores: Mapping[str, Sequence[Scores]], images: str, full_size: int
) -> list[tuple[Reported, int]]:
    """Rows of the paper for which there are scores of ours, each with our size in px."""
    found = [(row, row.size * full_size // FULL_SIZE) for row in RECONSTRUCTION]
    return [
        (row, size)
        for row, size in found
        if row.variant in scores and str(size) in scores[row.variant][0]["sets"][images]
    ]


def paper_table(
    scores: Mapping[str, Sequence[Scores]], images: str, full_size: int
) -> list[dict[str, Any]]:
    """The paper's reconstruction rows beside ours, at the sizes that correspond."""
    rows = []
    for row, size in _reported(scores, images, full_size):
        records, seeds = (
            [at(seed, images, size) for seed in scores[row.variant]],
            scores[row.variant],
        )
        rows.append(
            {
                "model": label(row.variant),
                "paper, px": row.size,
                "paper PSNR": row.psnr,
                "paper LPIPS": row.lpips,
                "paper FID": row.fid,
                "ours, px": size,
                "PSNR, dB": with_interval(*interval(seeds, "psnr", images, size)),
                "LPIPS-Alex": with_interval(*interval(seeds, "lpips_alex", images, size), digits=3),
                "FD-Lite0": mean(record["fd_lite0"] for record in records),
            }
        )
    return rows


def relative_table(
    scores: Mapping[str, Sequence[Scores]], images: str, full_size: int
) -> list[dict[str, Any]]:
    """The paper's relative changes beside ours: a model at full size is set against the baseline, a smaller size against the same model
    at its full size, and the baseline at the smallest size against the scale-causal model there."""
    reported = {(row.variant, row.size): row for row in RECONSTRUCTION}
    rows = []
    for row, size in _reported(scores, images, full_size):
        against, text = _reference(row)
        if against is None or against[0] not in scores:
            continue
        other, pair = reported[against], (scores[row.variant], scores[against[0]])
        sizes = (size, other.size * full_size // FULL_SIZE)
        psnr = None if row.psnr is None or other.psnr is None else row.psnr - other.psnr
        difference = change(*pair, "psnr", "difference", images, *sizes)
        rows.append(
            {
                "model": label(row.variant),
                "px": size,
                "against": text,
                "paper, LPIPS": f"x {row.lpips / other.lpips:.2f}",
                "ours, LPIPS-Alex": "x "
                + with_interval(*change(*pair, "lpips_alex", "ratio", images, *sizes)),
                "paper, dB": f"{psnr:+.1f}" if psnr is not None else None,
                "ours, dB": with_interval(*difference, sign="+"),
            }
        )
    return rows


def _reference(row: Reported) -> tuple[tuple[str, int] | None, str]:
    """Which row of the paper's table a row is set against, and how to say so."""
    if row.variant == BASELINE:
        return (
            (None, "")
            if row.size == FULL_SIZE
            else (("sit5_sc", row.size), "SIT-SC-5 at this size")
        )
    if row.size == FULL_SIZE:
        return (BASELINE, FULL_SIZE), "ViT-VQGAN"
    return (row.variant, FULL_SIZE), "itself at full size"


def sets_table(
    scores: Mapping[str, Sequence[Scores]], sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Models on every set of held-out images, at those of the sizes in px at which each was judged: all metrics, means over seeds."""
    rows = []
    for images in next(iter(scores.values()))[0]["sets"]:
        for variant, seeds in scores.items():
            for size in sizes:
                if str(size) in seeds[0]["sets"][images]:
                    rows.append(
                        {"images": images, "model": label(variant), "px": size}
                        | _metrics(seeds, images, size)
                    )
    return rows


def _metrics(seeds: Sequence[Scores], images: str, size: int) -> dict[str, Any]:
    records = [at(seed, images, size) for seed in seeds]

    def if_measured(metric: str) -> float | None:
        values = [float(record[metric]) for record in records if record.get(metric) is not None]
        return mean(values) if len(values) == len(records) else None

    return {
        "PSNR, dB": with_interval(*interval(seeds, "psnr", images, size)),
        "SSIM": if_measured("ssim"),
        "LPIPS-Alex": with_interval(*interval(seeds, "lpips_alex", images, size), digits=3),
        "VGG": if_measured("lpips_vgg"),
        "FD-Lite0": mean(record["fd_lite0"] for record in records),
        "KID x 1000": 1000 * mean(record["kid"] for record in records),
        "score": mean(record["lite0_score"] for record in records),
        "bits/px": records[0]["bits_per_pixel"],
    }
