"""Tokenizers beside their baseline and beside the paper: rows of tables, with intervals over photographs."""

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np

from sitlib.metrics import paired_interval
from sitlib.reporting.headline import spread
from sitlib.reporting.names import label
from sitlib.reporting.paper import FULL_SIZE, RECONSTRUCTION, Reported

Scores = Mapping[str, Any]  # what `tokenizer_evaluation.evaluate_tokenizer` returns
BASELINE = "vit_vqgan"


def at(scores: Scores, images: str, size: int) -> Mapping[str, Any]:
    """Scores of one set of images at one size in px."""
    return scores["sets"][images][str(size)]


def change(
    scores: Sequence[Scores],
    baseline: Sequence[Scores],
    metric: str,
    kind: str,
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
    low, high = paired_interval(*pairs.T, names, kind=kind, counts=counts)
    return float(first - second if kind == "difference" else first / second), low, high


def _by_photograph(
    scores: Sequence[Scores], metric: str, images: str, size: int
) -> dict[str, tuple[float, int]]:
    """Photograph -> mean of a metric over seeds, and the number of views that it is the mean of."""
    records = [at(seed, images, size) for seed in scores]
    values = np.mean([record["by_photograph"][metric] for record in records], axis=0)
    return dict(zip(records[0]["photographs"], zip(values, records[0]["counts"], strict=True), strict=True))


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


def paper_table(scores: Mapping[str, Sequence[Scores]], images: str, full_size: int) -> list[dict[str, Any]]:
    """The paper's reconstruction rows beside ours, at the sizes that correspond."""
    rows = []
    for row, size in _reported(scores, images, full_size):
        records = [at(seed, images, size) for seed in scores[row.variant]]
        rows.append(
            {
                "model": label(row.variant),
                "paper, px": row.size,
                "paper PSNR": row.psnr,
                "paper LPIPS": row.lpips,
                "paper FID": row.fid,
                "ours, px": size,
                "PSNR, dB": spread([record["psnr"] for record in records]),
                "LPIPS-Alex": spread([record["lpips_alex"] for record in records]),
                "FD-Lite0": spread([record["fd_lite0"] for record in records]),
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
        both = row.psnr is not None and other.psnr is not None
        difference = change(*pair, "psnr", "difference", images, *sizes)
        rows.append(
            {
                "model": label(row.variant),
                "px": size,
                "against": text,
                "paper, LPIPS": f"x {row.lpips / other.lpips:.2f}",
                "ours, LPIPS-Alex": "x "
                + with_interval(*change(*pair, "lpips_alex", "ratio", images, *sizes)),
                "paper, dB": f"{row.psnr - other.psnr:+.1f}" if both else None,
                "ours, dB": with_interval(*difference, sign="+"),
            }
        )
    return rows


def _reference(row: Reported) -> tuple[tuple[str, int] | None, str]:
    """Which row of the paper's table a row is set against, and how to say so."""
    if row.variant == BASELINE:
        return (None, "") if row.size == FULL_SIZE else (("sit5_sc", row.size), "SIT-SC-5 at this size")
    if row.size == FULL_SIZE:
        return (BASELINE, FULL_SIZE), "ViT-VQGAN"
    return (row.variant, FULL_SIZE), "itself at full size"


def sets_table(scores: Mapping[str, Sequence[Scores]], size: int) -> list[dict[str, Any]]:
    """Every model on every set of held-out images at one size: means over seeds, LPIPS also relative to the baseline."""
    rows = []
    for images in next(iter(scores.values()))[0]["sets"]:
        for variant, seeds in scores.items():
            records = [at(seed, images, size) for seed in seeds]
            low, high = np.mean([record["intervals"]["lpips_alex"] for record in records], axis=0)
            lpips = mean(record["lpips_alex"] for record in records)
            rows.append(
                {
                    "images": images,
                    "model": label(variant),
                    "PSNR, dB": mean(record["psnr"] for record in records),
                    "SSIM": mean(record["ssim"] for record in records),
                    "LPIPS-Alex [95 %]": with_interval(lpips, low, high, digits=3),
                    "LPIPS-VGG": mean(record["lpips_vgg"] for record in records),
                    "FD-Lite0": mean(record["fd_lite0"] for record in records),
                    "KID x 1000": 1000 * mean(record["kid"] for record in records),
                    "Lite0 score": mean(record["lite0_score"] for record in records),
                    "bits per pixel": records[0]["bits_per_pixel"],
                }
            )
    return rows
