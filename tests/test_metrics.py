"""Metrics of reconstructions and of codes against independent references: scikit-image, SciPy, torchmetrics and numpy."""

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
from torchmetrics.image import StructuralSimilarityIndexMeasure

from sitlib.metrics import (
    bits_per_pixel,
    bootstrap_interval,
    codebook_statistics,
    evaluate_reconstructions,
    lpips_per_image,
    psnr_per_image,
    ssim_per_image,
)
from sitlib.metrics.perceptual import load_lpips


@pytest.fixture(scope="module")
def photo_views():
    """6 crops of a photograph of a cat, `[6, 3, 64, 64]` in [0, 1]."""
    photo = torch.from_numpy(data.chelsea()).permute(2, 0, 1) / 255
    views = [photo[:, 60 + y : 188 + y, 100 + x : 228 + x] for y in (0, 40) for x in (0, 40, 80)]
    return F.avg_pool2d(torch.stack(views), 2)


@pytest.fixture(scope="module")
def noisy_views(photo_views):
    noise = torch.randn(photo_views.shape, generator=torch.Generator().manual_seed(0))
    return photo_views + torch.linspace(0.02, 0.1, 6)[:, None, None, None] * noise


def naive_ssim(image, reference):
    """Structural similarity of two images [C, H, W] in float64, by its definition, borders mirrored."""

    def blurred(x):
        return np.stack(
            [gaussian_filter(channel, 1.5, mode="mirror", truncate=3.5) for channel in x]
        )

    x, y = image.double().numpy(), reference.double().numpy()
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx * mx, blurred(y * y) - my * my, blurred(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


class TestReconstruction:
    @given(seed=st.integers(0, 2**31), sigma=st.floats(0.001, 0.5), batch=st.integers(1, 4))
    @settings(max_examples=25, deadline=None)
    def test_psnr_is_that_of_scikit_image_for_each_clamped_image(self, seed, sigma, batch):
        generator = torch.Generator().manual_seed(seed)
        references = torch.rand(batch, 3, 9, 7, generator=generator)
        images = references + sigma * torch.randn(references.shape, generator=generator).clamp(
            -0.9, 0.9
        )
        expected = [
            peak_signal_noise_ratio(a, b, data_range=1)
            for a, b in zip(references.numpy(), images.clamp(0, 1).numpy(), strict=True)
        ]
        np.testing.assert_allclose(psnr_per_image(images, references).numpy(), expected, rtol=1e-4)

    def test_psnr_of_a_known_error(self):
        references = torch.full((2, 3, 4, 4), 0.5)
        images = references + torch.tensor([0.1, 0.01])[:, None, None, None]
        torch.testing.assert_close(
            psnr_per_image(images, references), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0
        )
        assert psnr_per_image(references, references).isinf().all()

    def test_ssim_is_that_of_the_definition_and_of_torchmetrics(self, photo_views, noisy_views):
        found = ssim_per_image(noisy_views, photo_views)
        clamped = noisy_views.clamp(0, 1)
        expected = [naive_ssim(*pair) for pair in zip(clamped, photo_views, strict=True)]
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)
        assert 0 < found[-1] < found[0] < 1
        metric = StructuralSimilarityIndexMeasure(data_range=1.0)
        assert found.mean().item() == pytest.approx(metric(clamped, photo_views).item(), abs=1e-5)
        torch.testing.assert_close(ssim_per_image(photo_views[:1], photo_views[:1]), torch.ones(1))

    def test_ssim_needs_room_for_its_window(self, photo_views, noisy_views):
        assert ssim_per_image(noisy_views[..., :11, :11], photo_views[..., :11, :11]).shape == (6,)
        with pytest.raises(ValueError, match="at least 11 px"):
            ssim_per_image(noisy_views[..., :10, :64], photo_views[..., :10, :64])

    def test_lpips_of_small_images_is_that_of_both_enlarged(
        self, weights_folder, photo_views, noisy_views
    ):
        network = load_lpips("alex", weights_folder)
        small = [F.avg_pool2d(x, 8) for x in (noisy_views, photo_views)]
        large = [
            F.interpolate(x.clamp(0, 1), scale_factor=8, mode="bicubic").clamp(0, 1) for x in small
        ]
        with torch.no_grad():
            expected = network(*large)
        torch.testing.assert_close(lpips_per_image(*small, network), expected)
        with torch.no_grad():  # nothing is resized from 64 px on
            expected = network(noisy_views.clamp(0, 1), photo_views)
        torch.testing.assert_close(lpips_per_image(noisy_views, photo_views, network), expected)

    def test_evaluation_averages_per_image_values_and_states_its_protocol(
        self, weights_folder, photo_views, noisy_views
    ):
        groups = ["b", "a", "b", "a", "a", "c"]
        result = evaluate_reconstructions(
            photo_views,
            noisy_views,
            groups,
            lpips_nets=("alex",),
            folder=weights_folder,
            batch_size=4,
            device="cpu",
        )
        with torch.no_grad():
            lpips = load_lpips("alex", weights_folder)(noisy_views.clamp(0, 1), photo_views)
        values = {
            "psnr": psnr_per_image(noisy_views, photo_views),
            "ssim": ssim_per_image(noisy_views, photo_views),
            "lpips_alex": lpips,
        }
        assert (result["photographs"], result["counts"]) == (["a", "b", "c"], [3, 2, 1])
        for name, value in values.items():
            value = value.double().numpy()
            assert result[name] == pytest.approx(value.mean(), rel=1e-5)
            assert result["intervals"][name] == pytest.approx(
                bootstrap_interval(value, groups), rel=1e-4
            )
            means = [value[[1, 3, 4]].mean(), value[[0, 2]].mean(), value[5]]
            assert result["by_photograph"][name] == pytest.approx(means, rel=6e-4)
        assert set(result["intervals"]) == set(result["by_photograph"]) == set(values)
        assert result["protocol"]["images"] == 6 and result["protocol"]["size"] == [64, 64]
        assert result["protocol"]["lpips_nets"] == ["alex"]
        assert "3 photographs" in result["protocol"]["intervals"]
        json.dumps(result, allow_nan=False)

    def test_evaluation_of_small_images_has_no_ssim_and_says_what_was_resized(
        self, weights_folder, photo_views, noisy_views
    ):
        pair = [F.avg_pool2d(x, 8) for x in (photo_views, noisy_views)]
        result = evaluate_reconstructions(*pair, lpips_nets=("alex",), folder=weights_folder)
        assert result["ssim"] is None and "ssim" not in result["intervals"]
        assert "11x11" in result["protocol"]["ssim"] and "64 px" in result["protocol"]["lpips"]
        assert result["photographs"] == list(range(6))  # each image counts as a photograph

    def test_ssim_that_is_not_wanted_is_not_measured_and_the_rest_stays(
        self, weights_folder, photo_views, noisy_views
    ):
        options = {"lpips_nets": ("alex",), "folder": weights_folder}
        with_it, without = (
            evaluate_reconstructions(photo_views, noisy_views, ssim=ssim, **options)
            for ssim in (True, False)
        )
        assert with_it["ssim"] < 1 and without["ssim"] is None
        for part in ("intervals", "by_photograph", "protocol"):
            assert with_it[part].pop("ssim") and with_it[part] == without[part]
        assert with_it["psnr"] == without["psnr"] and with_it["lpips_alex"] == without["lpips_alex"]

    def test_equal_images_and_views_of_one_photograph_have_no_interval(
        self, weights_folder, photo_views
    ):
        options = {"lpips_nets": (), "folder": weights_folder}
        result = evaluate_reconstructions(photo_views, photo_views, **options)
        assert result["psnr"] == float("inf") and set(result["intervals"]) == {"ssim"}
        assert (
            evaluate_reconstructions(photo_views, photo_views, ["a"] * 6, **options)["intervals"]
            == {}
        )

    def test_both_networks_by_default(self, weights_folder, photo_views):
        result = evaluate_reconstructions(
            photo_views[:2], photo_views[:2].flip(-1), folder=weights_folder
        )
        assert result["lpips_alex"] > 0 < result["lpips_vgg"]

    @pytest.mark.parametrize(
        "spoil, message",
        [
            (lambda x: x[:, :, :32], "differ in shape"),
            (lambda x: 2 * x - 1, r"must lie in \[0, 1\]"),
            (lambda x: 255 * x, r"must lie in \[0, 1\]"),
            (lambda x: (255 * x).byte(), "floating-point"),
            (lambda x: torch.where(x > 0.5, float("nan"), x), "NaN"),
        ],
    )
    def test_bad_reconstructions(self, photo_views, spoil, message):
        for function in (psnr_per_image, ssim_per_image, evaluate_reconstructions):
            with pytest.raises(ValueError, match=message):
                images = spoil(photo_views[:2]), photo_views[:2]
                function(*(images[::-1] if function is evaluate_reconstructions else images))

    def test_one_image_is_too_few(self, photo_views):
        with pytest.raises(ValueError, match="at least 2 images"):
            evaluate_reconstructions(photo_views[:1], photo_views[:1])


class TestCodebooks:
    def test_even_use_of_some_codes(self):
        """Scale 1 uses 4 of 8 codes evenly; scales 2 and 3 use 2 codes each, 4 of 8 together."""
        codes = torch.stack(
            [
                torch.arange(4).repeat(4),
                torch.tensor([0, 1]).repeat(8),
                torch.tensor([6, 7]).repeat(8),
            ]
        )[None].repeat(5, 1, 1)
        result = codebook_statistics(codes, 8)
        expected = {"approximation": (50, 4), "details": (50, 4)}
        for name, (usage, perplexity) in expected.items():
            assert result["codebooks"][name] == pytest.approx(
                {"usage": usage, "perplexity": perplexity}
            )
        assert [scale["usage"] for scale in result["scales"]] == pytest.approx([50, 25, 25])
        assert [scale["perplexity"] for scale in result["scales"]] == pytest.approx([4, 2, 2])
        assert [scale["codebook"] for scale in result["scales"]] == [
            "approximation",
            "details",
            "details",
        ]
        assert [scale["scale"] for scale in result["scales"]] == [1, 2, 3]
        assert result["usage_images"] == 5

    def test_perplexity_of_uneven_use(self):
        codes = torch.tensor([0] * 8 + [1] * 4 + [2] * 4).view(
            1, 1, 16
        )  # shares 1/2, 1/4, 1/4: 1.5 bits
        book = codebook_statistics(codes, 16)["codebooks"]["approximation"]
        assert book == pytest.approx({"usage": 100 * 3 / 16, "perplexity": 2**1.5})

    @given(
        seed=st.integers(0, 2**31),
        num_codes=st.integers(1, 40),
        shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 16)),
    )
    @settings(max_examples=40, deadline=None)
    def test_against_numpy(self, seed, num_codes, shape):
        codes = torch.from_numpy(np.random.default_rng(seed).integers(0, num_codes, shape))
        result = codebook_statistics(codes, num_codes)
        parts = (
            {"approximation": codes[:, :1], "details": codes[:, 1:]}
            if shape[1] > 1
            else {"approximation": codes}
        )
        assert result["codebooks"].keys() == parts.keys()
        for name, part in parts.items():
            _, counts = np.unique(part.numpy(), return_counts=True)
            share = counts / counts.sum()
            assert result["codebooks"][name]["usage"] == pytest.approx(
                100 * len(counts) / num_codes
            )
            assert result["codebooks"][name]["perplexity"] == pytest.approx(
                np.exp(-(share * np.log(share)).sum())
            )
        json.dumps(result, allow_nan=False)

    def test_scales_can_share_one_codebook(self):
        codes = torch.arange(8).view(1, 2, 4)
        result = codebook_statistics(codes, 8, num_codebooks=1)
        assert result["codebooks"] == {
            "approximation": pytest.approx({"usage": 100, "perplexity": 8})
        }
        assert {scale["codebook"] for scale in result["scales"]} == {"approximation"}

    @pytest.mark.parametrize(
        "codes, options, message",
        [
            (torch.zeros(2, 4, dtype=torch.int64), {}, r"\[B, S, N\]"),
            (torch.zeros(2, 1, 4), {}, "integer"),
            (torch.full((2, 1, 4), 8), {}, r"\[0, 8\)"),
            (torch.full((2, 1, 4), -1), {}, r"\[0, 8\)"),
            (torch.zeros(2, 1, 4, dtype=torch.int64), {"num_codebooks": 2}, "codebooks"),
        ],
    )
    def test_bad_codes(self, codes, options, message):
        with pytest.raises(ValueError, match=message):
            codebook_statistics(codes, 8, **options)

    def test_bits_per_pixel(self):
        assert (
            bits_per_pixel(1024, 8192, 256) == 1024 * 13 / 65536
        )  # ViT-VQGAN and SIT-4 of the paper
        assert bits_per_pixel(64, 512, (64, 32)) == 64 * 9 / 2048
        with pytest.raises(ValueError, match="at least 1"):
            bits_per_pixel(0, 512, 64)
