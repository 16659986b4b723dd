"""Metrics of reconstructions, codes and retrieval against independent implementations."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from sitlib import metrics
from sitlib.model.config import TokenizerConfig


@pytest.fixture(scope="module")
def views():
    """Six crops of a photograph of a cat, [6, 3, 64, 64] in [0, 1]."""
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1) / 255
    crops = [photo[:, 60 + y : 188 + y, 100 + x : 228 + x] for y in (0, 40) for x in (0, 40, 80)]
    return F.avg_pool2d(torch.stack(crops), 2)


@pytest.fixture(scope="module")
def noisy(views):
    noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(0))
    return views + torch.linspace(0.02, 0.1, 6)[:, None, None, None] * noise


def naive_ssim(image, reference):
    """Structural similarity of two images [C, H, W] in float64, by its definition."""

    def blurred(x):
        options = {"mode": "mirror", "truncate": 3.5}
        return np.stack([gaussian_filter(channel, 1.5, **options) for channel in x])

    x, y = image.double().numpy(), reference.double().numpy()
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


class TestReconstruction:
    def test_psnr_equals_scikit_image_on_clamped_images(self, views, noisy):
        pairs = zip(views.numpy(), noisy.clamp(0, 1).numpy(), strict=True)
        expected = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in pairs]
        np.testing.assert_allclose(
            metrics.psnr_per_image(noisy, views).numpy(), expected, rtol=1e-4
        )
        assert metrics.psnr_per_image(views, views).isinf().all()

    def test_ssim_equals_its_definition(self, views, noisy):
        values, clamped = metrics.ssim_per_image(noisy, views), noisy.clamp(0, 1)
        expected = [naive_ssim(*pair) for pair in zip(clamped, views, strict=True)]
        np.testing.assert_allclose(values.numpy(), expected, atol=2e-5)
        assert 0 < values[-1] < values[0] < 1
        assert metrics.ssim_per_image(noisy[..., :11, :11], views[..., :11, :11]).shape == (6,)

    def test_lpips_enlarges_small_images_only(self, weights_folder, views, noisy):
        network = metrics.load_lpips("alex")
        small = [F.avg_pool2d(x, 8) for x in (noisy, views)]
        large = [
            F.interpolate(x.clamp(0, 1), scale_factor=8, mode="bicubic").clamp(0, 1) for x in small
        ]
        with torch.no_grad():
            torch.testing.assert_close(metrics.lpips_per_image(*small), network(*large).cpu())
            expected = network(noisy.clamp(0, 1), views).cpu()
        torch.testing.assert_close(metrics.lpips_per_image(noisy, views), expected)

    def test_evaluation_averages_images_and_photographs(self, weights_folder, views, noisy):
        groups = ["b", "a", "b", "a", "a", "c"]
        result = metrics.evaluate_reconstructions(
            views, noisy, groups, metrics=metrics.fast_metrics()
        )
        assert (result["photographs"], result["counts"]) == (["a", "b", "c"], [3, 2, 1])
        assert (
            set(result["intervals"]) == set(result["by_photograph"]) == set(metrics.fast_metrics())
        )
        for name in metrics.fast_metrics():
            value = metrics.METRICS[name].function(noisy, views).double().numpy()
            assert result[name] == pytest.approx(value.mean(), rel=1e-5)
            interval = metrics.bootstrap_interval(value, groups)
            assert result["intervals"][name] == pytest.approx(interval, rel=1e-4)
            means = [value[[1, 3, 4]].mean(), value[[0, 2]].mean(), value[5]]
            assert result["by_photograph"][name] == pytest.approx(means, rel=6e-4)
        protocol = result["protocol"]
        assert protocol["images"] == 6 and protocol["size"] == [64, 64]
        assert "3 photographs" in protocol["intervals"] and "64 px" in protocol["lpips_alex"]
        json.dumps(result, allow_nan=False)

    def test_only_metrics_that_fit_are_measured(self, weights_folder, views, noisy):
        small = [F.avg_pool2d(x, 8) for x in (views, noisy)]
        result = metrics.evaluate_reconstructions(*small)
        assert result["ssim"] is None and result["lpips_alex"] > 0 < result["lpips_vgg"]
        assert set(result["intervals"]) == {"psnr", "lpips_alex", "lpips_vgg"}
        assert result["photographs"] == list(range(6))  # each image counts as a photograph
        result = metrics.evaluate_reconstructions(views, noisy, metrics=["psnr"])
        assert "ssim" not in result and set(result["by_photograph"]) == {"psnr"}
        for pair, of_photographs in ((views, views), None), ((noisy, views), ["a"] * 6):
            result = metrics.evaluate_reconstructions(*pair, of_photographs, metrics=["psnr"])
            assert result["intervals"] == {}  # of infinity, and of a single photograph

    @pytest.mark.parametrize(
        "spoil, message",
        [
            (lambda x: x[:, :, :32], "differ in shape"),
            (lambda x: 2 * x - 1, r"must lie in \[0, 1\]"),
            (lambda x: (255 * x).byte(), "floating-point"),
            (lambda x: torch.where(x > 0.5, float("nan"), x), "these span nan"),
        ],
    )
    def test_bad_images(self, views, spoil, message):
        for function in (metrics.psnr_per_image, metrics.evaluate_reconstructions):
            with pytest.raises(ValueError, match=message):
                function(views[:2], spoil(views[:2]))
        with pytest.raises(ValueError, match="at least 11 px"):
            metrics.ssim_per_image(views[..., :10, :], views[..., :10, :])


class TestCodebooks:
    @given(
        seed=st.integers(0, 2**31),
        num_codes=st.integers(2, 40),
        shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 16)),
        per_scale=st.booleans(),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_numpy(self, seed, num_codes, shape, per_scale):
        codes = np.random.default_rng(seed).integers(0, num_codes, shape)
        num_codebooks, levels = shape[1] if per_scale else 1, shape[1] - 1
        geometry = {"size": 2**levels, "levels": levels, "grid_size": 1}
        config = TokenizerConfig(**geometry, num_codes=num_codes, num_codebooks=num_codebooks)
        counts = metrics.code_counts(torch.from_numpy(codes), num_codes)
        result = metrics.codebook_statistics(counts, len(codes), config)
        parts = np.split(codes, num_codebooks, axis=1)
        for book, part in zip(result["codebooks"].values(), parts, strict=True):
            _, counts = np.unique(part, return_counts=True)
            p = counts / counts.sum()
            assert book["usage"] == pytest.approx(100 * len(counts) / num_codes)
            assert book["perplexity"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
        for scale, of_scale in enumerate(result["scales"]):
            used = len(np.unique(codes[:, scale]))
            assert of_scale["usage"] == pytest.approx(100 * used / num_codes)
            assert of_scale["scale"] == scale + 1
        json.dumps(result, allow_nan=False)


def test_borders_of_squares_are_seen_where_they_are(views):
    """Photographs have none; squares of one color have nothing else; a naive loop agrees."""
    across, inside = metrics.border_differences(views, 8).T
    assert (across / inside).mean() == pytest.approx(1, abs=0.1)
    squares = F.interpolate(F.avg_pool2d(views, 8), scale_factor=8)
    across, inside = metrics.border_differences(squares, 8).T
    assert (across > 0.01).all() and (inside == 0).all()
    image = views[:1, :, :40, :24].double().numpy()
    pairs = {True: [], False: []}
    for steps in (np.diff(image, axis=2), np.diff(image, axis=3).swapaxes(2, 3)):
        kinds = [(row + 1) % 8 == 0 for row in range(steps.shape[2])]
        for kind, found in pairs.items():
            found.append(np.abs(steps[:, :, np.array(kinds) == kind]).mean())
    naive = [np.mean(pairs[True]), np.mean(pairs[False])]
    np.testing.assert_allclose(
        metrics.border_differences(views[:1, :, :40, :24], 8)[0], naive, rtol=1e-4
    )
    with pytest.raises(ValueError, match="borders only"):
        metrics.border_differences(views, 1)


class TestRPrecision:
    @given(seed=st.integers(0, 2**31), candidates=st.integers(2, 22))
    @settings(max_examples=20, deadline=None)
    def test_equals_a_naive_loop(self, seed, candidates):
        """24 captions of 8 names for 12 images; similarities are often tied."""
        generator = np.random.default_rng(seed)
        similarity = torch.from_numpy(generator.integers(6, size=(12, 24)) / 6)
        right, names = generator.integers(24, size=12), [f"name{i % 8}" for i in range(24)]
        expected = []
        for image, caption in enumerate(right):
            others = [other for other in range(24) if names[other] != names[caption]]
            drawn = np.random.default_rng([3, image]).choice(others, candidates - 1, replace=False)
            values = [float(similarity[image, c]) for c in (caption, *drawn)]
            best = [place for place, value in enumerate(values) if value == max(values)]
            expected.append(1 / len(best) if 0 in best else 0.0)
        options = {"candidates": candidates, "seed": 3}
        scores = metrics.r_precision(similarity, torch.from_numpy(right), names, **options)
        assert scores.dtype == torch.float64 and scores.tolist() == expected

    def test_too_few_captions(self):
        with pytest.raises(ValueError, match="captions of other names than 'b'"):
            metrics.r_precision(torch.rand(1, 4), torch.tensor([1]), list("abcd"), candidates=5)
