"""Contrasts of ablations as points with intervals."""

from collections.abc import Mapping

from matplotlib.figure import Figure

from sitlib.metrics import METRICS
from workbook.effects import Estimate
from workbook.figures.core import BLUE, VERMILLION, panels

CONTRASTED = ("psnr", "lpips_alex")


def forest(estimates: Mapping[str, Mapping[str, Estimate]], zero: str) -> Figure:
    """Contrasts as points with intervals: name -> metric -> estimate; `zero` says what 0 stands
    for.

    Blue: better with 95 % confidence; red: worse; grey: cannot be told.
    """
    sides = {True: "right", False: "left"}
    about = [METRICS[name] for name in CONTRASTED]
    titles = [f"{m.heading} ({sides[m.higher_is_better]} is better)" for m in about]
    figure, axes = panels(titles, width=4.6, height=0.34 * len(estimates) + 1.1, sharey=True)
    for axis, name, metric in zip(axes, CONTRASTED, about, strict=True):
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
