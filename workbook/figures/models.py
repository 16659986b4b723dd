"""Figures of tokenizers and generators."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from workbook.figures.core import colour, panels
from workbook.names import label
from workbook.site.compare import r_precision

Scores = Mapping[str, Any]


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
