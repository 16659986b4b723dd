"""Figures about sampled images: guidance, retrieval by captions, throughput."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from workbook.figures import colour, label
from workbook.site.compare import r_precision


def sweep_curves(
    sweeps: Mapping[str, Sequence[Sequence[Mapping[str, float]]]],
    of: str,
    title: str,
    metrics: Mapping[str, str],
) -> Figure:
    """One panel for each metric {name: title} against a setting of the sampler: the mean of a model's seeds, and each seed as a dot.

    sweeps: model -> its seeds -> rows with the setting `of`, named `title`, and the metrics.
    """
    fig, axes = plt.subplots(1, len(metrics), figsize=(3.7 * len(metrics), 3.2), squeeze=False)
    for axis, (metric, what) in zip(axes[0], metrics.items(), strict=True):
        settings: list[float] = []
        for name, seeds in sweeps.items():
            settings = [row[of] for row in seeds[0]]
            values = np.array([[row[metric] for row in rows] for rows in seeds])
            text = label(name) if axis is axes[0][0] else None
            axis.plot(settings, values.mean(0), "-", color=colour(name), label=text)
            for one in values:
                axis.plot(settings, one, "o", color=colour(name), markersize=4, alpha=0.6)
        axis.set(xlabel=title, ylabel=what, xticks=settings)
    fig.legend(loc="outside upper center", ncols=min(4, len(sweeps)))
    return fig


def retrieval_bars(
    scores: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]
) -> Figure:
    """R-precision of samples beside what bounds it, one panel for each kind of prompts {name: title}.

    scores: model -> its seeds, each with `kinds[kind][samples | reconstruction | real]`. Bars are means over seeds, with intervals over
    prompts on those of samples; dots are seeds. The lines of real images and their interval are of the first model and seed, since all
    models are judged with the same images.
    """
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(3.7 * len(kinds), 3.4), sharey=True, squeeze=False
    )
    for axis, (kind, title) in zip(axes[0], kinds.items(), strict=True):
        for place, (name, seeds) in enumerate(scores.items()):
            for shift, what, shade in ((-0.2, "samples", 1.0), (0.2, "reconstruction", 0.4)):
                values = [seed["kinds"][kind][what]["r_precision"] for seed in seeds]
                axis.bar(place + shift, np.mean(values), 0.36, color=colour(name), alpha=shade)
                axis.plot([place + shift] * len(values), values, ".", color="0.15", markersize=5)
                if what == "samples":
                    mean, low, high = r_precision(seeds, kind)
                    axis.errorbar(
                        place + shift, mean, [[mean - low], [high - mean]], color="0.15", capsize=3
                    )
                axis.annotate(
                    "samples" if what == "samples" else "reconstructions",
                    (place + shift, 0),
                    (0, -12),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                )
        first = next(iter(scores.values()))[0]["kinds"][kind]
        low, high = first["real"]["interval"]
        axis.axhline(first["real"]["r_precision"], color="0.3", linestyle="--", label="real images")
        axis.axhspan(low, high, color="0.3", alpha=0.08)
        axis.axhline(first["real"]["chance"], color="0.5", linestyle=":", label="chance")
        axis.set(title=fill(title, 32), xticks=range(len(scores)))
        axis.set_xticklabels([label(name).replace(", ", ",\n") for name in scores])
        axis.tick_params(axis="x", pad=14, length=0)
        axis.grid(axis="x", visible=False)
    axes[0][0].set_ylabel("right caption found, %")
    axes[0][0].legend(loc="upper left")
    return fig


def throughput_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Images a second at every size, both models, one panel for each geometry; logarithmic."""
    geometries = list(dict.fromkeys(row["geometry"] for row in rows))
    fig, axes = plt.subplots(
        1, len(geometries), figsize=(4.6 * len(geometries), 3.2), squeeze=False
    )
    for axis, geometry in zip(axes[0], geometries, strict=True):
        chosen = [row for row in rows if row["geometry"] == geometry]
        models = list(chosen[0]["images_per_second"])
        for index, name in enumerate(models):
            places = np.arange(len(chosen)) + 0.38 * (index - 0.5)
            rates = [row["images_per_second"][name] for row in chosen]
            text = label(name) if axis is axes[0][0] else None
            axis.bar(places, rates, 0.36, color=colour(name), label=text)
        for place, row in enumerate(chosen):
            top = max(row["images_per_second"].values())
            axis.annotate(
                f"x {row['ratio']:.2f}", (place, top), ha="center", va="bottom", fontsize=8
            )
        axis.set(yscale="log", xlabel="side of the image, px", xticks=range(len(chosen)))
        axis.set_xticklabels([row["size"] for row in chosen])
        axis.set_title(
            "the profile's geometry" if geometry == "profile" else "the paper's geometry"
        )
        axis.margins(y=0.15)
        axis.grid(axis="x", visible=False)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel("images a second")
    fig.legend(loc="outside upper center", ncols=2)
    return fig
