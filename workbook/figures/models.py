"""Figures of tokenizers, generators and applications."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from sitlib.metrics import METRICS
from sitlib.metrics.codebook import codebook_names
from sitlib.model.quantizer import Codebook
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transformer import SequenceLayout, attend
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


def attention_patterns(layouts: Mapping[str, SequenceLayout]) -> Figure:
    """Who attends to whom, read off `attend` itself with keys that are all alike."""
    figure, axes = panels(list(layouts), width=3.1, height=3.9)
    for axis, layout in zip(axes, layouts.values(), strict=True):
        S, N = layout.num_scales, layout.tokens_per_scale
        zeros, values = torch.zeros(1, 1, S * N, S * N), torch.eye(S * N)[None, None]
        weights = attend(zeros, zeros, values, layout)[0, 0]  # row = query, column = key
        axis.imshow(weights > 0, cmap="Blues", vmin=0, vmax=1.4)
        for edge in range(N, S * N, N):
            axis.axhline(edge - 0.5, color="0.6", linewidth=0.6)
            axis.axvline(edge - 0.5, color="0.6", linewidth=0.6)
        centres, names = [(s + 0.5) * N - 0.5 for s in range(S)], [str(s + 1) for s in range(S)]
        axis.set_xticks(centres, names)
        axis.set_yticks(centres, names)
        axis.set_xlabel("attended token (scale)")
        axis.grid(False)
    axes[0].set_ylabel("token (scale)")
    return figure


@torch.no_grad()
def codebook_map(tokenizer: SpectralTokenizer, images: Tensor) -> Figure:
    """Each codebook and the encoder outputs of images, on the plane of their two main directions."""
    names = codebook_names(len(tokenizer.codebooks))
    figure, axes = panels(names, width=3.4, height=3.7)
    latents = tokenizer.by_codebook(tokenizer.latents(images))
    for axis, name, codebook, z in zip(axes, names, tokenizer.codebooks, latents, strict=True):
        assert isinstance(codebook, Codebook)
        z = F.normalize(z.reshape(-1, z.shape[-1]), dim=-1)
        distance = (z - codebook.lookup(codebook.nearest(z))).norm(dim=-1).mean()
        codes, mean = F.normalize(codebook.weight, dim=-1), z.mean(0)
        plane = torch.linalg.svd(z - mean, full_matrices=False).Vh[:2].T
        points = ((z - mean) @ plane)[:: max(1, len(z) // 1500)]
        stars = (codes - mean) @ plane
        axis.plot(*points.T, ".", color="0.6", markersize=2.5, label="encoder outputs")
        axis.plot(*stars.T, "*", color=colour(name), markersize=5, markeredgewidth=0, label="codes")
        axis.set(xlabel="first direction", title=f"{label(name)}: distance {distance:.2f}")
        axis.set_aspect("equal", adjustable="datalim")
    axes[0].set_ylabel("second direction")
    axes[0].legend(loc="upper right")
    return figure


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


def throughput_bars(rows: Sequence[Scores]) -> Figure:
    """Images a second at every size, both models, one panel for each geometry; logarithmic."""
    geometries = list(dict.fromkeys(row["geometry"] for row in rows))
    titles = [
        f"the {'profile' if name == 'profile' else 'paper'}'s geometry" for name in geometries
    ]
    figure, axes = panels(titles, width=4.6, height=3.2)
    for axis, geometry in zip(axes, geometries, strict=True):
        measured = [row for row in rows if row["geometry"] == geometry]
        for i, name in enumerate(measured[0]["images_per_second"]):
            x = np.arange(len(measured)) + 0.38 * (i - 0.5)
            rates = [row["images_per_second"][name] for row in measured]
            text = label(name) if axis is axes[0] else None
            axis.bar(x, rates, 0.36, color=colour(name), label=text)
        for x, row in enumerate(measured):
            top = max(row["images_per_second"].values())
            axis.annotate(f"x {row['ratio']:.2f}", (x, top), ha="center", va="bottom", fontsize=8)
        axis.set(yscale="log", xlabel="side of the image, px")
        axis.set_xticks(range(len(measured)), [row["size"] for row in measured])
        axis.margins(y=0.15)
        axis.grid(axis="x", visible=False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0].set_ylabel("images a second")
    figure.legend(loc="outside upper center", ncols=2)
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
