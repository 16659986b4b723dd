"""Figures of tokenizers, generators and ablations."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sitlib.metrics import METRICS
from workbook.effects import Estimate
from workbook.figures.core import BLUE, VERMILLION, colour, panels
from workbook.names import label

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


def forest(estimates: Mapping[str, Mapping[str, Estimate]], zero: str) -> Figure:
    """Contrasts, name -> metric -> estimate, as points with intervals; `zero` says what 0 means.

    Blue: better with 95 % confidence; red: worse; grey: cannot be told.
    """
    about = {name: METRICS[name] for name in ("psnr", "lpips_alex")}
    sides = {True: "right", False: "left"}
    titles = [f"{m.title} ({sides[m.higher_is_better]} is better)" for m in about.values()]
    figure, axes = panels(titles, width=4.6, height=0.34 * len(estimates) + 1.1, sharey=True)
    for axis, (name, metric) in zip(axes, about.items(), strict=True):
        better = 1 if metric.higher_is_better else -1
        axis.axvline(0, color="black", linewidth=0.8)
        for row, by_metric in enumerate(estimates.values()):
            estimate = by_metric[name]
            tone = {better: BLUE, -better: VERMILLION, 0: "#7A7A7A"}[estimate.sign]
            axis.plot([estimate.low, estimate.high], [row, row], color=tone, linewidth=2)
            axis.plot(estimate.value, row, "o", color=tone, markersize=6)
        axis.set_xlabel(f"difference; 0 = {zero}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(estimates)), estimates)
    axes[0].invert_yaxis()
    return figure
