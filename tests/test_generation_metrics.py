"""Distances between sets of images against independent references: SciPy, torchmetrics, numpy and closed forms."""

import json
import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
import torchmetrics.image.inception
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from skimage import data
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from sitlib.metrics import (
    InceptionError,
    InceptionMetrics,
    PrecomputedFeatures,
    classifier_score,
    frechet_distance,
    generation_metrics,
    kernel_distance,
    lite0_features,
    lite0_score,
    precision_recall,
    split_distance,
)
from sitlib.metrics import generation as generation_module
from sitlib.metrics.efficientnet import Lite0, SameConv, load_lite0


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
        assert frechet_distance(x, 2 * x + torch.tensor([3.0, 0, 0, 0, 0, 0])) == pytest.approx(
            9 + 6
        )

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
        assert (
            split_distance(features)
            < split_distance(features[:100])
            < split_distance(features[:24])
        )
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
        for function in (frechet_distance, kernel_distance, precision_recall):
            with pytest.raises(ValueError, match=message):
                function(features, references)

    def test_too_large_subsets(self):
        with pytest.raises(ValueError, match="smaller number of images, 9"):
            kernel_distance(torch.rand(9, 4), torch.rand(20, 4), subset_size=10)
        with pytest.raises(ValueError, match="at least 4 images"):
            split_distance(torch.rand(3, 4))


def naive_precision_recall(features, references, neighbours):
    """The definition (arXiv 1904.06991, equations 1 and 2), in a loop over points."""

    def covered(points, centres):
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[neighbours] for centre in centres]
        balls = list(zip(centres, radii, strict=True))
        return np.mean(
            [any(np.linalg.norm(point - c) <= radius for c, radius in balls) for point in points]
        )

    return covered(features, references), covered(references, features)


class TestPrecisionRecall:
    @given(seed=st.integers(0, 2**31), counts=st.tuples(st.integers(6, 30), st.integers(6, 30)))
    @settings(max_examples=20, deadline=None)
    def test_is_that_of_a_naive_loop(self, seed, counts):
        features, references = (
            normal_features(seed, counts[0], 3),
            normal_features(seed + 1, counts[1], 3, 1.3),
        )
        for neighbours in (1, 3, 5):
            found = precision_recall(features, references, neighbours=neighbours)
            assert found == pytest.approx(
                naive_precision_recall(features.numpy(), references.numpy(), neighbours)
            )

    def test_at_equal_distances_and_of_copies_is_that_of_a_naive_loop(self):
        """Points of a small grid: many lie exactly on a ball's boundary, and some balls have radius 0."""
        generator = np.random.default_rng(0)
        features, references = (generator.integers(4, size=(40, 2)).astype(float) for _ in range(2))
        found = precision_recall(
            torch.from_numpy(features), torch.from_numpy(references), neighbours=2
        )
        assert found == pytest.approx(naive_precision_recall(features, references, 2))

    def test_does_not_depend_on_blocks(self, monkeypatch):
        features, references = normal_features(0, 33, 5), normal_features(1, 20, 5, 1.3)
        expected = precision_recall(features, references)
        monkeypatch.setattr(generation_module, "BLOCK", 50)
        assert precision_recall(features, references) == expected
        assert 0 < min(expected) <= max(expected) < 1

    def test_of_equal_and_of_disjoint_sets(self):
        features = normal_features(0, 50, 6)
        assert precision_recall(features, features.flip(0)) == (1, 1)
        assert precision_recall(features, features + 100) == (0, 0)

    def test_of_copies_far_from_zero(self):
        """Rounding must not push copies out of a ball of radius 0."""
        features = 1e3 + torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
        copies = features.repeat(5, 1)
        assert precision_recall(copies, copies.flip(0)) == (1, 1)

    def test_tell_dropped_modes_from_bad_samples(self):
        """Samples of one of four modes look real but reach a quarter; samples of four modes and noise reach all."""
        generator = torch.Generator().manual_seed(0)
        modes = 50 * torch.eye(4).double()[torch.arange(200) % 4]
        real, good = (modes + torch.randn(200, 4, generator=generator) for _ in range(2))
        one = 50 * torch.eye(4).double()[0] + 0.5 * torch.randn(200, 4, generator=generator)
        precision, recall = precision_recall(one, real)
        assert precision == 1 and 0 < recall <= 0.25
        noise = 500 + 500 * torch.rand(200, 4, generator=generator)
        precision, recall = precision_recall(torch.cat([good, noise]), real)
        assert 0.4 < precision <= 0.5 and recall > 0.8

    @pytest.mark.parametrize("neighbours", [0, 9])
    def test_too_many_neighbours(self, neighbours):
        with pytest.raises(ValueError, match=f"smaller number of images, 9; it is {neighbours}"):
            precision_recall(torch.rand(9, 4), torch.rand(20, 4), neighbours=neighbours)


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
            return torch.nn.functional.avg_pool2d(
                views, size, 1, size // 2, count_include_pad=False
            )

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
        assert (protocol["samples"], protocol["reference_images"], protocol["kid_subset_size"]) == (
            16,
            16,
            8,
        )
        assert "rank deficient" in protocol["covariance"]
        assert not any(key.lower() == "fid" for key in result)
        assert "precision" not in result and "neighbours" not in protocol
        json.dumps(result, allow_nan=False)

    def test_generation_metrics_have_precision_and_recall_where_neighbours_are_given(self):
        features = normal_features(0, 20, 1280), normal_features(0, 30, 1280)
        plain = generation_metrics(*features, kid_subset_size=8)
        result = generation_metrics(*features, kid_subset_size=8, neighbours=2)
        assert (result.pop("precision"), result.pop("recall")) == precision_recall(
            *features, neighbours=2
        )
        assert result["protocol"].pop("neighbours") == 2 and result == plain

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


class TestClassifierScore:
    @given(seed=st.integers(0, 2**31), count=st.integers(2, 30), classes=st.integers(2, 20))
    @settings(max_examples=25, deadline=None)
    def test_is_the_formula(self, seed, count, classes):
        logits = 3 * np.random.default_rng(seed).normal(size=(count, classes))
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        divergences = [(row * np.log(row / p.mean(0))).sum() for row in p]
        assert classifier_score(torch.from_numpy(logits)) == pytest.approx(
            np.exp(np.mean(divergences))
        )

    def test_of_known_classifiers(self):
        sure = 1000 * torch.eye(5).repeat(4, 1)  # every class, with certainty
        assert classifier_score(sure) == pytest.approx(5)
        assert classifier_score(sure[:1].repeat(8, 1)) == pytest.approx(1)  # one class
        assert classifier_score(torch.zeros(8, 5)) == pytest.approx(1)  # no idea
        with pytest.raises(ValueError, match="at least 2"):
            classifier_score(torch.zeros(1, 5))

    @pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")
    def test_is_the_inception_score_of_torchmetrics(self):
        logits = normal_features(0, 50, 12).float()
        metric = InceptionScore(feature=PrecomputedFeatures(), splits=1)
        metric.update(logits)
        assert classifier_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-5)

    def test_the_lite0_score_needs_one_pass_only(self, lite0, photo_views):
        features = lite0_features(photo_views[::6], lite0)
        assert lite0_score(features, lite0) == pytest.approx(
            classifier_score(lite0.logits(photo_views[::6]))
        )


class TestInception:
    def test_a_missing_package_says_what_to_install(self, monkeypatch):
        for module in (torchmetrics.image.fid, torchmetrics.image.inception):
            monkeypatch.setattr(module, "_TORCH_FIDELITY_AVAILABLE", False)
        with pytest.raises(InceptionError, match=r'pip install -e "\.\[inception\]"'):
            InceptionMetrics()

    def test_a_failed_download_says_that_it_needs_internet(self, monkeypatch):
        def offline(**options):
            raise URLError("name not known")

        monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", offline)
        with pytest.raises(InceptionError, match="name not known.*needs internet"):
            InceptionMetrics()

    @pytest.mark.filterwarnings("ignore:std:UserWarning")  # torchmetrics: of one split
    def test_images_reach_the_network_as_bytes(self, monkeypatch, photo_views):
        class Pixels(torch.nn.Module):
            num_features = 6

            def forward(self, images):
                assert images.dtype == torch.uint8
                return images.double().flatten(1)[:, ::2048] / 64

        network = Pixels()
        monkeypatch.setattr(
            torchmetrics.image.fid,
            "FrechetInceptionDistance",
            lambda feature: FrechetInceptionDistance(network),
        )
        monkeypatch.setattr(
            torchmetrics.image.inception,
            "InceptionScore",
            lambda: InceptionScore(network, splits=1),
        )
        images, references = photo_views[:40].flip(-1) - 0.2, photo_views
        metrics = InceptionMetrics()
        metrics.add(images, references)
        state = torch.get_rng_state()
        result = metrics.compute()
        assert torch.equal(torch.get_rng_state(), state)
        features = [network((255 * x.clamp(0, 1)).round().byte()) for x in (images, references)]
        assert result["fid"] == pytest.approx(frechet_distance(*features), rel=1e-6)
        assert result["inception_score"] == pytest.approx(classifier_score(features[0]))
        assert result["inception_score_originals"] == pytest.approx(classifier_score(features[1]))
        metrics.reset()  # leaves nothing over; and parts make the same whole
        with pytest.raises(ValueError, match="at least two images"):
            metrics.compute()
        metrics.add(images[:1], references[:20])  # the last part of a set can be a single image
        metrics.add(images[1:], references[20:])
        assert metrics.compute() == pytest.approx(result)
