"""Table and figure of recipe trials (`workbook.trials`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from workbook.figures import colour, label

DEFAULT = "as it is"


def trial_rows(trials: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Rows of a table, grouped by question; changes of a metric are against the same variant as it is, where that was tried."""
    defaults = {trial["variant"]: trial for trial in trials if trial["change"] == DEFAULT}
    rows = []
    for trial in sorted(trials, key=lambda trial: _order(trials, trial)):
        default = defaults.get(trial["variant"])
        psnr, lpips = float(trial["psnr"]), float(trial["lpips_alex"])
        is_default = trial["change"] == DEFAULT
        rows.append(
            {
                "question": trial["question"],
                "model": label(trial["variant"]),
                "change": trial["change"],
                "PSNR, dB": psnr,
                "change, dB": None
                if default is None or is_default
                else psnr - float(default["psnr"]),
                "LPIPS-Alex": lpips,
                "ratio": None
                if default is None or is_default
                else lpips / float(default["lpips_alex"]),
                "LPIPS at 1/8": float(trial["lpips_eighth"]) if trial.get("lpips_eighth") else None,
                "used, %": float(trial["usage"]),
                "seconds": float(trial["seconds"]),
            }
        )
    return rows


def _order(trials: Sequence[Mapping[str, str]], trial: Mapping[str, str]) -> tuple:
    """Questions in the order in which they were first answered, defaults first."""
    questions = list(dict.fromkeys(other["question"] for other in trials))
    return (
        trial["change"] != DEFAULT,
        questions.index(trial["question"]),
        trial["change"],
        trial["variant"],
    )


def trials_plane(trials: Sequence[Mapping[str, str]]) -> Figure:
    """PSNR against LPIPS of all trials: a star for each variant as it is, a dot for each change."""
    fig, axis = plt.subplots(figsize=(7.6, 4.2))
    for variant in dict.fromkeys(trial["variant"] for trial in trials):
        for is_default, marker, size in ((False, "o", 28), (True, "*", 170)):
            points = [
                (float(trial["lpips_alex"]), float(trial["psnr"]))
                for trial in trials
                if trial["variant"] == variant and (trial["change"] == DEFAULT) == is_default
            ]
            if points:
                text = f"{label(variant)}, {'as it is' if is_default else 'one change'}"
                lpips, psnr = zip(*points, strict=True)
                axis.scatter(
                    lpips,
                    psnr,
                    size,
                    color=colour(variant),
                    marker=marker,
                    label=text,
                    zorder=3,
                )
    axis.set(xlabel="LPIPS-Alex (lower is better)", ylabel="PSNR, dB (higher is better)")
    axis.legend(fontsize=8)
    return fig
