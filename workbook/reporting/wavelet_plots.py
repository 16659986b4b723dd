"""Figures of the wavelet notebook. Each function returns a Figure; `plots.show` displays it."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sitlib.model.wavelets import dwt2
from workbook.analysis import PowerLaw, ScaleStatistics
from workbook.figures.core import BLACK, BLUE, ORANGE, SKY, colour

SIGNED = "PuOr"  # white at zero, distinguishable with every common colour-vision deficiency
BANDS = ("H: horizontal edges", "V: vertical edges", "D: diagonals")


def orientation_chart() -> Tensor:
    """A disc, a square and a checkerboard of one-pixel fields, float [1, 3, 96, 96].

    The square begins and ends inside 2x2 blocks: an edge between blocks would show at the next level only.
    """
    y, x = torch.arange(96.0)[:, None], torch.arange(96.0)[None, :]
    disc = torch.hypot(y - 31.5, x - 31.5) < 25.2
    square = ((y - 69.5).abs() < 15) & ((x - 69.5).abs() < 15)
    checkerboard = ((y + x) % 2 == 0) & (y >= 64) & (y < 86) & (x >= 10) & (x < 32)
    return (0.15 + 0.7 * (disc | square | checkerboard)).expand(1, 3, 96, 96)


def bands(images: Mapping[str, Tensor], wavelet: str = "haar") -> Figure:
    """One level of the transform, a row an image [1, 3, H, W]: image, LL, and H, V, D of its mean colour."""
    fig, axes = plt.subplots(len(images), 5, figsize=(7.4, 1.4 * len(images)), squeeze=False)
    for row, (name, image) in zip(axes, images.items(), strict=True):
        approximation, details = dwt2(image, wavelet, levels=1)
        row[0].imshow(picture(image))
        row[1].imshow(picture(approximation))
        grey = details.unflatten(1, (3, -1)).mean(dim=2)[0].numpy()  # [3 bands, h, w]
        limit = np.quantile(np.abs(grey), 0.995)
        shown = [
            axis.imshow(band, cmap=SIGNED, vmin=-limit, vmax=limit)
            for axis, band in zip(row[2:], grey, strict=True)
        ]
        fig.colorbar(shown[-1], ax=row[-1], label="coefficient", fraction=0.046)
        row[0].set_ylabel(name)
    for axis, title in zip(axes[0], ("image", "LL: half the size", *BANDS), strict=True):
        axis.set_title(title, fontsize=8)
    _without_ticks(axes)
    return fig


def pyramid(image: Tensor, wavelet: str = "haar", levels: int = 3) -> Figure:
    """Mallat's arrangement of all coefficients of an image [1, 3, H, W]; each level has its own contrast."""
    approximation, *details = dwt2(image, wavelet, levels)
    canvas = picture(approximation)
    for scale in details:
        three = scale[0].unflatten(0, (3, -1)).mean(dim=1)  # [band, h, w], mean colour
        limit = three.abs().flatten().quantile(0.99)
        grey = ((three / limit).clamp(-1, 1) / 2 + 0.5)[..., None].expand(-1, -1, -1, 3)
        horizontal, vertical, diagonal = grey.numpy()
        canvas = np.vstack([np.hstack([canvas, vertical]), np.hstack([horizontal, diagonal])])
    height, width = canvas.shape[:2]
    fig, axis = plt.subplots(figsize=(4.4, 4.4 * height / width))
    axis.imshow(canvas)
    for level in range(1, levels + 1):
        h, w = height >> level, width >> level
        for left, top, name in ((0, h, "H"), (w, 0, "V"), (w, h, "D")):
            axis.add_patch(
                Rectangle((left - 0.5, top - 0.5), w, h, fill=False, edgecolor=BLACK, lw=0.8)
            )
            place = (left + 0.012 * width, top + 0.035 * height / level)
            axis.text(*place, f"{name}{level}", fontsize=11 - 1.5 * level, ha="left", va="center")
    _without_ticks([axis])
    return fig


def energies(groups: Mapping[str, Sequence[ScaleStatistics]]) -> Figure:
    """Share of the energy and of the values by scale, a panel for each group of images."""
    fig, axes = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups), 3.0), squeeze=False, sharey=True
    )
    for axis, (name, scales) in zip(axes[0], groups.items(), strict=True):
        place = np.arange(len(scales))
        energy = [100 * one.share_of_energy for one in scales]
        values = [100 * one.share_of_values for one in scales]
        axis.bar(place - 0.2, energy, 0.4, color=BLUE, label="energy")
        axis.bar(place + 0.2, values, 0.4, color=ORANGE, label="values")
        for x, share in [
            *zip(place - 0.2, energy, strict=True),
            *zip(place + 0.2, values, strict=True),
        ]:
            axis.annotate(f"{share:.2g}", (x, share), ha="center", va="bottom", fontsize=8)
        axis.set_xticks(place, _short([one.name for one in scales]))
        axis.set_yscale("log")
        axis.set_ylim(0.2, 200)
        axis.grid(False, axis="x")
        axis.set_title(name)
        axis.set_xlabel("scale, coarsest first")
    axes[0, 0].set_ylabel("share of the images, %")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def histograms(scales: Sequence[ScaleStatistics]) -> Figure:
    """Density of the coefficients of each scale, logarithmic, with the Gaussian and the Laplace fit."""
    fig, axes = plt.subplots(1, len(scales), figsize=(1.95 * len(scales), 2.6), squeeze=False)
    for axis, one in zip(axes[0], scales, strict=True):
        fit = one.fit
        x = np.linspace(fit.edges[0], fit.edges[-1], 401)
        axis.stairs(
            fit.density, fit.edges, fill=True, color=SKY, antialiased=False, label="coefficients"
        )
        axis.plot(x, fit.gaussian_density(x), "--", color=colour("gaussian"), label="Gaussian fit")
        axis.plot(x, fit.laplace_density(x), color=colour("laplace"), label="Laplace fit")
        axis.set_yscale("log")
        seen = fit.density[fit.density > 0]
        axis.set_ylim(seen.min() / 2, seen.max() * 2.5)
        axis.set_title(one.name)
        axis.set_xlabel("value")
    axes[0, 0].set_ylabel("density")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return fig


def spectra(spectra: Mapping[str, tuple[np.ndarray, np.ndarray, PowerLaw]]) -> Figure:
    """Radial power spectra with their fitted power laws: {name: (frequency, power, law)}."""
    fig, axis = plt.subplots(figsize=(5.6, 3.6))
    for index, (name, (frequency, power, law)) in enumerate(spectra.items()):
        tone, marker = ((BLUE, "o"), (ORANGE, "s"), (BLACK, "^"))[index % 3]
        axis.loglog(frequency, power, marker, ms=2.5, color=tone, label=name)
        ends = np.array([law.low, law.high])
        axis.loglog(ends, law(ends), color=tone, lw=1.2, label=rf"$f^{{\,-{law.exponent:.2f}}}$")
    axis.set_xlabel("spatial frequency f, cycles per pixel")
    axis.set_ylabel("power per pixel")
    axis.set_title("Radial power spectrum")
    axis.legend()
    return fig


def kept(fractions: Sequence[float], groups: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """PSNR against the share of kept coefficients, a panel for each group: {group: {basis: PSNR in dB}}."""
    fig, axes = plt.subplots(
        1, len(groups), figsize=(4.2 * len(groups), 3.2), squeeze=False, sharey=True
    )
    for axis, (name, curves) in zip(axes[0], groups.items(), strict=True):
        for (basis, psnr), marker in zip(curves.items(), "osv^D", strict=False):
            axis.semilogx(100 * np.asarray(fractions), psnr, marker=marker, ms=4, label=basis)
        axis.set_title(name)
        axis.set_xlabel("largest coefficients kept, %")
        ticks = [100 * fraction for fraction in fractions]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.legend()
    axes[0, 0].set_ylabel("PSNR, dB (mean of the images)")
    return fig


def kept_rows(
    fractions: Sequence[float], groups: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, float | str]]:
    """The numbers of `kept` as rows of a table."""
    heads = [f"{fraction:.0%} kept" for fraction in fractions]
    return [
        {"images": name, "basis": basis, **dict(zip(heads, map(float, psnr), strict=True))}
        for name, curves in groups.items()
        for basis, psnr in curves.items()
    ]


def budget(rows: Sequence[Mapping], scales: Sequence[ScaleStatistics]) -> Figure:
    """Bits per value of each scale beside the energy per value that these bits have to describe."""
    fig, axis = plt.subplots(figsize=(5.6, 3.2))
    place = np.arange(len(rows))
    bits = np.array([row["bits per value"] for row in rows])
    energy = np.array([one.share_of_energy / one.share_of_values for one in scales])
    energy /= energy[-1]
    axis.semilogy(place, bits / bits[-1], "o-", color=BLUE, label="bits per value")
    axis.semilogy(place, energy, "s--", color=ORANGE, label="energy per value")
    for x, (bit, height) in enumerate(zip(bits, bits / bits[-1], strict=True)):
        axis.annotate(
            f"{bit:.2g} bit",
            (x, height),
            xytext=(0, -13),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_xticks(place, [row["name"] for row in rows])
    axis.margins(x=0.12, y=0.15)
    axis.set_ylabel("relative to the finest scale")
    axis.set_xlabel("scale, coarsest first")
    axis.set_title("The same number of tokens for every scale")
    axis.legend()
    return fig


def shape_rows(scales: Sequence[ScaleStatistics]) -> list[dict[str, float | str]]:
    """Rows of a table: spread, kurtosis and both fits of every scale."""
    return [
        {
            "scale": one.name,
            "standard deviation": one.fit.std,
            "kurtosis": one.fit.kurtosis,
            "exactly zero, %": 100 * one.fit.zeros,
            "Laplace saves, bits per value": one.fit.gaussian_bits - one.fit.laplace_bits,
            "divergence from Gaussian, bits": one.fit.gaussian_divergence,
            "divergence from Laplace, bits": one.fit.laplace_divergence,
        }
        for one in scales
    ]


def picture(images: Tensor) -> np.ndarray:
    """The first image of a batch [B, 3, H, W] as [H, W, 3] in [0, 1]."""
    return images[0].clamp(0, 1).permute(1, 2, 0).numpy()


def _short(names: Sequence[str]) -> list[str]:
    return [name.replace("approximation", "approx.").replace("details ", "det. ") for name in names]


def _without_ticks(axes) -> None:
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
