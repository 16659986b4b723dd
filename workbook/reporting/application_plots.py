"""Figures and table rows of the applications: rates, upsampling, editing, previews."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from workbook.figures.core import BLACK, ORANGE, colour
from workbook.names import label
from workbook.site.compare import with_interval

FILES = {
    "jpeg": ("JPEG", BLACK),
    "jpeg_half": ("JPEG of half the size", "#B08A5A"),
    "jpeg2000": ("JPEG 2000", "#7A7A7A"),
}
SETTINGS = {"jpeg": "quality {}", "jpeg_half": "quality {}", "jpeg2000": "1 : {} asked for"}
METRICS = {"psnr": "PSNR, dB", "lpips_alex": "LPIPS-Alex"}


def rate_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """PSNR and LPIPS against bits per pixel, a line for each tokenizer and kind of file; bars are 95 % intervals."""
    fig, axes = plt.subplots(1, len(METRICS), figsize=(9.2, 3.5))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for name, points in curves.items():
            text, tone = FILES.get(name) or (label(name), colour(name))
            rates, values = ([point[key] for point in points] for key in ("bits_per_pixel", metric))
            errors = [
                [abs(point["intervals"][metric][side] - point[metric]) for point in points]
                for side in (0, 1)
            ]
            style = {"marker": "s", "linestyle": "--"} if name in FILES else {"marker": "o"}
            axis.errorbar(
                rates, values, errors, color=tone, markersize=4, label=text, capsize=2, **style
            )
        axis.set(xlabel="bits per pixel", ylabel=title, xscale="log")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return fig


def rate_rows(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Every point of `rate_curves` as a row, fewest bits first."""
    points = [(name, point) for name, row in curves.items() for point in row]
    return [
        {
            "coded by": FILES[name][0] if name in FILES else label(name),
            "setting": SETTINGS.get(name, "{}").format(point["setting"]),
            "bits per pixel": point["bits_per_pixel"],
            "with headers": point.get("bits_per_pixel_of_file"),
            **{title: point[metric] for metric, title in METRICS.items()},
        }
        for name, point in sorted(points, key=lambda pair: pair[1]["bits_per_pixel"])
    ]


def matched_rows(
    curves: Mapping[str, Any], matched: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Each tokenizer with all its scales, and files of as many bits."""
    rows = []
    for name, files in matched.items():
        points = {label(name): curves[name][-1]} | {
            FILES[kind][0]: point for kind, point in files.items()
        }
        for who, point in points.items():
            rows.append(
                {
                    "beside": label(name),
                    "coded by": who,
                    "bits per pixel": point["bits_per_pixel"],
                    "with headers": point.get("bits_per_pixel_of_file"),
                    **{
                        title: with_interval(
                            point[metric],
                            *point["intervals"][metric],
                            digits=2 if metric == "psnr" else 3,
                        )
                        for metric, title in METRICS.items()
                    },
                }
            )
    return rows


def upsampling_rows(shares: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A row for every way of upsampling, largest factor first."""

    def ratio(scores: Mapping[str, Any], name: str) -> str | None:
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


def editing_curves(editing: Mapping[str, Any]) -> Figure:
    """What is recognised in an edited image, beside its ceiling, and how far the image is from the original, by kept scales."""
    fig, axes = plt.subplots(1, 3, figsize=(10.4, 3.2))
    kept, ceiling = editing["kept"], editing["ceiling"]
    scales = [int(k) for k in kept]
    panels = {
        "r_precision_new": ("new caption recognised, %", colour("sit4")),
        "r_precision_old": ("own caption recognised, %", ORANGE),
        "lpips_alex": ("LPIPS-Alex to the original", colour("sit5")),
    }
    for axis, (key, (title, tone)) in zip(axes, panels.items(), strict=True):
        values = [row[key]["value"] for row in kept.values()]
        errors = [
            [abs(row[key]["interval"][side] - row[key]["value"]) for row in kept.values()]
            for side in (0, 1)
        ]
        axis.errorbar(scales, values, errors, marker="o", color=tone, capsize=2)
        axis.set(xlabel="scales kept", ylabel=title, xticks=scales)
        if key in ceiling:
            axis.axhline(ceiling[key]["value"], color="0.3", linestyle="--", label="real images")
            axis.axhline(100 / editing["candidates"], color="0.5", linestyle=":", label="chance")
            axis.legend()
    return fig
