"""Metrics against independent references: scikit-image, SciPy, torchmetrics, numpy and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from skimage import data
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.image.fid import FrechetInceptionDistance

from sitlib.lite0 import Lite0, SameConv, load_lite0
from sitlib.metrics import (
    PrecomputedFeatures,
    bits_per_pixel,
    codebook_statistics,
    evaluate_reconstructions,
    frechet_distance,
    generation_metrics,
    kernel_distance,
    lite0_features,
    psnr_per_image,
    split_distance,
)
from sitlib.perceptual import load_lpips


def normal_features(seed, count, dim, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dim, dim)) / math.sqrt(dim)
    return torch.from_numpy(scale * generator.normal(size=(count, dim)) @ mixing + shift)


@pytest.fixture(scope="module")
def lite0(weights_folder):
    return load_lite0(weights_folder)


@pytest.fixture(scope="module")
def photo_views():
    """48 crops of photographs of a cat, a cup, a rocket and an astronaut, `[48, 3, 64, 64]` in [0, 1]."""
    generator = np.random.default_rng(0)
    views = []
    for photo in (data.chelsea(), data.coffee(), data.rocket(), data.astronaut()):
        for _ in range(12):
            y, x = (generator.integers(0, side - 128) for side in photo.shape[:2])
            views.append(torch.from_numpy(photo[y : y + 128, x : x + 128]).permute(2, 0, 1) / 255)
    return torch.nn.functional.avg_pool2d(torch.stack(views), 2)


class TestReconstruction:
    @given(seed=st.integers(0, 2**31), sigma=st.floats(0.001, 0.5), batch=st.integers(1, 4))
    @settings(max_examples=25, deadline=None)
    def test_psnr_is_that_of_scikit_image_for_each_clamped_image(self, seed, sigma, batch):
        generator = torch.Generator().manual_seed(seed)
        references = torch.rand(batch, 3, 9, 7, generator=generator)
        images = references + sigma * torch.randn(references.shape, generator=generator).clamp(-0.9, 0.9)
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

    def test_evaluation_averages_per_image_values_and_states_its_protocol(self, weights_folder, photo_views):
        images = photo_views[:6]
        reconstructions = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        result = evaluate_reconstructions(
            images, reconstructions, lpips_nets=("alex",), folder=weights_folder, batch_size=4, device="cpu"
        )
        psnr = psnr_per_image(reconstructions, images).double().numpy()
        with torch.no_grad():
            lpips = load_lpips("alex", weights_folder)(reconstructions.clamp(0, 1), images).double().numpy()
        assert result["psnr"] == pytest.approx(psnr.mean(), abs=1e-4)
        assert result["lpips_alex"] == pytest.approx(lpips.mean(), abs=1e-5)
        assert result["standard_error"]["psnr"] == pytest.approx(psnr.std(ddof=1) / math.sqrt(6), abs=1e-4)
        assert result["standard_error"]["lpips_alex"] == pytest.approx(
            lpips.std(ddof=1) / math.sqrt(6), abs=1e-5
        )
        assert "lpips_vgg" not in result
        assert result["protocol"]["images"] == 6 and result["protocol"]["size"] == [64, 64]
        assert result["protocol"]["lpips_nets"] == ["alex"]
        json.dumps(result, allow_nan=False)

    def test_both_networks_by_default(self, weights_folder, photo_views):
        result = evaluate_reconstructions(photo_views[:2], photo_views[:2].flip(-1), folder=weights_folder)
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
        for function in (psnr_per_image, evaluate_reconstructions):
            with pytest.raises(ValueError, match=message):
                images = spoil(photo_views[:2]), photo_views[:2]
                function(*(images if function is psnr_per_image else images[::-1]))

    def test_one_image_is_too_few(self, photo_views):
        with pytest.raises(ValueError, match="at least 2 images"):
            evaluate_reconstructions(photo_views[:1], photo_views[:1])


class TestCodebooks:
    def test_even_use_of_some_codes(self):
        """Scale 1 uses 4 of 8 codes evenly; scales 2 and 3 use 2 codes each, 4 of 8 together."""
        codes = torch.stack(
            [torch.arange(4).repeat(4), torch.tensor([0, 1]).repeat(8), torch.tensor([6, 7]).repeat(8)]
        )[None].repeat(5, 1, 1)
        result = codebook_statistics(codes, 8)
        expected = {"approximation": (50, 4), "details": (50, 4)}
        for name, (usage, perplexity) in expected.items():
            assert result["codebooks"][name] == pytest.approx({"usage": usage, "perplexity": perplexity})
        assert [scale["usage"] for scale in result["scales"]] == pytest.approx([50, 25, 25])
        assert [scale["perplexity"] for scale in result["scales"]] == pytest.approx([4, 2, 2])
        assert [scale["codebook"] for scale in result["scales"]] == ["approximation", "details", "details"]
        assert [scale["scale"] for scale in result["scales"]] == [1, 2, 3]
        assert result["usage_images"] == 5

    def test_perplexity_of_uneven_use(self):
        codes = torch.tensor([0] * 8 + [1] * 4 + [2] * 4).view(1, 1, 16)  # shares 1/2, 1/4, 1/4: 1.5 bits
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
            assert result["codebooks"][name]["usage"] == pytest.approx(100 * len(counts) / num_codes)
            assert result["codebooks"][name]["perplexity"] == pytest.approx(
                np.exp(-(share * np.log(share)).sum())
            )
        json.dumps(result, allow_nan=False)

    def test_scales_can_share_one_codebook(self):
        codes = torch.arange(8).view(1, 2, 4)
        result = codebook_statistics(codes, 8, num_codebooks=1)
        assert result["codebooks"] == {"approximation": pytest.approx({"usage": 100, "perplexity": 8})}
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
        assert bits_per_pixel(1024, 8192, 256) == 1024 * 13 / 65536  # ViT-VQGAN and SIT-4 of the paper
        assert bits_per_pixel(64, 512, (64, 32)) == 64 * 9 / 2048
        with pytest.raises(ValueError, match="at least 1"):
            bits_per_pixel(0, 512, 64)


class TestDistances:
    # Fewer samples than features, more, one of each, in both orders.
    @pytest.mark.parametrize("counts", [(20, 30), (200, 300), (20, 300), (300, 20)])
    def test_frechet_distance_is_that_of_scipy_and_torchmetrics(self, counts):
        dim = 48
        features, references = (
            normal_features(0, counts[0], dim),
            normal_features(1, counts[1], dim, 1.5, 0.2),
        )
        covariances = [np.cov(x.numpy(), rowvar=False) for x in (features, references)]
        root = sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(dim)).real
        expected = (features.mean(0) - references.mean(0)).square().sum() + np.trace(
            covariances[0] + covariances[1] - 2 * root
        )
        found = frechet_distance(features, references)
        assert found == pytest.approx(expected.item(), rel=1e-4)
        metric = FrechetInceptionDistance(feature=Extractor(dim))
        metric.update(references, real=True)
        metric.update(features, real=False)
        assert found == pytest.approx(metric.compute().item(), rel=1e-5)

    def test_frechet_distance_of_known_gaussians(self):
        """Between N(0, I) and N(m, 4 I) it is |m|^2 + D (2 - 1)^2; the sets have exactly these moments."""
        x = normal_features(2, 500, 6)
        x = x - x.mean(0)
        x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / 499)).T
        assert frechet_distance(x, 2 * x + torch.tensor([3.0, 0, 0, 0, 0, 0])) == pytest.approx(9 + 6)

    @given(seed=st.integers(0, 2**31), count=st.integers(2, 40))
    @settings(max_examples=25, deadline=None)
    def test_frechet_distance_is_symmetric_not_negative_and_zero_for_equal_sets(self, seed, count):
        features, references = normal_features(seed, count, 12), normal_features(seed + 1, 15, 12)
        distance = frechet_distance(features, references)
        assert distance == pytest.approx(frechet_distance(references, features), rel=1e-6)
        assert distance > 0
        assert abs(frechet_distance(features, features.flip(0))) < 1e-6 * features.square().sum()

    def test_kernel_distance_of_whole_sets_is_the_unbiased_estimate(self):
        features, references = normal_features(0, 30, 8), normal_features(1, 30, 8, shift=0.5)

        def kernel(a, b):
            return (a.numpy() @ b.numpy().T / 8 + 1) ** 3

        def off_diagonal_mean(k):
            return (k.sum() - np.trace(k)) / (30 * 29)

        expected = off_diagonal_mean(kernel(features, features)) + off_diagonal_mean(
            kernel(references, references)
        )
        expected -= 2 * kernel(features, references).mean()
        found, deviation = kernel_distance(features, references, subset_size=30, num_subsets=3)
        assert found == pytest.approx(expected, rel=1e-9)
        assert deviation == pytest.approx(0, abs=1e-9)

    def test_kernel_distance_is_seeded_and_leaves_the_random_state_alone(self):
        features, references = normal_features(0, 40, 8), normal_features(1, 40, 8)
        state = torch.get_rng_state()
        first, again, other = (
            kernel_distance(features, references, subset_size=10, seed=s) for s in (1, 1, 2)
        )
        assert first == again != other
        assert torch.equal(torch.get_rng_state(), state)

    def test_split_distance_shrinks_with_more_images(self):
        features = normal_features(0, 800, 16)
        assert split_distance(features) < split_distance(features[:100]) < split_distance(features[:24])
        assert (
            split_distance(features, seed=1)
            == split_distance(features, seed=1)
            != split_distance(features, seed=2)
        )

    @pytest.mark.parametrize(
        "features, references, message",
        [
            (torch.rand(1, 4), torch.rand(9, 4), "at least 2"),
            (torch.rand(9, 4), torch.rand(9, 5), "one D"),
            (torch.full((9, 4), float("nan")), torch.rand(9, 4), "NaN"),
        ],
    )
    def test_bad_features(self, features, references, message):
        for function in (frechet_distance, kernel_distance):
            with pytest.raises(ValueError, match=message):
                function(features, references)

    def test_too_large_subsets(self):
        with pytest.raises(ValueError, match="smaller number of images, 9"):
            kernel_distance(torch.rand(9, 4), torch.rand(20, 4), subset_size=10)
        with pytest.raises(ValueError, match="at least 4 images"):
            split_distance(torch.rand(3, 4))


class Extractor(PrecomputedFeatures):
    def __init__(self, dim):
        super().__init__()
        self.num_features = dim


class TestLite0:
    @pytest.mark.parametrize("size", [7, 8])
    @pytest.mark.parametrize("kernel", [3, 5])
    def test_same_padding_is_that_of_tensorflow(self, kernel, size):
        """Output i of a strided "same" convolution starts at i * stride - floor(padding / 2)."""
        torch.manual_seed(0)
        conv = SameConv(1, 1, kernel, stride=2, relu6=False)
        x = torch.randn(1, 1, size, size)
        out_size = math.ceil(size / 2)
        before = max((out_size - 1) * 2 + kernel - size, 0) // 2
        padded = torch.zeros(size + 4 * kernel, size + 4 * kernel)
        padded[kernel : kernel + size, kernel : kernel + size] = x[0, 0]
        expected = torch.empty(out_size, out_size)
        for i in range(out_size):
            for j in range(out_size):
                top, left = kernel + 2 * i - before, kernel + 2 * j - before
                window = padded[top : top + kernel, left : left + kernel]
                expected[i, j] = (window * conv.weight[0, 0]).sum() + conv.bias[0]
        torch.testing.assert_close(conv(x)[0, 0], expected)

    def test_recognises_photographs(self, lite0):
        """ImageNet has five classes of domestic cats, 281-285; 967 is espresso, 504 a coffee mug."""
        for photo, classes in ((data.chelsea(), range(281, 286)), (data.coffee(), (967, 504))):
            image = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
            assert lite0.logits(image).argmax().item() in classes
            assert lite0.logits(image.flip(-1)).argmax().item() in classes

    def test_features_are_pooled_relu6_outputs_of_any_size(self, lite0, photo_views):
        small = lite0.features(photo_views[:2, :, :32, :48])
        assert small.shape == (2, lite0.num_features) and small.min() >= 0 and small.max() <= 6
        assert not any(parameter.requires_grad for parameter in Lite0.parameters(lite0))

    def test_features_do_not_depend_on_the_batch(self, lite0, photo_views):
        together = lite0_features(photo_views[:5], lite0, batch_size=5)
        torch.testing.assert_close(
            lite0_features(photo_views[:5], lite0, batch_size=2), together, atol=1e-4, rtol=1e-3
        )

    def test_distance_grows_with_blur_and_with_noise(self, lite0, photo_views):
        views = photo_views[::3]
        references = lite0_features(views, lite0)
        noise = torch.randn(views.shape, generator=torch.Generator().manual_seed(0))

        def blurred(size):
            return torch.nn.functional.avg_pool2d(views, size, 1, size // 2, count_include_pad=False)

        for distorted in (
            [blurred(k) for k in (3, 7)],
            [(views + s * noise).clamp(0, 1) for s in (0.05, 0.2)],
        ):
            distances = [frechet_distance(lite0_features(x, lite0), references) for x in distorted]
            assert 0 < distances[0] < distances[1]

    def test_generation_metrics_take_images_or_features(self, lite0, photo_views):
        samples, references = photo_views[:16].flip(-1), photo_views[32:]
        options = {"lite0": lite0, "kid_subset_size": 8, "seed": 3}
        result = generation_metrics(samples, references, **options)
        features = lite0_features(samples, lite0), lite0_features(references, lite0)
        assert generation_metrics(*features, kid_subset_size=8, seed=3) == result
        assert result["fd_lite0"] == frechet_distance(*features) > 0
        assert (result["kid"], result["kid_standard_deviation"]) == kernel_distance(
            *features, subset_size=8, seed=3
        )
        protocol = result["protocol"]
        assert (protocol["samples"], protocol["reference_images"], protocol["kid_subset_size"]) == (16, 16, 8)
        assert "rank deficient" in protocol["covariance"]
        assert not any(key.lower() == "fid" for key in result)
        json.dumps(result, allow_nan=False)

    def test_bad_samples(self, photo_views, tmp_path):
        with pytest.raises(ValueError, match="at least 2 images"):
            generation_metrics(torch.rand(1, 1280), torch.rand(9, 1280))
        with pytest.raises(FileNotFoundError, match=r"python -m sitlib\.weights"):
            generation_metrics(photo_views, photo_views, folder=tmp_path)

    def test_samples_that_are_not_numbers(self, lite0, photo_views):
        with pytest.raises(ValueError, match="2 of 4 images contain NaN"):
            broken = photo_views[:4].clone()
            broken[1:3, 0, 5, 5] = float("nan")
            generation_metrics(broken, photo_views, lite0=lite0)


def test_the_error_budget_adds_up_to_the_error_and_finds_its_scale():
    from sitlib.experiments.tokenizer_evaluation import error_by_scale

    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.1 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    budget = error_by_scale(images, noisy)
    assert sum(budget) == pytest.approx(4 * float((images - noisy).square().mean()), rel=1e-5)
    darker = error_by_scale(images, images - 0.1)  # a constant error is one of the approximation
    assert darker[0] == pytest.approx(4 * 0.01, rel=1e-4) and sum(darker[1:]) < 1e-8
