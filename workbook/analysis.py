"""What wavelet coefficients of images look like: the numbers behind the wavelet notebook.

Coefficients have the scaling of an orthonormal transform (`orthonormal_gains`), so that squares are energies
and the energies of the scales add up. Images are float [B, C, H, W] in [0, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor

from sitlib.model.patchify import SpectralGeometry
from sitlib.model.wavelets import dwt2, idwt2, orthonormal_gains


@dataclass(frozen=True)
class DistributionFit:
    """A sample beside its maximum-likelihood Gaussian and Laplace distributions.

    The costs are mean negative log2-likelihoods in bits per value (of a density, so they may be negative):
    their difference says how many bits a value costs more under the wrong model. The divergences are
    Kullback-Leibler divergences in bits from the histogram to each fit.
    """

    mean: float
    std: float
    median: float
    mean_deviation: float  # mean distance from the median: the scale b of the Laplace fit
    kurtosis: float  # fourth standardised moment: Gaussian 3, Laplace 6
    zeros: float  # share of values that are exactly zero
    gaussian_bits: float
    laplace_bits: float
    gaussian_divergence: float
    laplace_divergence: float
    edges: np.ndarray  # [bins + 1], of the histogram
    density: np.ndarray  # [bins]

    def gaussian_density(self, x: np.ndarray) -> np.ndarray:
        return stats.norm.pdf(x, self.mean, self.std)

    def laplace_density(self, x: np.ndarray) -> np.ndarray:
        return stats.laplace.pdf(x, self.median, self.mean_deviation)


@dataclass(frozen=True)
class ScaleStatistics:
    """One scale of a set of images."""

    scale: int  # 1 = approximation
    name: str
    share_of_values: float
    share_of_energy: float  # of the images' energy about their mean colour
    fit: DistributionFit


@dataclass(frozen=True)
class PowerLaw:
    """power = scale * frequency ** -exponent, fitted to a radial spectrum."""

    exponent: float
    scale: float
    r_squared: float
    low: float  # frequencies of the fit, cycles per pixel
    high: float

    def __call__(self, frequency: np.ndarray) -> np.ndarray:
        return self.scale * np.asarray(frequency) ** -self.exponent


def orthonormal_coefficients(
    images: Tensor, wavelet: str = "haar", levels: int = 3
) -> list[Tensor]:
    """`dwt2`, orthonormally scaled: with an orthogonal wavelet the sum of squares is that of the pixels."""
    scales = dwt2(images, wavelet, levels)
    return [gain * scale for scale, gain in zip(scales, orthonormal_gains(levels), strict=True)]


def scale_names(levels: int) -> list[str]:
    """Names of L + 1 scales, coarsest first, by the level: ["approximation", "details 3", ...]."""
    return ["approximation", *(f"details {level}" for level in range(levels, 0, -1))]


def scale_statistics(
    images: Tensor, wavelet: str = "haar", levels: int = 3, bins: int = 101
) -> list[ScaleStatistics]:
    """Energy and distribution of coefficients by scale, coarsest first, pooled over images and channels.

    Energies are about each image's own mean colour: brightness alone would put almost all of it into the
    approximation. The distributions are those of the coefficients themselves.
    """
    centred = images.double() - images.double().mean(dim=(2, 3), keepdim=True)
    energies = [
        scale.square().sum().item() for scale in orthonormal_coefficients(centred, wavelet, levels)
    ]
    if sum(energies) == 0:
        raise ValueError(
            "the images are constant, there is no energy to share out: use images with content."
        )
    coefficients = orthonormal_coefficients(images.double(), wavelet, levels)
    return [
        ScaleStatistics(
            scale=number,
            name=name,
            share_of_values=values.numel() / images.numel(),
            share_of_energy=energy / sum(energies),
            fit=fit_distributions(values.flatten().numpy(), bins),
        )
        for number, (name, values, energy) in enumerate(
            zip(scale_names(levels), coefficients, energies, strict=True), start=1
        )
    ]


def fit_distributions(values: np.ndarray, bins: int = 101) -> DistributionFit:
    """Gaussian and Laplace fits (maximum likelihood) of a one-dimensional sample, compared in bits.

    The histogram has `bins` equal bins over the central 99.8 % of the sample; the divergences are taken over
    these bins, each fit renormalized to them.

    Raises:
        ValueError: all values are the same (nothing to fit).
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    mean, std = stats.norm.fit(values)
    median, mean_deviation = stats.laplace.fit(values)
    if not std > 0 or not mean_deviation > 0:
        raise ValueError("all values are the same: fit the coefficients of images with content.")
    low, high = np.quantile(values, [0.001, 0.999])
    if low == high:
        low, high = values.min(), values.max()
    counts, edges = np.histogram(values, bins=bins, range=(low, high))
    models = stats.norm(mean, std), stats.laplace(median, mean_deviation)
    middles = (edges[1:] + edges[:-1]) / 2
    divergences = [
        _divergence(counts, model.logpdf(middles))  # pyrefly: ignore[missing-attribute]
        for model in models
    ]
    return DistributionFit(
        mean=float(mean),
        std=float(std),
        median=float(median),
        mean_deviation=float(mean_deviation),
        kurtosis=float(stats.kurtosis(values, fisher=False)),
        zeros=float(np.mean(np.abs(values) < 1e-9)),
        # At the maximum of the likelihood the mean cost has the form of the model's own entropy.
        gaussian_bits=math.log2(2 * math.pi * math.e * std**2) / 2,
        laplace_bits=math.log2(2 * math.e * mean_deviation),
        gaussian_divergence=float(divergences[0]),
        laplace_divergence=float(divergences[1]),
        edges=edges,
        density=counts / (counts.sum() * np.diff(edges)),
    )


def _divergence(counts: np.ndarray, log_model: np.ndarray) -> float:
    """Kullback-Leibler divergence in bits from a histogram to a model given by log densities of its bins.

    In logarithms, because far out a Gaussian's probability is less than the smallest double.
    """
    seen = counts > 0
    log_found = np.log(counts[seen] / counts.sum())
    log_model = log_model - logsumexp(log_model)
    return np.exp(log_found) @ (log_found - log_model[seen]) / math.log(2)


def radial_power_spectrum(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean power of square images against spatial frequency, over all directions, images and channels.

    Each channel loses its mean and is multiplied by a Hann window (or the jump from one border to the
    opposite one would add a cross of its own). Power is per pixel and compensated for the window: white noise
    of variance v has power v at every frequency.

    Returns:
        frequency [n] in cycles per pixel, one bin a ring of width 1 / size, without 0 and up to 1/2; power
        [n].

    Raises:
        ValueError: the images are not square or smaller than 8 pixels.
    """
    height, width = images.shape[-2:]
    if height != width or height < 8:
        raise ValueError(
            f"the spectrum needs square images of at least 8x8 pixels, not {height}x{width}: crop them."
        )
    x = images.double() - images.double().mean(dim=(-2, -1), keepdim=True)
    line = torch.hann_window(height, periodic=True, dtype=x.dtype)
    window = line[:, None] * line[None, :]
    power = (
        torch.fft.fft2(x * window).abs().square().mean(dim=(0, 1)) / window.square().sum()
    )  # [H, W]
    line = torch.fft.fftfreq(height, dtype=x.dtype)
    ring = (torch.hypot(line[:, None], line[None, :]) * height).round().long().flatten()
    total = torch.bincount(ring, weights=power.flatten())
    number = torch.bincount(ring)
    rings = np.arange(1, height // 2 + 1)
    return rings / height, (total / number).numpy()[rings]


def fit_power_law(
    frequency: np.ndarray, power: np.ndarray, low: float = 0.02, high: float = 0.25
) -> PowerLaw:
    """Straight line through log power against log frequency between two frequencies in cycles per pixel.

    Rings are weighted by 1 / frequency, so that every octave counts the same however many rings it has.

    Raises:
        ValueError: fewer than three rings between the two frequencies.
    """
    inside = (frequency >= low) & (frequency <= high) & (power > 0)
    if inside.sum() < 3:
        raise ValueError(
            f"fewer than three frequencies between {low} and {high}: widen the range or use larger images."
        )
    x, y, weight = np.log(frequency[inside]), np.log(power[inside]), 1 / frequency[inside]
    slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weight))
    residual = np.average((y - slope * x - intercept) ** 2, weights=weight)
    spread = np.average((y - np.average(y, weights=weight)) ** 2, weights=weight)
    return PowerLaw(
        exponent=float(-slope),
        scale=float(np.exp(intercept)),
        r_squared=float(1 - residual / spread),
        low=low,
        high=high,
    )


def psnr_of_kept(
    images: Tensor, fractions: Sequence[float], wavelet: str | None = "haar", levels: int = 3
) -> np.ndarray:
    """PSNR in dB after keeping only the largest coefficients of each image (n-term approximation).

    The fraction counts coefficients of all scales and channels together; they are compared in the orthonormal
    scaling, where dropping the smallest ones costs least (exactly so for orthogonal wavelets). `wavelet=None`
    keeps the largest pixel values about the mean colour instead. Results are clipped to [0, 1] like any
    image.

    Returns:
        [len(fractions)], mean over the images of the PSNR of each.
    """
    mean = images.mean(dim=(2, 3), keepdim=True)
    centred = images - mean  # the mean colour is free: three values an image
    scales = [centred] if wavelet is None else orthonormal_coefficients(centred, wavelet, levels)
    gains = [1.0] if wavelet is None else orthonormal_gains(levels)
    values = torch.cat(
        [scale.flatten(1) for scale in scales], dim=1
    )  # [B, all coefficients of an image]
    order = values.abs().argsort(dim=1, descending=True, stable=True)
    results = []
    for fraction in fractions:
        count = round(fraction * values.shape[1])
        if not 1 <= count <= values.shape[1]:
            raise ValueError(
                f"{fraction} of {values.shape[1]} values is {count} of them: use a fraction in (0, 1]."
            )
        largest = order[:, :count]
        kept = torch.zeros_like(values).scatter(1, largest, values.gather(1, largest))
        parts = kept.split([scale[0].numel() for scale in scales], dim=1)
        kept_scales = [
            part.view_as(scale) / gain
            for part, scale, gain in zip(parts, scales, gains, strict=True)
        ]
        restored = (idwt2(kept_scales, wavelet or "haar") + mean).clamp(0, 1)
        error = (restored - images).square().mean(dim=(1, 2, 3)).clamp_min(1e-12)
        results.append((-10 * error.log10()).mean().item())
    return np.array(results)


def token_budget(geometry: SpectralGeometry, num_codes: int) -> list[dict[str, float | int | str]]:
    """What equally many tokens for every scale mean: one row a scale, coarsest first.

    A code out of `num_codes` carries log2(num_codes) bits; "bits per value" spreads them over the
    coefficients of the scale.
    """
    bits = geometry.tokens_per_scale * math.log2(num_codes)
    rows = []
    for scale, name in zip(geometry.scales, scale_names(geometry.levels), strict=True):
        values = geometry.scale_channels(scale) * geometry.scale_size(scale) ** 2
        rows.append(
            {
                "scale": scale,
                "name": name,
                "values": values,
                "tokens": geometry.tokens_per_scale,
                "values per token": geometry.patch_dim(scale),
                "bits": bits,
                "bits per value": bits / values,
            }
        )
    return rows


def summary(statistics: Sequence[ScaleStatistics], law: PowerLaw) -> dict:
    """The figures that are kept of one set of images: JSON-ready."""
    skipped = {"edges", "density"}
    scales = {
        one.name.replace(" ", "_"): {
            "energy": one.share_of_energy,
            **{key: value for key, value in asdict(one.fit).items() if key not in skipped},
        }
        for one in statistics
    }
    return {
        "spectrum_exponent": law.exponent,
        "spectrum_r_squared": law.r_squared,
        "scales": scales,
    }
