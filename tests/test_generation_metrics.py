"""Distances between sets of images against torchmetrics, naive loops and closed forms."""

import json
import math
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
import torchmetrics.image.inception
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from sitlib.metrics import (
    GENERATION_METRICS,
    InceptionMetrics,
    classifier_score,
    frechet_distance,
    generation,
    generation_metrics,
    kernel_distance,
    precision,
    recall,
)
from sitlib.metrics.generation import jackknife_error, squared_mmd
from sitlib.metrics.weights import WeightsError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchmetrics")


def normal_features(seed, count, dim, scale=1.0, shift=0.0):
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(dim, dim)) / math.sqrt(dim)
    return torch.from_numpy(scale * generator.normal(size=(count, dim)) @ mixing + shift)


class Features(torch.nn.Module):
    """A feature extractor for torchmetrics that takes features."""

    def __init__(self, dim):
        super().__init__()
        self.num_features = dim

    def forward(self, features):
        return features


class TestDistances:
    # Fewer samples than features, more, one of each, in both orders.
    @pytest.mark.parametrize("counts", [(20, 30), (200, 300), (20, 300), (300, 20)])
    def test_frechet_distance_equals_torchmetrics(self, counts):
        x = normal_features(0, counts[0], 48)
        y = normal_features(1, counts[1], 48, 1.5, 0.2)
        metric = FrechetInceptionDistance(feature=Features(48))
        metric.update(y, real=True)
        metric.update(x, real=False)
        assert frechet_distance(x, y) == pytest.approx(metric.compute().item(), rel=1e-5)

    @given(seed=st.integers(0, 2**31), count=st.integers(2, 40))
    @settings(max_examples=25, deadline=None)
    def test_frechet_distance_is_symmetric_and_zero_for_equal_sets(self, seed, count):
        x, y = normal_features(seed, count, 12), normal_features(seed + 1, 15, 12)
        assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)
        assert frechet_distance(x, y) > 0
        assert abs(frechet_distance(x, x.flip(0))) < 1e-6 * x.square().sum()

    def test_kernel_distance_equals_torchmetrics(self):
        x, y = normal_features(0, 40, 8), normal_features(1, 30, 8, shift=0.5)
        metric = KernelInceptionDistance(feature=Features(8), subsets=100, subset_size=10)
        metric.update(y, real=True)
        metric.update(x, real=False)
        torch.manual_seed(3)
        expected = [value.item() for value in metric.compute()]
        ours = [kernel_distance(x, y, subset_size=10, seed=seed) for seed in (3, 4)]
        assert ours[0] == pytest.approx(expected, rel=1e-9) != ours[1]

    @pytest.mark.parametrize("block", [70, generation.BLOCK])  # in parts, and at once
    def test_squared_mmd_equals_its_definition(self, monkeypatch, block):
        monkeypatch.setattr(generation, "BLOCK", block)
        x, y = normal_features(0, 40, 8), normal_features(1, 30, 8, shift=0.5)
        k = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
        # Of all pairs, but for those of an image and itself.
        of_x, of_y = ((m.sum() - m.trace()) / (len(m) * (len(m) - 1)) for m in k[:2])
        expected = float(of_x + of_y - 2 * k[2].mean())
        assert squared_mmd(x, y) == pytest.approx(expected, rel=1e-9)
        assert squared_mmd(x, x) == pytest.approx(float(2 * of_x - 2 * k[0].mean()))

    def test_too_large_subsets_and_too_many_neighbors(self):
        pair = torch.rand(9, 4), torch.rand(20, 4)
        with pytest.raises(ValueError, match="^subset_size of KID must lie between 2 and 9"):
            kernel_distance(*pair, subset_size=10)
        for neighbors in (0, 9):
            with pytest.raises(ValueError, match="below 9"):
                precision(*pair, neighbors=neighbors)

    @pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision])
    def test_features_that_are_no_numbers_or_do_not_fit(self, distance):
        """Images of NaN would look like images that are far away."""
        x = torch.rand(120, 4)
        for other in (x * torch.nan, x[:, :3], x[:1], x[0]):
            with pytest.raises(ValueError):
                distance(x, other)


class TestJackknife:
    @given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=40))
    def test_of_a_mean_it_is_the_textbook_standard_error(self, values):
        x = torch.tensor(values, dtype=torch.float64)
        expected = np.std(values, ddof=1) / math.sqrt(len(values))
        error = jackknife_error(lambda x: float(x.mean()), x, range(len(x)))
        assert error == pytest.approx(expected, rel=1e-6, abs=1e-9)

    def test_of_distances_it_is_that_of_a_loop_over_photographs(self):
        x, y = normal_features(0, 60, 24), normal_features(1, 40, 24, 1.5)
        photographs = [f"photograph {i % 7}" for i in range(40)]
        result = generation_metrics(x, y, kid_subset_size=20, groups=photographs)["jackknife"]
        assert result.keys() == {"fd_lite0", "kid"}
        for name, distance in (("fd_lite0", frechet_distance), ("kid", squared_mmd)):
            left = [[i for i in range(40) if i % 7 != g] for g in range(7)]
            values = [distance(x, y[rows]) for rows in left]
            mean = sum(values) / 7
            variance = 6 / 7 * sum((value - mean) ** 2 for value in values)
            assert result[name] == pytest.approx(math.sqrt(variance), rel=1e-6)


def naive_precision(points, centres, neighbors):
    """The definition (arXiv 1904.06991, equations 1 and 2), in a loop over points."""
    radii = [sorted(np.linalg.norm(centres - c, axis=1))[neighbors] for c in centres]
    return np.mean([(np.linalg.norm(centres - p, axis=1) <= radii).any() for p in points])


class TestPrecisionRecall:
    @given(
        seed=st.integers(0, 2**31),
        counts=st.tuples(st.integers(6, 30), st.integers(6, 30)),
        block=st.sampled_from([50, generation.BLOCK]),
    )
    @settings(max_examples=20, deadline=None)
    def test_equal_a_naive_loop(self, seed, counts, block):
        x, y = normal_features(seed, counts[0], 3), normal_features(seed + 1, counts[1], 3, 1.3)
        for k in (1, 3, 5):
            with mock.patch.object(generation, "BLOCK", block):
                found = precision(x, y, neighbors=k), recall(x, y, neighbors=k)
            pairs = (x.numpy(), y.numpy()), (y.numpy(), x.numpy())
            assert found == tuple(naive_precision(*pair, k) for pair in pairs)

    def test_points_on_the_boundary_are_inside(self):
        """On a small grid many points lie exactly on a boundary, and some balls have radius 0."""
        x, y = np.random.default_rng(0).integers(4, size=(2, 40, 2)).astype(float)
        expected = naive_precision(x, y, 2)
        assert precision(torch.from_numpy(x), torch.from_numpy(y), neighbors=2) == expected

    def test_of_copies_and_of_disjoint_sets(self):
        """Rounding must not push copies far from zero out of a ball of radius 0."""
        x = 1e3 + torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
        copies = x.repeat(5, 1)
        assert precision(copies, copies.flip(0)) == recall(copies, copies.flip(0)) == 1
        assert precision(x, x + 100) == recall(x, x + 100) == 0


def test_scores_are_those_of_the_functions():
    x, y = normal_features(0, 8, 1280), normal_features(1, 8, 1280, 1.5)
    result = generation_metrics(x, y, kid_subset_size=4, seed=3, neighbors=2)
    kid = kernel_distance(x, y, subset_size=4, seed=3)
    assert (result["kid"], result["kid_standard_deviation"]) == kid
    assert result["fd_lite0"] == frechet_distance(x, y) > 0
    shares = precision(x, y, neighbors=2), recall(x, y, neighbors=2)
    assert (result["precision"], result["recall"]) == shares
    assert set(GENERATION_METRICS) <= set(result) and "fid" not in result
    assert "rank deficient" in result["protocol"]["covariance"]
    json.dumps(result, allow_nan=False)
    result = generation_metrics(x, y, kid_subset_size=8)
    assert "precision" not in result and "neighbors" not in result["protocol"]


class TestClassifierScore:
    def test_equals_the_inception_score_of_torchmetrics(self):
        logits = normal_features(0, 50, 12).float()
        metric = InceptionScore(feature=Features(12), splits=1)
        metric.update(logits)
        assert classifier_score(logits) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


class TestInception:
    def test_what_is_missing_is_told_with_a_remedy(self, monkeypatch):
        def offline(**options):
            raise URLError("name not known")

        monkeypatch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", offline)
        with pytest.raises(WeightsError, match=r"\.\[inception\].* internet .*name not known"):
            InceptionMetrics()

    @pytest.mark.filterwarnings("ignore:std:UserWarning")  # torchmetrics: of one split
    def test_images_reach_the_network_as_bytes(self, monkeypatch):
        class Pixels(torch.nn.Module):
            num_features = 6

            def forward(self, images):
                assert images.dtype == torch.uint8
                return images.double().flatten(1)[:, ::128] / 64

        network, module = Pixels(), torchmetrics.image
        fid = lambda feature: FrechetInceptionDistance(network)  # noqa: E731
        monkeypatch.setattr(module.fid, "FrechetInceptionDistance", fid)
        score = lambda: InceptionScore(network, splits=1)  # noqa: E731
        monkeypatch.setattr(module.inception, "InceptionScore", score)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(40, 3, 16, 16, generator=generator) - 0.2
        references = torch.rand(48, 3, 16, 16, generator=generator)

        metrics = InceptionMetrics()
        for part in (images[:1], images[1:]):
            metrics.add(part, real=False)
        metrics.add(references, real=True)
        state = torch.get_rng_state()
        result = metrics.compute()
        assert torch.equal(torch.get_rng_state(), state)
        x, y = (network((255 * x.clamp(0, 1)).round().byte()) for x in (images, references))
        assert network.use_antialias is False and "299 px" in result["inception_input"]
        assert result["fid"] == pytest.approx(frechet_distance(x, y), rel=1e-6)
        assert result["inception_score"] == pytest.approx(classifier_score(x))
        assert result["inception_score_originals"] == pytest.approx(classifier_score(y))
        metrics.add(references, real=False)  # earlier images are forgotten
        metrics.add(references, real=True)
        assert metrics.compute()["fid"] == pytest.approx(0, abs=1e-6)
