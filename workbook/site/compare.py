"""Models beside their baseline and beside the paper, with bootstrap intervals over photographs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from sitlib.metrics import GENERATION_METRICS, METRICS, bootstrap_interval, paired_interval
from workbook.names import label

Scores = Mapping[str, Any]  # metrics of one run, as the evaluation stages write them
Runs = Mapping[str, Sequence[Scores]]  # variant -> metrics of its seeds
Interval = tuple[float, float, float]  # value, lower and upper bound at 95 %
BASELINE = "vit_vqgan"
PAPER_SIZE = 256  # px


@dataclass(frozen=True)
class Reported:
    """One row of the paper's reconstruction table (SIT, arXiv 2412.09607, ImageNet validation)."""

    variant: str  # our name of the model
    size: int  # px
    lpips: float
    psnr: float | None = None  # dB
    fid: float | None = None


RECONSTRUCTION = (
    Reported("vit_vqgan", 256, 0.163, 23.8, 1.20),
    Reported("sit4", 256, 0.144, 24.0, 1.20),
    Reported("sit5", 256, 0.135, 24.5, 0.97),
    Reported("sit5_sc", 256, 0.161),
    Reported("sit5_sc", 128, 0.159, 27.1, 2.13),
    Reported("sit5_sc", 64, 0.111, 31.3, 1.39),
    Reported("sit5_sc", 32, 0.029, 36.8, 0.31),
    Reported("sit5_sc", 16, 0.013),
    Reported("vit_vqgan", 16, 0.127),
)
# Generator -> its baseline, the paper's two FIDs: ImageNet 256 with 650M parameters; MS-COCO 256
# with 350M and the scale-causal decoder.
FID = {
    "ar_sit4": ("ar_vit_vqgan", 6.95, 8.37),
    "ar_captioned_sit4_sc": ("ar_captioned_vit_vqgan", 12.6, 12.4),
}


def with_interval(value: float, low: float, high: float, digits: int = 2, sign: str = "") -> str:
    """Format as "0.83 [0.81, 0.85]"; `sign="+"` shows the sign of positive numbers."""
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def at(scores: Scores, images: str, size: int) -> Mapping[str, Any]:
    """Scores of one set of images at one size in px."""
    return scores["sets"][images][str(size)]


def _by_photograph(
    seeds: Sequence[Scores], metric: str, images: str, size: int
) -> dict[str, tuple[float, int]]:
    """Photograph -> mean of a metric over seeds, and the number of its views."""
    records = [at(seed, images, size) for seed in seeds]
    values = np.mean([record["by_photograph"][metric] for record in records], axis=0)
    counts = zip(values, records[0]["counts"], strict=True)
    return dict(zip(records[0]["photographs"], counts, strict=True))


def interval(seeds: Sequence[Scores], metric: str, images: str, size: int) -> Interval:
    """Mean of a metric over seeds, with its interval over photographs."""
    by_photograph = _by_photograph(seeds, metric, images, size)
    values, counts = np.array(list(by_photograph.values())).T
    bounds = bootstrap_interval(values, list(by_photograph), counts=counts)
    return float(np.average(values, weights=counts)), *bounds


def change(
    seeds: Sequence[Scores],
    baseline: Sequence[Scores],
    metric: str,
    kind: Literal["difference", "ratio"],
    images: str,
    size: int,
    baseline_size: int | None = None,
) -> Interval:
    """Difference or ratio (of means) to a baseline on the photographs that both saw."""
    ours = _by_photograph(seeds, metric, images, size)
    theirs = _by_photograph(baseline, metric, images, baseline_size or size)
    names = [name for name in ours if name in theirs]
    pairs = np.array([(ours[name][0], theirs[name][0]) for name in names])
    counts = np.array([ours[name][1] for name in names])
    first, second = np.average(pairs, axis=0, weights=counts)
    bounds = paired_interval(pairs[:, 0], pairs[:, 1], names, kind=kind, counts=counts)
    return float(first - second if kind == "difference" else first / second), *bounds


def r_precision(seeds: Sequence[Scores], kind: str, baseline: Sequence[Scores] = ()) -> Interval:
    """R-precision (%) of samples for one kind of prompts, less a baseline's for the same prompts."""

    def by_prompt(seeds: Sequence[Scores]) -> np.ndarray:
        return np.mean([seed["kinds"][kind]["samples"]["by_prompt"] for seed in seeds], axis=0)

    ours = by_prompt(seeds)
    if not baseline:
        return float(ours.mean()), *bootstrap_interval(ours, range(len(ours)))
    theirs = by_prompt(baseline)
    return float((ours - theirs).mean()), *paired_interval(ours, theirs, range(len(ours)))


def paper_table(runs: Runs, images: str, full_size: int) -> list[dict[str, Any]]:
    """The paper's reconstruction rows beside ours, at the sizes that correspond."""
    rows = []
    for row, size in _comparable(runs, images, full_size):
        seeds = runs[row.variant]
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
                "FD-Lite0": fmean(at(seed, images, size)["fd_lite0"] for seed in seeds),
            }
        )
    return rows


def relative_table(runs: Runs, images: str, full_size: int) -> list[dict[str, Any]]:
    """The paper's relative changes beside ours.

    A model at full size is set against the baseline, a smaller size against the same model at full
    size, and the baseline at the smallest size against the scale-causal model there.
    """
    reported = {(row.variant, row.size): row for row in RECONSTRUCTION}
    rows = []
    for row, size in _comparable(runs, images, full_size):
        if row.variant == BASELINE:
            other, name = ("sit5_sc", row.size), "SIT-SC-5 at this size"
        elif row.size == PAPER_SIZE:
            other, name = (BASELINE, PAPER_SIZE), "ViT-VQGAN"
        else:
            other, name = (row.variant, PAPER_SIZE), "itself at full size"
        if (row.variant, row.size) == (BASELINE, PAPER_SIZE) or other[0] not in runs:
            continue
        reference, pair = reported[other], (runs[row.variant], runs[other[0]])
        sizes = (size, reference.size * full_size // PAPER_SIZE)
        dB = None
        if row.psnr is not None and reference.psnr is not None:
            dB = f"{row.psnr - reference.psnr:+.1f}"
        lpips = change(*pair, "lpips_alex", "ratio", images, *sizes)
        psnr = change(*pair, "psnr", "difference", images, *sizes)
        rows.append(
            {
                "model": label(row.variant),
                "px": size,
                "against": name,
                "paper, LPIPS": f"x {row.lpips / reference.lpips:.2f}",
                "ours, LPIPS-Alex": f"x {with_interval(*lpips)}",
                "paper, dB": dB,
                "ours, dB": with_interval(*psnr, sign="+"),
            }
        )
    return rows


def _comparable(runs: Runs, images: str, full_size: int) -> list[tuple[Reported, int]]:
    """Rows of the paper for which there are scores of ours, each with our size in px."""
    pairs = [(row, row.size * full_size // PAPER_SIZE) for row in RECONSTRUCTION]
    return [
        (row, size)
        for row, size in pairs
        if row.variant in runs and str(size) in runs[row.variant][0]["sets"][images]
    ]


def sets_table(runs: Runs, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """All metrics of every model on every set of held-out images, means over seeds."""
    rows = []
    for images in next(iter(runs.values()))[0]["sets"]:
        for variant, seeds in runs.items():
            for size in sizes:
                if str(size) in seeds[0]["sets"][images]:
                    row = {"images": images, "model": label(variant), "px": size}
                    rows.append(row | _metrics(seeds, images, size))
    return rows


def _metrics(seeds: Sequence[Scores], images: str, size: int) -> dict[str, Any]:
    """Heading -> mean over seeds of each metric that was measured, with an interval if it has one."""
    records = [at(seed, images, size) for seed in seeds]
    row: dict[str, Any] = {}
    for name, metric in METRICS.items():
        row[metric.heading] = None
        if all(name in record["by_photograph"] for record in records):
            row[metric.heading] = with_interval(
                *interval(seeds, name, images, size), digits=metric.digits
            )
    for name, metric in GENERATION_METRICS.items():
        if all(name in record for record in records):
            row[metric.heading] = metric.factor * fmean(record[name] for record in records)
    row["score"] = fmean(record["lite0_score"] for record in records)
    row["bits/px"] = fmean(record["bits_per_pixel"] for record in records)
    return row


def headline(
    tokenizers: Runs, generators: Runs, throughput: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """The paper's changes against ViT-VQGAN beside ours: model, measure, paper, ours."""
    rows: list[dict[str, Any]] = []

    def add(variant: str, measure: str, paper: str | None, ours: str) -> None:
        rows.append({"model": label(variant), "measure": measure, "paper": paper, "ours": ours})

    baseline = tokenizers.get(BASELINE)
    if baseline:
        images = next(iter(baseline[0]["sets"]))
        size = max(map(int, baseline[0]["sets"][images]))
        paper = {row.variant: row for row in RECONSTRUCTION if row.size == PAPER_SIZE}
        base = paper[BASELINE]
        for variant, row in paper.items():
            if variant == BASELINE or variant not in tokenizers:
                continue
            pair = tokenizers[variant], baseline
            psnr = change(*pair, "psnr", "difference", images, size)
            lpips = change(*pair, "lpips_alex", "ratio", images, size)
            reported = f"{row.psnr - base.psnr:+.1f}" if row.psnr and base.psnr else None
            add(variant, "PSNR, dB ↑", reported, with_interval(*psnr, sign="+"))
            ratio = f"x {row.lpips / base.lpips:.2f}"
            add(variant, "LPIPS ↓", ratio, f"x {with_interval(*lpips)}")
    for variant, (other, fid, base_fid) in FID.items():
        if variant in generators and other in generators:
            ours, theirs = (
                fmean(seed["fd_lite0"] for seed in generators[name]) for name in (variant, other)
            )
            measure = "distance to real images ↓"
            add(variant, measure, f"x {fid / base_fid:.2f}", f"x {ours / theirs:.2f}")
    for row in (throughput or {"rows": []})["rows"]:
        if row["geometry"] == "paper" and row["paper_ratio"]:
            variant, measure = (
                next(iter(row["images_per_second"])),
                f"images a second, {row['size']} px ↑",
            )
            add(variant, measure, f"x {row['paper_ratio']:.2f}", f"x {row['ratio']:.2f}")
    return rows
