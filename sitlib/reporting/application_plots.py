"""Figures and table rows of the applications: rates, upsampling, editing, previews."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sitlib.reporting.comparison import with_interval
from sitlib.reporting.plots import BLACK, ORANGE, colour, label

FILES = {"jpeg": ("JPEG", BLACK), "jpeg2000": ("JPEG 2000", "#7A7A7A")}
METRICS = {"psnr": "PSNR, dB", "lpips_alex": "LPIPS-Alex"}


def rate_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """PSNR and LPIPS against bits per pixel, a line for each tokenizer and kind of file; bars are 95 % intervals."""
    fig, axes = plt.subplots(1, len(METRICS), figsize=(9.2, 3.5))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for name, points in curves.items():
            text, tone = FILES.get(name) or (label(name), colour(name))
            rates, values = ([point[key] for point in points] for key in ("bits_per_pixel", metric))
            errors = [
                [abs(point["intervals"][metric][side] - point[metric]) for point in points] for side in (0, 1)
            ]
            style = {"marker": "s", "linestyle": "--"} if name in FILES else {"marker": "o"}
            axis.errorbar(rates, values, errors, color=tone, markersize=4, label=text, capsize=2, **style)
        axis.set(xlabel="bits per pixel", ylabel=title, xscale="log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def rate_rows(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every point of `rate_curves` as a row, fewest bits first."""
    points = [(name, point) for name, row in curves.items() for point in row]
    return [
        {
            "coded by": FILES[name][0] if name in FILES else label(name),
            "setting": ("quality " if name == "jpeg" else "1 : " if name == "jpeg2000" else "")
            + point["setting"],
            "bits per pixel": point["bits_per_pixel"],
            "with headers": point.get("bits_per_pixel_of_file"),
            **{title: point[metric] for metric, title in METRICS.items()},
        }
        for name, point in sorted(points, key=lambda pair: pair[1]["bits_per_pixel"])
    ]


def upsampling_rows(shares: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A row for every way of upsampling, largest factor first."""
    return [
        {
            "from": f"{size // int(share)} px",
            "by": way,
            "LPIPS-Alex": scores["lpips_alex"],
            "to bicubic": with_interval(scores["lpips_ratio"], *scores["ratio_interval"]),
            "PSNR, dB": scores["psnr"],
            "FD-Lite0": scores["fd_lite0"],
            "consistency, dB": scores["consistency"],
        }
        for share, ways in shares.items()
        if share.isdecimal()
        for way, scores in ways.items()
    ]


def editing_curves(kept: Mapping[str, Mapping[str, Any]], chance: float) -> Figure:
    """What is recognised in an edited image, and how far it is from the original, against the number of kept scales."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
    scales = [int(k) for k in kept]
    for axis, key, text, tone in (
        (left, "r_precision_new", "the new caption", colour("sit4")),
        (left, "r_precision_old", "the image's own caption", ORANGE),
        (right, "lpips_alex", "", colour("sit4")),
    ):
        values = [row[key]["value"] for row in kept.values()]
        errors = [
            [abs(row[key]["interval"][side] - row[key]["value"]) for row in kept.values()] for side in (0, 1)
        ]
        axis.errorbar(scales, values, errors, marker="o", color=tone, capsize=2, label=text)
        axis.set(xlabel="scales kept", xticks=scales)
    left.axhline(chance, color="0.5", linestyle=":", label="chance")
    left.set_ylabel("caption recognised, %")
    right.set_ylabel("LPIPS-Alex to the original")
    left.legend()
    return fig
