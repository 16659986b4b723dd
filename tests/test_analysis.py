"""Statistics of coefficients against samples and images whose statistics are known."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from sitlib.files import write_json
from sitlib.model.patchify import SpectralGeometry
from workbook.analysis import (
    fit_distributions,
    fit_power_law,
    orthonormal_coefficients,
    psnr_of_kept,
    radial_power_spectrum,
    scale_names,
    scale_statistics,
    summary,
    token_budget,
)

RANDOM = np.random.default_rng(0)


def power_law_images(exponent, size=128, count=8, seed=0):
    """Gaussian images whose power falls as frequency ** -exponent, [count, 1, size, size]."""
    random = np.random.default_rng(seed)
    line = np.fft.fftfreq(size)
    frequency = np.hypot(line[:, None], line[None, :])
    frequency[0, 0] = np.inf
    noise = np.fft.fft2(random.standard_normal((count, 1, size, size)))
    return torch.from_numpy(np.fft.ifft2(noise * frequency ** (-exponent / 2)).real)


def test_laplace_sample_is_recognised():
    values = RANDOM.laplace(0.3, 0.05, 200_000)
    fit = fit_distributions(values)
    assert fit.kurtosis == pytest.approx(6, rel=0.1)
    assert fit.median == pytest.approx(0.3, abs=1e-3)
    assert fit.mean_deviation == pytest.approx(0.05, rel=0.02)
    # entropy of a Laplace distribution: log2(2 b e); the Gaussian of the same variance: log2(2 pi e sigma^2)
    # / 2
    assert fit.laplace_bits == pytest.approx(math.log2(2 * 0.05 * math.e), abs=0.02)
    assert fit.gaussian_bits == pytest.approx(
        math.log2(2 * math.pi * math.e * 2 * 0.05**2) / 2, abs=0.02
    )
    assert fit.laplace_divergence < 0.005 < 0.05 < fit.gaussian_divergence


def test_gaussian_sample_is_recognised():
    values = RANDOM.normal(-1, 2, 200_000)
    fit = fit_distributions(values)
    assert fit.kurtosis == pytest.approx(3, rel=0.05)
    assert (fit.mean, fit.std) == (pytest.approx(-1, abs=0.02), pytest.approx(2, rel=0.01))
    assert fit.gaussian_bits < fit.laplace_bits
    assert fit.gaussian_divergence < 0.005 < fit.laplace_divergence
    assert np.sum(fit.density * np.diff(fit.edges)) == pytest.approx(1)
    centres = (fit.edges[1:] + fit.edges[:-1]) / 2
    np.testing.assert_allclose(fit.density, fit.gaussian_density(centres), atol=0.01)


def test_kurtosis_and_zeros_of_a_small_sample():
    values = np.array([0.0, 0.0, 1.0, -1.0, 4.0])
    fit = fit_distributions(values)
    assert fit.kurtosis == pytest.approx(stats.kurtosis(values) + 3)
    assert fit.zeros == pytest.approx(0.4)


def test_costs_are_the_mean_negative_log_likelihoods():
    values = RANDOM.standard_t(3, 1000)
    fit = fit_distributions(values)
    gaussian = stats.norm(values.mean(), values.std()).logpdf(values).mean()
    laplace = (
        stats.laplace(np.median(values), np.abs(values - np.median(values)).mean())
        .logpdf(values)
        .mean()
    )
    assert fit.gaussian_bits == pytest.approx(-gaussian / math.log(2))
    assert fit.laplace_bits == pytest.approx(-laplace / math.log(2))


def test_divergence_is_finite_where_a_gaussian_has_no_probability_left():
    values = np.concatenate([np.zeros(100_000), RANDOM.normal(0, 1, 1000)])
    assert 0 < fit_distributions(values).gaussian_divergence < 100


def test_a_constant_sample_has_no_fit():
    with pytest.raises(ValueError, match="all values are the same"):
        fit_distributions(np.ones(10))


def test_energy_of_white_noise_is_shared_like_the_values():
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = scale_statistics(images, "haar", 3)
    assert [one.name for one in found] == scale_names(3)
    assert [one.scale for one in found] == [1, 2, 3, 4]
    assert sum(one.share_of_energy for one in found) == pytest.approx(1)
    assert sum(one.share_of_values for one in found) == pytest.approx(1)
    for one in found:
        assert one.share_of_energy == pytest.approx(one.share_of_values, rel=0.1)
        assert one.fit.std == pytest.approx(
            12**-0.5, rel=0.1
        )  # of the uniform distribution, kept by the transform


def test_energy_of_a_blocky_image_is_at_its_own_scale():
    checkerboard = (torch.arange(16).view(-1, 1) + torch.arange(16)) % 2
    images = (
        checkerboard.float().repeat_interleave(4, 0).repeat_interleave(4, 1).expand(1, 3, 64, 64)
    )
    share = {}
    coefficients = orthonormal_coefficients(images.double() - 0.5, "haar", 3)
    for name, scale in zip(scale_names(3), coefficients, strict=True):
        share[name] = scale.square().sum().item() / (0.25 * images.numel())
    assert share == pytest.approx(
        {"approximation": 0, "details 3": 1, "details 2": 0, "details 1": 0}
    )


def test_constant_images_have_no_energy_to_share():
    with pytest.raises(ValueError, match="constant"):
        scale_statistics(torch.full((2, 3, 16, 16), 0.5))


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0])
def test_slope_of_a_synthetic_spectrum(exponent):
    law = fit_power_law(*radial_power_spectrum(power_law_images(exponent)))
    assert law.exponent == pytest.approx(exponent, abs=0.12)
    assert law.r_squared > 0.97


def test_white_noise_has_its_variance_at_every_frequency():
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.2
    frequency, power = radial_power_spectrum(images)
    assert (frequency[0], frequency[-1]) == (1 / 64, 0.5)
    np.testing.assert_allclose(power[3:], 0.04, rtol=0.15)


def test_a_wave_is_found_at_its_frequency():
    wave = torch.sin(2 * math.pi * 12 / 64 * torch.arange(64.0)).expand(1, 1, 64, 64)
    frequency, power = radial_power_spectrum(wave)
    assert frequency[power.argmax()] == 12 / 64


def test_fit_of_an_exact_law():
    frequency = np.linspace(0.01, 0.5, 50)
    law = fit_power_law(frequency, 3 * frequency**-2.2)
    assert (law.exponent, law.scale, law.r_squared) == pytest.approx((2.2, 3, 1))
    assert law(np.array([0.1])) == pytest.approx(3 * 0.1**-2.2)


def test_spectra_that_cannot_be():
    with pytest.raises(ValueError, match="square"):
        radial_power_spectrum(torch.rand(1, 3, 32, 64))
    with pytest.raises(ValueError, match="three frequencies"):
        fit_power_law(np.array([0.1, 0.2]), np.array([1.0, 0.5]))


@pytest.mark.parametrize("wavelet", [None, "haar", "bior4.4"])
def test_keeping_more_is_never_worse_and_keeping_all_is_exact(wavelet):
    images = power_law_images(2.0, size=64, count=2).expand(-1, 3, -1, -1)
    images = (images - images.min()) / (images.max() - images.min())
    found = psnr_of_kept(images, [0.01, 0.05, 0.2, 1.0], wavelet)
    assert np.all(np.diff(found) > 0)
    assert found[-1] > 100


def test_psnr_of_kept_is_that_of_the_dropped_energy():
    """In an orthonormal basis the error is the sum of the squares that were dropped, whatever the basis."""
    images = (
        0.5 + 0.05 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    )
    centred = images - images.mean(dim=(2, 3), keepdim=True)
    flat = (
        torch.cat([scale.flatten() for scale in orthonormal_coefficients(centred)])
        .square()
        .sort()
        .values
    )
    dropped = flat[: round(0.75 * flat.numel())].sum() / flat.numel()
    assert psnr_of_kept(images, [0.25])[0] == pytest.approx(-10 * math.log10(dropped), abs=1e-6)


def test_a_piecewise_constant_image_needs_few_coefficients():
    images = torch.zeros(1, 3, 64, 64)
    images[:, :, :32] = 1.0
    assert psnr_of_kept(images, [0.01], "haar", 6)[0] > 100
    assert psnr_of_kept(images, [0.01], None)[0] < 10


def test_a_fraction_that_keeps_nothing_is_refused():
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        psnr_of_kept(torch.rand(1, 3, 8, 8), [0.0])


def test_token_budget_of_the_papers_sit4():
    rows = token_budget(SpectralGeometry(size=256, levels=3, grid_size=16), num_codes=8192)
    assert [row["values per token"] for row in rows] == [12, 36, 144, 576]
    assert [row["bits"] for row in rows] == [256 * 13] * 4
    assert rows[0]["bits per value"] == pytest.approx(13 / 12)
    assert rows[3]["bits per value"] == pytest.approx(13 / 576)
    assert sum(row["values"] for row in rows) == 3 * 256**2


def test_metrics_are_json_with_a_number_per_scale(tmp_path):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    law = fit_power_law(*radial_power_spectrum(images))
    path = tmp_path / "metrics" / "wavelets.json"
    write_json(path, {"noise": summary(scale_statistics(images), law)})
    found = json.loads(path.read_text())["noise"]
    assert set(found["scales"]) == {"approximation", "details_3", "details_2", "details_1"}
    assert sum(scale["energy"] for scale in found["scales"].values()) == pytest.approx(1, abs=1e-5)
    assert found["spectrum_exponent"] == pytest.approx(0, abs=0.1)
