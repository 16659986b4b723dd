"""Statistics of coefficients against samples and images whose statistics are known."""

import math

import numpy as np
import pytest
import torch

from workbook.analysis import (
    fit_power_law,
    orthonormal_dwt2,
    radial_power_spectrum,
    scale_names,
    scale_statistics,
)


def test_energy_of_white_noise_is_shared_like_the_values():
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = scale_statistics(images, "haar", 3)
    assert [row.name for row in rows] == scale_names(3)
    assert sum(row.share_of_energy for row in rows) == pytest.approx(1)
    assert sum(row.share_of_values for row in rows) == pytest.approx(1)
    for row in rows:
        assert row.share_of_energy == pytest.approx(row.share_of_values, rel=0.1)
        assert row.std == pytest.approx(12**-0.5, rel=0.1)  # that of the uniform distribution


def test_energy_of_a_blocky_image_is_at_its_own_scale():
    checkerboard = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).double() - 0.5
    images = checkerboard.kron(torch.ones(4, 4)).expand(1, 3, 64, 64)  # fields of 4 x 4 px
    energies = [float(x.square().sum()) for x in orthonormal_dwt2(images, "haar", 3)]
    assert energies == pytest.approx([0, 0.25 * images.numel(), 0, 0])


@pytest.mark.parametrize(("sample", "kurtosis"), [("laplace", 6), ("normal", 3)])
def test_the_shape_of_a_known_distribution_is_told(sample, kurtosis):
    values = getattr(np.random.default_rng(0), sample)(0.3, 0.05, (1, 1, 512, 512))
    (row,) = scale_statistics(torch.from_numpy(values), levels=0)
    assert row.kurtosis == pytest.approx(kurtosis, rel=0.1)
    # Entropies: log2(2 b e) of Laplace, log2(2 pi e sigma^2) / 2 of Gauss.
    gain = math.log2(2 * math.pi * math.e * 2) / 2 - math.log2(2 * math.e)
    assert (row.laplace_gain == pytest.approx(gain, abs=0.02)) == (sample == "laplace")
    assert (row.laplace_gain > 0) == (sample == "laplace")


def test_constant_images_have_no_energy_to_share():
    with pytest.raises(ValueError, match="constant"):
        scale_statistics(torch.full((2, 3, 16, 16), 0.5))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_slope_of_a_synthetic_spectrum(alpha):
    line = np.fft.fftfreq(128)
    frequency = np.hypot(line[:, None], line[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(np.random.default_rng(0).standard_normal((8, 1, 128, 128)))
    images = torch.from_numpy(np.fft.ifft2(noise * frequency ** (-alpha / 2)).real)
    assert fit_power_law(*radial_power_spectrum(images))[0] == pytest.approx(alpha, abs=0.12)
    f = np.linspace(0.01, 0.5, 50)
    assert fit_power_law(f, 3 * f**-alpha) == pytest.approx((alpha, 3))


def test_white_noise_has_its_variance_at_every_frequency_and_a_wave_its_own():
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    frequency, power = radial_power_spectrum(images)
    assert (frequency[0], frequency[-1]) == (1 / 64, 0.5)
    np.testing.assert_allclose(power[3:], 0.04, rtol=0.15)
    wave = torch.sin(2 * math.pi * 12 / 64 * torch.arange(64.0)).expand(1, 1, 64, 64)
    frequency, power = radial_power_spectrum(wave)
    assert frequency[power.argmax()] == 12 / 64
    with pytest.raises(ValueError, match="square"):
        radial_power_spectrum(torch.rand(1, 3, 32, 64))
