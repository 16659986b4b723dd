"""Figures of tokenizers, generators and applications."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sitlib.metrics import METRICS
from workbook.figures.core import BLACK, ORANGE, bars_of, colour, panels
from workbook.names import label
from workbook.site.compare import r_precision, with_interval

Scores = Mapping[str, Any]
# Image files of applications.json -> name, colour, setting.
FILES = {
    "jpeg": ("JPEG", BLACK, "quality {}"),
    "jpeg_half": ("JPEG of half the size", "#B08A5A", "quality {}"),
    "jpeg2000": ("JPEG 2000", "#7A7A7A", "1 : {} asked for"),
}
RATE_METRICS = {name: METRICS[name] for name in ("psnr", "lpips_alex")}


def quality_by_size(
    models: Mapping[str, Mapping[int, Scores]], metrics: Mapping[str, str]
) -> Figure:
    """One panel a metric {name: title}, a line for each model over {px: scores}."""
    figure, axes = panels([""] * len(metrics), width=4.4)
    sizes = sorted({size for scores in models.values() for size in scores})
    for axis, (metric, title) in zip(axes, metrics.items(), strict=True):
        for name, scores in models.items():
            points = sorted((size, values[metric]) for size, values in scores.items())
            text = label(name) if axis is axes[0] else None
            axis.plot(*zip(*points, strict=True), "o-", color=colour(name), label=text)
        axis.set_xscale("log", base=2)
        axis.set(xlabel="side of the image, px", ylabel=title)
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
    figure.legend(loc="outside upper center", ncols=min(4, len(models)))
    return figure


def nats_by_scale(models: Mapping[str, Sequence[float]], uniform: float) -> Figure:
    """Held-out nats per token of every scale beside those of a uniform guess."""
    figure, axis = plt.subplots(figsize=(6.4, 3.2))
    for name, values in models.items():
        if len(values) == 1:
            axis.axhline(values[0], color=colour(name), label=f"{label(name)} (one scale)")
        else:
            x = range(1, len(values) + 1)
            axis.plot(x, values, "o-", color=colour(name), label=label(name))
    axis.axhline(uniform, color="0.5", linestyle=":", label="uniform guess")
    axis.set_xticks(range(1, max(map(len, models.values())) + 1))
    axis.set(xlabel="scale (1 = approximation, then coarse to fine)", ylabel="nats per token")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def sweep_curves(
    sweeps: Mapping[str, Sequence[Sequence[Scores]]],
    setting: str,
    title: str,
    metrics: Mapping[str, str],
) -> Figure:
    """One panel a metric {name: title} against a sampler's setting: line of means, dots of seeds.

    Args:
        sweeps: model -> its seeds -> rows with the setting and the metrics.
    """
    figure, axes = panels([""] * len(metrics), height=3.2)
    for axis, (metric, text) in zip(axes, metrics.items(), strict=True):
        for name, seeds in sweeps.items():
            x = [row[setting] for row in seeds[0]]
            values = np.array([[row[metric] for row in rows] for rows in seeds])
            legend = label(name) if axis is axes[0] else None
            axis.plot(x, values.mean(0), "-", color=colour(name), label=legend)
            for one in values:
                axis.plot(x, one, "o", color=colour(name), markersize=4, alpha=0.6)
            axis.set_xticks(x)
        axis.set(xlabel=title, ylabel=text)
    figure.legend(loc="outside upper center", ncols=min(4, len(sweeps)))
    return figure


def retrieval_bars(scores: Mapping[str, Sequence[Scores]], kinds: Mapping[str, str]) -> Figure:
    """R-precision of samples beside what bounds it, one panel for each kind of prompts {name: title}.

    Strong bars are samples with intervals over prompts, faint ones reconstructions, dots seeds; lines
    are real images, which are the same for all models, and chance.
    """
    figure, axes = panels(list(kinds.values()), height=3.4, sharey=True)
    for axis, kind in zip(axes, kinds, strict=True):
        for x, (name, seeds) in enumerate(scores.items()):
            for shift, source, alpha in ((-0.2, "samples", 1.0), (0.2, "reconstruction", 0.4)):
                values = [seed["kinds"][kind][source]["r_precision"] for seed in seeds]
                axis.bar(x + shift, np.mean(values), 0.36, color=colour(name), alpha=alpha)
                axis.plot([x + shift] * len(values), values, ".", color="0.15", markersize=5)
            mean, low, high = r_precision(seeds, kind)
            axis.errorbar(x - 0.2, mean, [[mean - low], [high - mean]], color="0.15", capsize=3)
        real = next(iter(scores.values()))[0]["kinds"][kind]["real"]
        axis.axhline(real["r_precision"], color="0.3", linestyle="--", label="real images")
        axis.axhspan(*real["interval"], color="0.3", alpha=0.08)
        axis.axhline(real["chance"], color="0.5", linestyle=":", label="chance")
        axis.set_xticks(range(len(scores)), [label(n).replace(", ", ",\n") for n in scores])
        axis.grid(axis="x", visible=False)
    axes[0].set_ylabel("right caption found, %")
    axes[0].legend(loc="upper left")
    return figure


def rate_curves(curves: Mapping[str, Sequence[Scores]]) -> Figure:
    """PSNR and LPIPS against bits per pixel, a line for each tokenizer and kind of file."""
    figure, axes = panels([""] * len(RATE_METRICS), width=4.6, height=3.5)
    for axis, (metric, about) in zip(axes, RATE_METRICS.items(), strict=True):
        for name, points in curves.items():
            text, tone, _ = FILES.get(name) or (label(name), colour(name), "")
            rates, values = ([point[key] for point in points] for key in ("bits_per_pixel", metric))
            errors = bars_of(values, [point["intervals"][metric] for point in points])
            look = "s--" if name in FILES else "o-"
            axis.errorbar(rates, values, errors, fmt=look, color=tone, ms=4, label=text, capsize=2)
        axis.set(xlabel="bits per pixel", ylabel=about.heading, xscale="log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def rate_rows(curves: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    """Every point of `rate_curves` as a row, fewest bits first."""
    points = [(name, point) for name, row in curves.items() for point in row]
    return [
        {
            "coded by": FILES[name][0] if name in FILES else label(name),
            "setting": FILES[name][2].format(point["setting"])
            if name in FILES
            else point["setting"],
            "bits per pixel": point["bits_per_pixel"],
            "with headers": point.get("bits_per_pixel_of_file"),
            **{about.heading: point[metric] for metric, about in RATE_METRICS.items()},
        }
        for name, point in sorted(points, key=lambda pair: pair[1]["bits_per_pixel"])
    ]


def matched_rows(
    curves: Mapping[str, Any], matched: Mapping[str, Mapping[str, Scores]]
) -> list[dict[str, Any]]:
    """Each tokenizer with all its scales, and files of as many bits."""
    rows = []
    for name, files in matched.items():
        points = {label(name): curves[name][-1]}
        points |= {FILES[kind][0]: point for kind, point in files.items()}
        for coder, point in points.items():
            row = {
                "beside": label(name),
                "coded by": coder,
                "bits per pixel": point["bits_per_pixel"],
            }
            row["with headers"] = point.get("bits_per_pixel_of_file")
            for metric, about in RATE_METRICS.items():
                row[about.heading] = with_interval(
                    point[metric], *point["intervals"][metric], digits=about.digits
                )
            rows.append(row)
    return rows


def upsampling_rows(shares: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A row for every way of upsampling, largest factor first."""

    def ratio(scores: Scores, name: str) -> str | None:
        return with_interval(scores[name], *scores[f"{name}_interval"]) if name in scores else None

    return [
        {
            "from": f"{size // int(share)} px",
            "by": way,
            "LPIPS-Alex": scores["lpips_alex"],
            "to bicubic": ratio(scores, "lpips_ratio"),
            "to untold": ratio(scores, "untold_ratio"),
            "PSNR, dB": scores["psnr"],
            "FD-Lite0": scores["fd_lite0"],
            "KID x 1000": 1000 * scores["kid"],
            "consistency, dB": scores["consistency"],
        }
        for share, ways in shares.items()
        if share.isdecimal()
        for way, scores in ways.items()
    ]


def editing_curves(editing: Scores) -> Figure:
    """Captions recognised in an edited image and its distance to the original, by kept scales."""
    lines = {
        "r_precision_new": ("new caption recognised, %", colour("sit4")),
        "r_precision_old": ("own caption recognised, %", ORANGE),
        "lpips_alex": ("LPIPS-Alex to the original", colour("sit5")),
    }
    figure, axes = panels([""] * len(lines), width=3.4, height=3.2)
    scales = [int(k) for k in editing["kept"]]
    for axis, (key, (title, tone)) in zip(axes, lines.items(), strict=True):
        values = [row[key]["value"] for row in editing["kept"].values()]
        intervals = [row[key]["interval"] for row in editing["kept"].values()]
        errors = bars_of(values, intervals)
        axis.errorbar(scales, values, errors, marker="o", color=tone, capsize=2)
        axis.set(xlabel="scales kept", ylabel=title, xticks=scales)
        if key in editing["ceiling"]:
            real = editing["ceiling"][key]["value"]
            axis.axhline(real, color="0.3", linestyle="--", label="real images")
            axis.axhline(100 / editing["candidates"], color="0.5", linestyle=":", label="chance")
            axis.legend()
    return figure
