"""Statistics of wavelet coefficients and spectra, for notebook 01. Images are [B, C, H, W]."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from sitlib.model.wavelets import dwt2, orthonormal_gains


@dataclass(frozen=True)
class ScaleStatistics:
    """Coefficients of one scale, pooled over images and channels, in the orthonormal scaling."""

    name: str
    values: np.ndarray  # [n]
    share_of_values: float
    share_of_energy: float  # of the images' energy about their mean color
    std: float
    kurtosis: float  # fourth standardized moment: Gaussian 3, Laplace 6
    zeros: float  # share of exact zeros
    median: float
    deviation: float  # mean distance from the median: the scale b of a Laplace distribution
    laplace_gain: float  # bits per value by which the Laplace fit is cheaper than the Gaussian


def scale_names(levels: int) -> list[str]:
    """Names of levels + 1 scales, coarsest first: ["approximation", "details 3", ...]."""
    return ["approximation", *(f"details {level}" for level in range(levels, 0, -1))]


def orthonormal_dwt2(images: Tensor, wavelet: str = "haar", levels: int = 3) -> list[Tensor]:
    """`dwt2` scaled so that, for orthogonal wavelets, squares sum to the squares of the pixels."""
    scales = dwt2(images, wavelet, levels)
    return [gain * x for x, gain in zip(scales, orthonormal_gains(levels), strict=True)]


def scale_statistics(
    images: Tensor, wavelet: str = "haar", levels: int = 3
) -> list[ScaleStatistics]:
    """Energy and shape of the coefficients of every scale, coarsest first.

    Energies are about each image's own mean color: brightness alone would put almost all of it into
    the approximation.

    Raises:
        ValueError: the images are constant.
    """
    images = images.double()
    centered = images - images.mean(dim=(2, 3), keepdim=True)
    energies = [float(x.square().sum()) for x in orthonormal_dwt2(centered, wavelet, levels)]
    if sum(energies) == 0:
        raise ValueError("the images are constant and have no energy: use images with content.")
    statistics = []
    scales = orthonormal_dwt2(images, wavelet, levels)
    for name, x, energy in zip(scale_names(levels), scales, energies, strict=True):
        values = x.flatten().numpy()
        std, median = values.std(), float(np.median(values))
        deviation = float(np.abs(values - median).mean())
        # Entropies of both distributions at their maximum-likelihood fits, in bits.
        gaussian = math.log2(2 * math.pi * math.e * std**2) / 2
        laplace = math.log2(2 * math.e * deviation)
        statistics.append(
            ScaleStatistics(
                name=name,
                values=values,
                share_of_values=x.numel() / images.numel(),
                share_of_energy=energy / sum(energies),
                std=float(std),
                kurtosis=float(stats.kurtosis(values, fisher=False)),
                zeros=float(np.mean(np.abs(values) < 1e-9)),
                median=median,
                deviation=deviation,
                laplace_gain=gaussian - laplace,
            )
        )
    return statistics


def radial_power_spectrum(images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Power of square images against spatial frequency, a mean over directions and images.

    Each channel loses its mean and gets a Hann window, or the jump from one border to the opposite
    one would add a cross of its own. White noise of variance v has power v at every frequency.

    Returns:
        frequency [n] in cycles per pixel, one ring of width 1 / size each, up to 1/2; power [n].

    Raises:
        ValueError: the images are not square or smaller than 8 px.
    """
    H, W = images.shape[-2:]
    if H != W or H < 8:
        raise ValueError(f"the spectrum needs square images of 8 px or more, not {H} x {W}.")
    x = images.double() - images.double().mean(dim=(-2, -1), keepdim=True)
    hann = torch.hann_window(H, periodic=True, dtype=x.dtype)
    window = hann[:, None] * hann[None, :]
    power = torch.fft.fft2(x * window).abs().square().mean(dim=(0, 1)) / window.square().sum()
    f = torch.fft.fftfreq(H, dtype=x.dtype)
    ring = (torch.hypot(f[:, None], f[None, :]) * H).round().long().flatten()
    mean = torch.bincount(ring, weights=power.flatten()) / torch.bincount(ring)
    rings = np.arange(1, H // 2 + 1)
    return rings / H, mean.numpy()[rings]


def fit_power_law(
    frequency: np.ndarray, power: np.ndarray, low: float = 0.02, high: float = 0.25
) -> tuple[float, float]:
    """Exponent a and factor c of power = c * frequency^-a between two frequencies.

    Rings are weighted by 1 / frequency, so that every octave counts the same.
    """
    inside = (frequency >= low) & (frequency <= high) & (power > 0)
    weight = np.sqrt(1 / frequency[inside])
    slope, intercept = np.polyfit(np.log(frequency[inside]), np.log(power[inside]), 1, w=weight)
    return float(-slope), float(np.exp(intercept))
