"""Models beside their baseline and beside the paper, with bootstrap intervals over photographs."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np

from sitlib.metrics import paired_interval
from workbook.names import label

Scores = Mapping[str, Any]  # metrics of one run, as the evaluation stages write them
Runs = Mapping[str, Sequence[Scores]]  # variant -> metrics of its seeds
Interval = tuple[float, float, float]  # value, lower and upper bound at 95 %
BASELINE = "vit_vqgan"


class Reported(NamedTuple):
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
# Generator -> its baseline, the paper's FIDs of both: ImageNet, 650M parameters; MS-COCO; 256 px.
TEXT = "ar_captioned_sit4_sc", "ar_captioned_vit_vqgan"
FID = {"ar_sit4": ("ar_vit_vqgan", 6.95, 8.37), TEXT[0]: (TEXT[1], 12.6, 12.4)}


def with_interval(value: float, low: float, high: float, digits: int = 2, sign: str = "") -> str:
    """Format as "0.83 [0.81, 0.85]"; `sign="+"` shows the sign of positive numbers.

    Numbers are taken with six digits, which files of results have: a tie is rounded alike
    before and after it was in one.
    """
    value, low, high = (float(f"{x:.6g}") for x in (value, low, high))
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


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
    means, counts = [], {}
    for runs, px in ((seeds, size), (baseline, baseline_size or size)):
        records = [run["sets"][images][str(px)] for run in runs]
        names = records[0]["photographs"]
        values = np.mean([record["by_photograph"][metric] for record in records], axis=0)
        means.append(dict(zip(names, values, strict=True)))
        counts = dict(zip(names, records[0]["counts"], strict=True)) | counts  # our views first
    names = [name for name in means[0] if name in means[1]]
    pairs = np.array([[of_model[name] for name in names] for of_model in means])  # [2, P]
    views = np.array([counts[name] for name in names])
    first, second = np.average(pairs, axis=1, weights=views)
    bounds = paired_interval(pairs[0], pairs[1], names, kind=kind, counts=views)
    return float(first - second if kind == "difference" else first / second), *bounds


def r_precision(seeds: Sequence[Scores], kind: str, baseline: Sequence[Scores] = ()) -> Interval:
    """R-precision (%) of samples for one kind of prompts, less a baseline's for the same."""

    def by_prompt(seeds: Sequence[Scores]) -> np.ndarray:
        return np.mean([seed["kinds"][kind]["samples"]["by_prompt"] for seed in seeds], axis=0)

    ours = by_prompt(seeds)
    theirs = by_prompt(baseline) if baseline else np.zeros(len(ours))
    return float((ours - theirs).mean()), *paired_interval(ours, theirs, range(len(ours)))


def distance_ratio(
    ours: Sequence[Scores], theirs: Sequence[Scores], to: str = "", metric: str = "fd_lite0"
) -> str:
    """Ratio of distances, means over seeds, with a standard error over photographs as if both were
    independent; `to`: "to_reconstructions" for those to reconstructed references.
    """
    means, shares = [], []
    for seeds in (ours, theirs):
        scores = [seed[to] if to else seed for seed in seeds]
        means.append(fmean(seed[metric] for seed in scores))
        shares.append(fmean(seed["jackknife"][metric] for seed in scores) / means[-1])
    value = means[0] / means[1]
    return f"x {value:.2f} ± {value * math.hypot(*shares):.2f}"


def sampler_range(ours: Sequence[Scores], theirs: Sequence[Scores]) -> str:
    """Lowest and highest ratio of FD-Lite0 where both models have the same sampler of a sweep."""
    ratios = [
        fmean(seed[sweep][k]["fd_lite0"] for seed in ours)
        / fmean(seed[sweep][k]["fd_lite0"] for seed in theirs)
        for sweep in ("top_p_sweep", "guidance_sweep")
        for k in range(len(ours[0].get(sweep, [])))
    ]
    return f"x {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""


def headline(
    generators: Runs, throughput: Sequence[Mapping[str, Any]], retrained: Mapping[str, Scores]
) -> list[dict[str, Any]]:
    """The paper's changes against ViT-VQGAN beside ours: model, measure, paper, ours, and of
    distances what another metric, samplers and trainings, `retrained`, give.
    """
    rows = []

    def add(variant: str, measure: str, paper: str | None, ours: str, **more: str) -> None:
        row = {"model": label(variant), "measure": measure, "paper": paper, "ours": ours}
        others = {key: more.get(key, "") for key in ("KID", "other samplers", "trained again")}
        rows.append(row | others)

    for variant in (name for name in generators if name.startswith(("ar_sit", TEXT[0]))):
        other, *fids = FID.get(variant, ("ar_vit_vqgan",))
        if other not in generators:
            continue
        for title, to in (("real images", ""), ("their reconstructions", "to_reconstructions")):
            paper = f"x {fids[0] / fids[1]:.2f}" if fids and not to else None
            pair, more = (generators[variant], generators[other]), {}
            more["KID"] = distance_ratio(*pair, to, "kid")
            if not to:
                more["other samplers"] = sampler_range(*pair)
            if {variant, other} <= retrained.keys():
                again = [retrained[name] for name in (variant, other)]
                first, second = (of[to] if to else of for of in again)
                fd, kid = (first[key] / second[key] for key in ("fd_lite0", "kid"))
                more["trained again"] = f"x {fd:.2f} (KID x {kid:.2f})"
            add(variant, f"distance to {title} ↓", paper, distance_ratio(*pair, to), **more)
    if set(TEXT) <= generators.keys():
        for name in TEXT:
            ceilings = generators[name][0]["kinds"]["held_out"]
            chance = ceilings["samples"]["chance"]
            above, real = (ceilings[kind]["r_precision"] for kind in ("reconstruction", "real"))
            ours = with_interval(*r_precision(generators[name], "held_out"), 1)
            ours += f" (chance {chance:.0f}, reconstructions {above:.1f}, real images {real:.1f})"
            add(name, "captions recognised, new names, % ↑", None, ours)
    judged = {name: of[0] for name, of in generators.items() if "memorisation" in of[0]}
    for name, seed in judged.items():
        near = f"{100 * seed['memorisation']['share_below_5th']:.1f}"
        add(
            name,
            "nearer to a training view than 95 % of held-out ones, % (5 by chance)",
            None,
            near,
        )
    for row in throughput:
        if row["geometry"] == "paper" and row["paper_ratio"]:
            variant = next(iter(row["images_per_second"]))
            ratios = f"x {row['paper_ratio']:.2f}", f"x {row['ratio']:.2f}"
            add(variant, f"images a second, {row['size']} px ↑", *ratios)
    return rows
