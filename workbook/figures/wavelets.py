"""Figures of the wavelet notebook."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sitlib.model.wavelets import dwt2
from workbook.analysis import PowerLaw, ScaleStatistics
from workbook.figures.core import BLACK, BLUE, ORANGE, SKY, colour, panels


def orientation_chart() -> Tensor:
    """A disc, a square and a checkerboard of one-pixel fields, float [1, 3, 96, 96].

    The square begins and ends inside 2 x 2 blocks, or its edges would show at the next level only.
    """
    y, x = torch.arange(96.0)[:, None], torch.arange(96.0)[None, :]
    disc = torch.hypot(y - 31.5, x - 31.5) < 25.2
    square = ((y - 69.5).abs() < 15) & ((x - 69.5).abs() < 15)
    checkerboard = ((y + x) % 2 == 0) & (y >= 64) & (y < 86) & (x >= 10) & (x < 32)
    return (0.15 + 0.7 * (disc | square | checkerboard)).expand(1, 3, 96, 96)


def _picture(image: Tensor) -> np.ndarray:
    return image[0].clamp(0, 1).permute(1, 2, 0).numpy()  # [H, W, 3]


def bands(images: Mapping[str, Tensor], wavelet: str = "haar") -> Figure:
    """One level of the transform, a row for each image [1, 3, H, W]: image, LL, and H, V, D."""
    figure, axes = plt.subplots(len(images), 5, figsize=(7.4, 1.4 * len(images)), squeeze=False)
    for row, (name, image) in zip(axes, images.items(), strict=True):
        LL, details = dwt2(image, wavelet, levels=1)
        row[0].imshow(_picture(image))
        row[1].imshow(_picture(LL))
        grey = details.unflatten(1, (3, -1)).mean(dim=2)[0].numpy()  # [band, h, w], mean colour
        limit = np.quantile(np.abs(grey), 0.995)
        for axis, band in zip(row[2:], grey, strict=True):
            axis.imshow(band, cmap="PuOr", vmin=-limit, vmax=limit)  # white is zero
        figure.colorbar(row[-1].images[0], ax=row[-1], label="coefficient", fraction=0.046)
        row[0].set_ylabel(name)
    titles = ("image", "LL: half the size", "H: horizontal", "V: vertical", "D: diagonal")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def pyramid_mosaic(coefficients: Sequence[Tensor]) -> Tensor:
    """Scales [C_s, h_s, w_s] of one image as the usual nested picture [3, H, W].

    The approximation stands in the corner and details around it, each scale stretched to its own
    98th percentile and centred on grey.
    """
    mosaic = coefficients[0].clamp(0, 1)
    for details in coefficients[1:]:
        limit = details.abs().quantile(0.98).clamp_min(1e-6)
        H, V, D = (details / (2 * limit) + 0.5).clamp(0, 1).chunk(3)
        mosaic = torch.cat([torch.cat([mosaic, V], dim=2), torch.cat([H, D], dim=2)], dim=1)
    return mosaic


def pyramid(image: Tensor, wavelet: str = "haar", levels: int = 3) -> Figure:
    """All coefficients of an image [1, 3, H, W] in Mallat's nested arrangement, bands named."""
    mosaic = pyramid_mosaic([x[0] for x in dwt2(image, wavelet, levels)])
    height, width = mosaic.shape[1:]
    figure, axis = plt.subplots(figsize=(4.4, 4.4 * height / width))
    axis.imshow(mosaic.permute(1, 2, 0))
    for level in range(1, levels + 1):
        h, w = height >> level, width >> level
        for left, top, name in ((0, h, "H"), (w, 0, "V"), (w, h, "D")):
            axis.text(left + 0.1 * w, top + 0.12 * h, f"{name}{level}", fontsize=11 - 1.5 * level)
    axis.axis("off")
    return figure


def energies(groups: Mapping[str, Sequence[ScaleStatistics]]) -> Figure:
    """Share of the energy and of the values by scale, a panel for each group of images."""
    figure, axes = panels(list(groups), width=4.2, height=3.0, sharey=True)
    for axis, scales in zip(axes, groups.values(), strict=True):
        x = np.arange(len(scales))
        for shift, name, tone in ((-0.2, "energy", BLUE), (0.2, "values", ORANGE)):
            shares = [100 * getattr(scale, f"share_of_{name}") for scale in scales]
            bars = axis.bar(x + shift, shares, 0.4, color=tone, label=name)
            axis.bar_label(bars, [f"{share:.2g}" for share in shares], fontsize=8)
        names = [scale.name.replace("approximation", "approx.") for scale in scales]
        axis.set_xticks(x, [name.replace("details", "det.") for name in names])
        axis.set(yscale="log", ylim=(0.2, 200), xlabel="scale, coarsest first")
    axes[0].set_ylabel("share of the images, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def histograms(scales: Sequence[ScaleStatistics]) -> Figure:
    """Density of the coefficients of each scale, logarithmic, with both fits."""
    figure, axes = panels([scale.name for scale in scales], width=1.95, height=2.6)
    for axis, scale in zip(axes, scales, strict=True):
        fit = scale.fit
        x = np.linspace(fit.edges[0], fit.edges[-1], 401)
        axis.stairs(fit.density, fit.edges, fill=True, color=SKY, label="coefficients")
        axis.plot(x, fit.gaussian_density(x), "--", color=colour("gaussian"), label="Gaussian fit")
        axis.plot(x, fit.laplace_density(x), color=colour("laplace"), label="Laplace fit")
        seen = fit.density[fit.density > 0]
        axis.set(yscale="log", ylim=(seen.min() / 2, seen.max() * 2.5), xlabel="value")
    axes[0].set_ylabel("density")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def spectra(groups: Mapping[str, tuple[np.ndarray, np.ndarray, PowerLaw]]) -> Figure:
    """Radial power spectra with their power laws: name -> (frequency, power, law)."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6))
    for i, (name, (frequency, power, law)) in enumerate(groups.items()):
        tone, marker = ((BLUE, "o"), (ORANGE, "s"), (BLACK, "^"))[i % 3]
        axis.loglog(frequency, power, marker, markersize=2.5, color=tone, label=name)
        ends = np.array([law.low, law.high])
        axis.loglog(ends, law(ends), color=tone, label=rf"$f^{{\,-{law.exponent:.2f}}}$")
    axis.set(xlabel="spatial frequency f, cycles per pixel", ylabel="power per pixel")
    axis.legend()
    return figure


def kept(fractions: Sequence[float], groups: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """PSNR against the share of kept coefficients: group -> basis -> PSNR in dB."""
    figure, axes = panels(list(groups), width=4.2, height=3.2, sharey=True)
    percent = [100 * fraction for fraction in fractions]
    for axis, by_basis in zip(axes, groups.values(), strict=True):
        for (basis, psnr), marker in zip(by_basis.items(), "osv^D", strict=False):
            axis.semilogx(percent, psnr, marker=marker, markersize=4, label=basis)
        axis.set_xticks(percent, [f"{tick:g}" for tick in percent])
        axis.minorticks_off()
        axis.set_xlabel("largest coefficients kept, %")
        axis.legend()
    axes[0].set_ylabel("PSNR, dB (mean of the images)")
    return figure


def budget(rows: Sequence[Mapping[str, Any]], scales: Sequence[ScaleStatistics]) -> Figure:
    """Bits per value of each scale beside the energy per value that these bits describe."""
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    bits = np.array([row["bits per value"] for row in rows])
    energy = np.array([scale.share_of_energy / scale.share_of_values for scale in scales])
    axis.semilogy(bits / bits[-1], "o-", color=BLUE, label="bits per value")
    axis.semilogy(energy / energy[-1], "s--", color=ORANGE, label="energy per value")
    for x, value in enumerate(bits):
        place = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axis.annotate(f"{value:.2g} bit", (x, value / bits[-1]), **place)
    axis.set_xticks(range(len(rows)), [row["name"] for row in rows])
    axis.margins(x=0.12, y=0.15)
    axis.set(xlabel="scale, coarsest first", ylabel="relative to the finest scale")
    axis.legend()
    return figure


def kept_rows(
    fractions: Sequence[float], groups: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, float | str]]:
    """The numbers of `kept` as rows of a table."""
    return [
        {"images": name, "basis": basis}
        | {f"{fraction:.0%} kept": float(x) for fraction, x in zip(fractions, psnr, strict=True)}
        for name, by_basis in groups.items()
        for basis, psnr in by_basis.items()
    ]


def shape_rows(scales: Sequence[ScaleStatistics]) -> list[dict[str, float | str]]:
    """Spread, kurtosis and both fits of every scale as rows of a table."""
    return [
        {
            "scale": scale.name,
            "standard deviation": scale.fit.std,
            "kurtosis": scale.fit.kurtosis,
            "exactly zero, %": 100 * scale.fit.zeros,
            "Laplace saves, bits per value": scale.fit.gaussian_bits - scale.fit.laplace_bits,
            "divergence from Gaussian, bits": scale.fit.gaussian_divergence,
            "divergence from Laplace, bits": scale.fit.laplace_divergence,
        }
        for scale in scales
    ]
