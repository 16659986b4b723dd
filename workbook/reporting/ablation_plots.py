"""Figures of ablations, of costs at growing image sizes, of the ladder of model sizes, and of longer training on texts."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from workbook.effects import Estimate, power_law
from workbook.figures.core import BLUE, ORANGE, VERMILLION, colour
from workbook.names import label

BETTER, WORSE, UNTOLD = BLUE, VERMILLION, "#7A7A7A"
PANELS = (
    ("psnr", "PSNR, dB (right is better)", 1),
    ("lpips_alex", "LPIPS-Alex (left is better)", -1),
)

# cost of `workbook.efficiency` -> title of its panel
COSTS = {
    "tokens": "tokens",
    "parameters": "parameters",
    "flops": "operations of encode + decode",
    "encode": "encode, s",
    "decode": "decode, s",
    "train": "training step, s",
    "memory_mb": "memory of a training step, MB",
    "sample": "sampling the codes, s",
}


def forest(estimates: Mapping[str, Mapping[str, Estimate]], zero: str) -> Figure:
    """Contrasts as points with intervals, PSNR and LPIPS side by side: name -> metric -> estimate.

    zero: what 0 stands for, below the axes. Blue: better with 95 % confidence; red: worse; grey: cannot be told.
    """
    names = list(estimates)
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 0.34 * len(names) + 1.1), sharey=True)
    places = -np.arange(len(names))
    for axis, (metric, title, better) in zip(axes, PANELS, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for place, name in zip(places, names, strict=True):
            found = estimates[name][metric]
            tone = {better: BETTER, -better: WORSE, 0: UNTOLD}[found.sign]
            axis.plot([found.low, found.high], [place, place], color=tone, linewidth=2)
            axis.plot(found.value, place, "o", color=tone, markersize=6)
        axis.set_title(title)
        axis.set_xlabel(f"difference; 0 = {zero}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(places, names)
    return fig


def trade_off(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Reconstruction against generation: LPIPS of a tokenizer and FD-Lite0 of samples of a model over its codes."""
    fig, axis = plt.subplots(figsize=(7.6, 4.6))
    for row in rows:
        x, y = row["LPIPS-Alex"], row["FD-Lite0"]
        tone = ORANGE if row["row"] == "vit_vqgan" else BLUE
        axis.plot(x, y, "o", color=tone, markersize=7)
        side, align = (-5, "right") if _has_right_neighbour(row, rows) else (5, "left")
        axis.annotate(
            label(row["row"]), (x, y), (side, 4), textcoords="offset points", fontsize=8.5, ha=align
        )
    axis.set_xlabel("LPIPS-Alex of reconstructions (left is better)")
    axis.set_ylabel("FD-Lite0 of samples (down is better)")
    axis.margins(0.12)
    return fig


def _has_right_neighbour(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a label to the right of a point would run into the next one."""
    near = {"LPIPS-Alex": 0.18, "FD-Lite0": 0.04}  # of what the points span
    columns = {key: [other[key] for other in rows] for key in near}
    reach = {key: near[key] * (max(values) - min(values)) for key, values in columns.items()}
    return any(
        0 < other["LPIPS-Alex"] - row["LPIPS-Alex"] < reach["LPIPS-Alex"]
        and abs(other["FD-Lite0"] - row["FD-Lite0"]) < reach["FD-Lite0"]
        for other in rows
    )


def costs(
    rows: Sequence[Mapping[str, Any]], exponents: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Every cost of one image against its pixels, both axes logarithmic; the legend has the fitted exponent."""
    fig, axes = plt.subplots(2, 4, figsize=(11.4, 5.4))
    for axis, (key, title) in zip(axes.flat, COSTS.items(), strict=True):
        for variant, fitted in exponents.items():
            own = [
                row
                for row in rows
                if row["variant"] == variant and row["batch_size"] == 1 and row[key]
            ]
            text = f"{label(variant).split('-4')[0]}: {fitted[key]:.2f}"
            axis.loglog(
                [row["size"] for row in own],
                [row[key] for row in own],
                "o-",
                color=colour(variant),
                label=text,
            )
        axis.set_title(title)
        sizes = sorted({row["size"] for row in rows})
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel("side, px")
        axis.legend(fontsize=8, title="exponent in pixels", title_fontsize=8)
    return fig


def batches(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Images a second of encode, decode and a training step against the batch size."""
    sizes = sorted({row["size"] for row in rows if row["batch_size"] > 1})
    fig, axes = plt.subplots(1, len(sizes), figsize=(4.6 * len(sizes), 3.3), squeeze=False)
    for axis, size in zip(axes.flat, sizes, strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            own = sorted(
                (row for row in rows if row["variant"] == variant and row["size"] == size),
                key=lambda row: row["batch_size"],
            )
            for key, dash in (("encode", "-"), ("decode", "--"), ("train", ":")):
                axis.loglog(
                    [row["batch_size"] for row in own],
                    [1 / row[key] for row in own],
                    dash,
                    marker="o",
                    markersize=4,
                    color=colour(variant),
                    label=f"{label(variant).split('-4')[0]}, {key}",
                )
        axis.set_title(f"{size} px")
        axis.set_xlabel("batch size")
        axis.set_ylabel("images a second")
        axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axis.minorticks_off()
    axes.flat[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


LADDER_COLOURS = {"AR-SIT-4": BLUE, "AR-ViT-VQGAN": ORANGE, "diffusion over SIT-4": "#009E73"}


def family(rung: Mapping[str, Any]) -> str:
    """The curve that a rung belongs to."""
    name = label(rung["tokenizer"])
    return f"diffusion over {name}" if rung["kind"] == "diffusion" else f"AR-{name}"


def ladder(rungs: Sequence[Mapping[str, Any]], y: str, title: str, xs: Mapping[str, str]) -> Figure:
    """A score of every rung against its size and compute, with a power law for each family."""
    fig, axes = plt.subplots(1, len(xs), figsize=(4.9 * len(xs), 3.8), squeeze=False)
    for axis, (x, xlabel) in zip(axes.flat, xs.items(), strict=True):
        for name in dict.fromkeys(map(family, rungs)):
            own = sorted((rung[x], rung[y]) for rung in rungs if family(rung) == name)
            sizes, values = (list(column) for column in zip(*own, strict=True))
            tone = LADDER_COLOURS.get(name, "black")
            text = name
            if len(own) > 1:
                factor, exponent = power_law(sizes, values)
                text = f"{name}: exponent {exponent:+.3f}"
                axis.plot(
                    sizes,
                    [factor * size**exponent for size in sizes],
                    "--",
                    color=tone,
                    linewidth=1,
                )
            axis.loglog(sizes, values, "o", color=tone, label=text)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(title)
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(fontsize=8)
    return fig


def otherwise(trial: Mapping[str, Any]) -> str:
    """In what else than its steps a trial of `workbook.text_trials` differs from the pipeline's model; "" if in nothing."""
    said = {"text.captions.per_image": "{} captions an image"}
    changes = {
        key: value for key, value in trial["changes"].items() if key != "text.optimizer.steps"
    }
    return ", ".join(said.get(key, f"{key} {{}}").format(value) for key, value in changes.items())


def recognition(trials: Sequence[Mapping[str, Any]], kinds: Mapping[str, str]) -> Figure:
    """R-precision of text-conditional models against how often training drew an image of each name, a panel for each kind of prompts.

    A line is of trials that differ in steps alone, squares are of those that differ from the pipeline's model in more. Bars are intervals
    over names; the dashed line is of reconstructions by the model's tokenizer, which bound it; dotted is chance.

    Args:
        trials: results of `workbook.text_trials`.
        kinds: kind of prompts -> its title.
    """
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(3.7 * len(kinds), 3.4), sharey=True, squeeze=False
    )
    for axis, (kind, title) in zip(axes[0], kinds.items(), strict=True):
        for variant, change in dict.fromkeys(
            (trial["variant"], otherwise(trial)) for trial in trials
        ):
            own = sorted(
                (
                    trial
                    for trial in trials
                    if (trial["variant"], otherwise(trial)) == (variant, change)
                ),
                key=lambda trial: trial["draws_per_name"],
            )
            found = [trial["kinds"][kind]["samples"] for trial in own]
            values = [judged["r_precision"] for judged in found]
            errors = [
                [abs(judged["interval"][side] - judged["r_precision"]) for judged in found]
                for side in (0, 1)
            ]
            axis.errorbar(
                [trial["draws_per_name"] for trial in own],
                values,
                errors,
                fmt="s-" if change else "o-",
                markerfacecolor="white" if change else None,
                capsize=3,
                color=colour(variant),
                label=", ".join(filter(None, [label(variant), change])),
            )
            bound = own[0]["kinds"][kind]["reconstruction"]["r_precision"]
            axis.axhline(bound, color=colour(variant), linestyle="--", linewidth=1)
        axis.axhline(trials[0]["kinds"][kind]["samples"]["chance"], color="0.5", linestyle=":")
        axis.set(title=fill(title, 32), xlabel="images drawn of each name")
    axes[0][0].set(
        ylabel="right caption found, %", ylim=(0, None)
    )  # after all panels, which share it
    axes[0][0].legend(fontsize=8, loc="upper left")
    return fig
