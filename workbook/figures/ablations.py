"""Figures of trials, ablations, costs at growing sizes, the ladder of models, longer training."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sitlib.metrics import METRICS
from workbook.effects import Estimate, power_law
from workbook.figures.core import BLUE, GREEN, ORANGE, VERMILLION, bars_of, colour, panels
from workbook.names import label

Row = Mapping[str, Any]
CONTRAST_METRICS = {name: METRICS[name] for name in ("psnr", "lpips_alex")}
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
FAMILIES = {"AR-SIT-4": BLUE, "AR-ViT-VQGAN": ORANGE, "diffusion over SIT-4": GREEN}
UNCHANGED = "as it is"


def trial_rows(trials: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Recipe trials as rows of a table, grouped by question; changes are against the same variant."""
    defaults = {trial["variant"]: trial for trial in trials if trial["change"] == UNCHANGED}
    questions = list(dict.fromkeys(trial["question"] for trial in trials))

    def order(trial: Mapping[str, str]) -> tuple:
        is_changed = trial["change"] != UNCHANGED
        return is_changed, questions.index(trial["question"]), trial["change"], trial["variant"]

    rows = []
    for trial in sorted(trials, key=order):
        default = defaults.get(trial["variant"]) if trial["change"] != UNCHANGED else None
        psnr, lpips = float(trial["psnr"]), float(trial["lpips_alex"])
        rows.append(
            {
                "question": trial["question"],
                "model": label(trial["variant"]),
                "change": trial["change"],
                "PSNR, dB": psnr,
                "change, dB": psnr - float(default["psnr"]) if default else None,
                "LPIPS-Alex": lpips,
                "ratio": lpips / float(default["lpips_alex"]) if default else None,
                "LPIPS at 1/8": float(trial["lpips_eighth"]) if trial.get("lpips_eighth") else None,
                "used, %": float(trial["usage"]),
                "seconds": float(trial["seconds"]),
            }
        )
    return rows


def trials_plane(trials: Sequence[Mapping[str, str]]) -> Figure:
    """PSNR against LPIPS of all trials: a star for each variant as it is, a dot for each change."""
    figure, axis = plt.subplots(figsize=(7.6, 4.2))
    for variant in dict.fromkeys(trial["variant"] for trial in trials):
        for text, marker, size in ((UNCHANGED, "*", 170), ("one change", "o", 28)):
            points = [
                (float(trial["lpips_alex"]), float(trial["psnr"]))
                for trial in trials
                if trial["variant"] == variant and (trial["change"] == UNCHANGED) == (marker == "*")
            ]
            look: dict[str, Any] = {"color": colour(variant), "marker": marker, "zorder": 3}
            if points:
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, size, label=f"{label(variant)}, {text}", **look)
    axis.set(xlabel="LPIPS-Alex (lower is better)", ylabel="PSNR, dB (higher is better)")
    axis.legend(fontsize=8)
    return figure


def forest(estimates: Mapping[str, Mapping[str, Estimate]], zero: str) -> Figure:
    """Contrasts as points with intervals: name -> metric -> estimate; `zero` says what 0 stands for.

    Blue: better with 95 % confidence; red: worse; grey: cannot be told.
    """
    sides = {True: "right", False: "left"}
    titles = [
        f"{metric.heading} ({sides[metric.higher_is_better]} is better)"
        for metric in CONTRAST_METRICS.values()
    ]
    figure, axes = panels(titles, width=4.6, height=0.34 * len(estimates) + 1.1, sharey=True)
    for axis, (metric, about) in zip(axes, CONTRAST_METRICS.items(), strict=True):
        better = 1 if about.higher_is_better else -1
        axis.axvline(0, color="black", linewidth=0.8)
        for row, by_metric in enumerate(estimates.values()):
            estimate = by_metric[metric]
            tone = {better: BLUE, -better: VERMILLION, 0: "#7A7A7A"}[estimate.sign]
            axis.plot([estimate.low, estimate.high], [row, row], color=tone, linewidth=2)
            axis.plot(estimate.value, row, "o", color=tone, markersize=6)
        axis.set_xlabel(f"difference; 0 = {zero}")
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(estimates)), estimates)
    axes[0].invert_yaxis()
    return figure


def trade_off(rows: Sequence[Row]) -> Figure:
    """LPIPS of a tokenizer against FD-Lite0 of samples of a model over its codes."""
    figure, axis = plt.subplots(figsize=(7.6, 4.6))
    for i, row in enumerate(sorted(rows, key=lambda row: row["FD-Lite0"])):
        x, y = row["LPIPS-Alex"], row["FD-Lite0"]
        axis.plot(x, y, "o", color=ORANGE if row["row"] == "vit_vqgan" else BLUE, markersize=7)
        side, align = ((5, "left"), (-5, "right"))[i % 2]  # neighbors do not run into each other
        place = {"textcoords": "offset points", "fontsize": 8.5, "ha": align}
        axis.annotate(label(row["row"]), (x, y), (side, 4), **place)
    axis.set_xlabel("LPIPS-Alex of reconstructions (left is better)")
    axis.set_ylabel("FD-Lite0 of samples (down is better)")
    axis.margins(0.18)
    return figure


def costs(rows: Sequence[Row], exponents: Mapping[str, Mapping[str, float]]) -> Figure:
    """Every cost of one image against its side, logarithmic, with the fitted exponent in pixels."""
    figure, axes = plt.subplots(2, 4, figsize=(11.4, 5.4))
    sizes = sorted({row["size"] for row in rows})
    for axis, (key, title) in zip(axes.flat, COSTS.items(), strict=True):
        for variant, fitted in exponents.items():
            points = [
                (row["size"], row[key])
                for row in rows
                if row["variant"] == variant and row["batch_size"] == 1 and row[key]
            ]
            text = f"{label(variant).split('-4')[0]}: {fitted[key]:.2f}"
            axis.loglog(*zip(*points, strict=True), "o-", color=colour(variant), label=text)
        axis.set(title=title, xlabel="side, px")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.legend(fontsize=8, title="exponent in pixels", title_fontsize=8)
    return figure


def batches(rows: Sequence[Row]) -> Figure:
    """Images a second of encode, decode and a training step against the batch size."""
    sizes = sorted({row["size"] for row in rows if row["batch_size"] > 1})
    figure, axes = panels([f"{size} px" for size in sizes], width=4.6)
    for axis, size in zip(axes, sizes, strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            timed = [row for row in rows if (row["variant"], row["size"]) == (variant, size)]
            timed.sort(key=lambda row: row["batch_size"])
            x = [row["batch_size"] for row in timed]
            for key, dash in (("encode", "o-"), ("decode", "o--"), ("train", "o:")):
                text = f"{label(variant).split('-4')[0]}, {key}"
                y = [1 / row[key] for row in timed]
                axis.loglog(x, y, dash, markersize=4, color=colour(variant), label=text)
        axis.set(xlabel="batch size", ylabel="images a second")
        axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        axis.minorticks_off()
    axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def family(rung: Row) -> str:
    """Name of the curve that a rung of the ladder belongs to."""
    name = label(rung["tokenizer"])
    return f"diffusion over {name}" if rung["kind"] == "diffusion" else f"AR-{name}"


def ladder(rungs: Sequence[Row], y: str, title: str, xs: Mapping[str, str]) -> Figure:
    """A score of every rung against size and compute {key: title}, a power law for each family."""
    figure, axes = panels([""] * len(xs), width=4.9, height=3.8)
    for axis, (x, xlabel) in zip(axes, xs.items(), strict=True):
        for name in dict.fromkeys(map(family, rungs)):
            points = sorted((rung[x], rung[y]) for rung in rungs if family(rung) == name)
            sizes, values = map(list, zip(*points, strict=True))
            tone, text = FAMILIES.get(name, "black"), name
            if len(points) > 1:
                factor, exponent = power_law(sizes, values)
                text = f"{name}: exponent {exponent:+.3f}"
                fitted = [factor * size**exponent for size in sizes]
                axis.plot(sizes, fitted, "--", color=tone, linewidth=1)
            axis.loglog(sizes, values, "o", color=tone, label=text)
        axis.set(xlabel=xlabel, ylabel=title)
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(fontsize=8)
    return figure


def changes_but_steps(trial: Row) -> str:
    """Changes of a text trial besides its number of steps, "" if there are none."""
    changes = {k: v for k, v in trial["changes"].items() if k != "text.optimizer.steps"}
    texts = {"text.captions.per_image": "{} captions an image"}
    return ", ".join(texts.get(key, f"{key} {{}}").format(value) for key, value in changes.items())


def recognition(trials: Sequence[Row], kinds: Mapping[str, str]) -> Figure:
    """R-precision against how often training drew an image of each name, a panel a kind of prompts.

    A line joins trials that differ in steps alone; squares differ in more. Bars are intervals over
    names; dashed: reconstructions by the model's tokenizer, an upper bound; dotted: chance.
    """
    figure, axes = panels(list(kinds.values()), height=3.4, sharey=True)
    groups = dict.fromkeys((trial["variant"], changes_but_steps(trial)) for trial in trials)
    for axis, kind in zip(axes, kinds, strict=True):
        for variant, change in groups:
            own = [t for t in trials if (t["variant"], changes_but_steps(t)) == (variant, change)]
            own.sort(key=lambda trial: trial["draws_per_name"])
            samples = [trial["kinds"][kind]["samples"] for trial in own]
            values = [judged["r_precision"] for judged in samples]
            errors = bars_of(values, [judged["interval"] for judged in samples])
            face = "white" if change else colour(variant)
            look: dict[str, Any] = {"fmt": "s-" if change else "o-", "markerfacecolor": face}
            text = ", ".join(filter(None, [label(variant), change]))
            x = [trial["draws_per_name"] for trial in own]
            axis.errorbar(x, values, errors, color=colour(variant), label=text, capsize=3, **look)
            bound = own[0]["kinds"][kind]["reconstruction"]["r_precision"]
            axis.axhline(bound, color=colour(variant), linestyle="--", linewidth=1)
        axis.axhline(trials[0]["kinds"][kind]["samples"]["chance"], color="0.5", linestyle=":")
        axis.set_xlabel("images drawn of each name")
    axes[0].set(ylabel="right caption found, %", ylim=(0, None))  # shared: set after all panels
    axes[0].legend(fontsize=8, loc="upper left")
    return figure
