"""The evaluation of tokenizers: what is measured at which size and on which views."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torchmetrics.image.fid
from torch.nn.functional import interpolate

from sitlib.data import held_out_views, open_images
from sitlib.files import read_json, write_json
from sitlib.metrics import (
    InceptionError,
    classifier_score,
    frechet_distance,
    kernel_distance,
    lite0_features,
    psnr_per_image,
    ssim_per_image,
)
from sitlib.metrics.networks import load_lite0
from sitlib.model.tokenizer import SpectralTokenizer
from workbook import tokenizer_evaluation
from workbook.profile import load_profile
from workbook.tokenizer_evaluation import (
    error_by_scale,
    evaluate_tokenizer,
    evaluated_sizes,
    held_out_set,
    original_features,
    reconstructed,
)

NUM_CODES = 256


class GreyTokens:
    """Stands in for a trained tokenizer: each of 4x4 tokens codes the mean grey of its patch, the same in every scale."""

    def __init__(self, config, sizes):
        self.config, self.sizes = dataclasses.replace(config, num_codes=NUM_CODES), sizes

    def encode(self, images):
        scales = self.config.num_scales - len(self.sizes) + 1 + self.sizes.index(images.shape[-1])
        grey = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 4).flatten(1)
        return (grey * (NUM_CODES - 1)).round().long()[:, None].expand(-1, scales, -1)

    def decode(self, codes):
        size = self.sizes[codes.shape[1] - self.config.num_scales - 1]
        grey = codes[:, 0].unflatten(1, (4, 4)) / (NUM_CODES - 1)
        return (
            grey.repeat_interleave(size // 4, 1)
            .repeat_interleave(size // 4, 2)[:, None]
            .repeat(1, 3, 1, 1)
        )

    def parameters(self):
        return [torch.zeros(3, 5), torch.zeros(2)]


def averaged(images, size):
    """Images [V, 3, H, H] averaged over squares to `size` px, in numpy."""
    count, channels, side, _ = images.shape
    step = side // size
    return images.numpy().reshape(count, channels, size, step, size, step).mean((3, 5))


@pytest.fixture(scope="module")
def profile():
    """The smoke profile with few views."""
    profile = load_profile("smoke")
    evaluation = profile.tokenizer.evaluation
    sets = {
        "landscapes": dataclasses.replace(evaluation.sets["landscapes"], views=4),
        "extra": dataclasses.replace(evaluation.sets["extra"], views=10),  # of 8 photographs
    }
    section = dataclasses.replace(
        profile.tokenizer, evaluation=dataclasses.replace(evaluation, sets=sets, seed=1)
    )
    return dataclasses.replace(profile, tokenizer=section)


@pytest.fixture(scope="module")
def evaluate(profile, weights_folder, tmp_path_factory):
    """`evaluate_tokenizer` on that profile: 4 views at small sizes, the baseline down to 16 px only, and an own folder of features."""
    replaced = {
        "SMALLEST_SIZE": 16,
        "FEATURES": str(tmp_path_factory.mktemp("features")),
    }

    def evaluate(tokenizer, profile=profile):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in replaced.items():
                patch.setattr(tokenizer_evaluation, name, value)
            return evaluate_tokenizer(tokenizer, profile)

    return evaluate


@pytest.fixture(scope="module")
def lite0(weights_folder):
    return load_lite0()


@pytest.fixture(scope="module")
def causal(profile):
    return GreyTokens(profile.tokenizer_variant("sit5_sc"), [4, 8, 16, 32, 64])


@pytest.fixture(scope="module")
def baseline(profile):
    return GreyTokens(profile.tokenizer_variant("vit_vqgan"), [64])


@pytest.fixture(scope="module")
def causal_scores(evaluate, causal):
    return evaluate(causal)


@pytest.fixture(scope="module")
def baseline_scores(evaluate, baseline):
    return evaluate(baseline)


class TestSets:
    def test_views_are_those_of_the_data_set_and_of_the_size_asked_for(self, profile):
        settings = profile.tokenizer.evaluation
        images, keys = held_out_set(profile, "extra", 16)
        expected, _, expected_keys = held_out_views(
            open_images("data/extra", "test"), 10, 16, settings.seed
        )
        assert torch.equal(images, expected) and keys == expected_keys
        first, _ = held_out_set(profile)
        assert first.shape == (4, 3, 64, 64)
        assert torch.equal(first, held_out_set(profile, "landscapes", 64)[0])

    def test_an_unknown_set(self, profile):
        with pytest.raises(ValueError, match="landscapes, extra"):
            held_out_set(profile, "faces")


class TestSizes:
    @pytest.mark.parametrize(
        "variant, sizes",
        [
            ("sit5_sc", [64, 32, 16, 8, 4]),
            ("sit5_sc_second", [64]),  # encodes small images, but its decoder needs all scales
            ("sit4_sce", [64]),
            ("sit4_scd", [64]),
            ("sit4", [64]),
            ("vit_vqgan", [64, 32, 16, 8, 4]),
            ("sit6", [128]),
        ],
    )
    def test_of_the_real_tokenizers(self, profile, variant, sizes):
        tokenizer = SpectralTokenizer(profile.tokenizer_variant(variant)).eval()
        assert evaluated_sizes(tokenizer) == sizes
        for size in sizes[:2]:
            images = torch.rand(2, 3, size, size)
            codes, reconstructions = reconstructed(tokenizer, images)
            assert reconstructions.shape == images.shape
            assert len(codes) == 2 and codes.shape[1] <= tokenizer.config.num_scales

    def test_an_accepted_size_is_reconstructed_directly(self, causal):
        images = torch.rand(70, 3, 16, 16)  # more than one batch
        codes, reconstructions = reconstructed(causal, images)
        assert torch.equal(codes, causal.encode(images)) and codes.shape == (70, 3, 16)
        assert torch.equal(reconstructions, causal.decode(codes))

    def test_the_baseline_sees_small_images_enlarged(self, baseline):
        images = torch.rand(3, 3, 16, 16)
        codes, reconstructions = reconstructed(baseline, images)
        large = interpolate(images, (64, 64), mode="bicubic").clamp(0, 1)
        assert torch.equal(codes, baseline.encode(large))
        np.testing.assert_allclose(reconstructions, averaged(baseline.decode(codes), 16), atol=1e-6)


class TestScores:
    def test_every_set_and_size_has_every_metric(self, causal_scores, baseline_scores):
        expected = [
            (causal_scores, ["64", "32", "16", "8", "4"]),
            (baseline_scores, ["64", "32", "16"]),
        ]
        for scores, expected_sizes in expected:
            assert list(scores["sets"]) == ["landscapes", "extra"]
            for sizes in scores["sets"].values():
                assert list(sizes) == expected_sizes
                for size, at_size in sizes.items():
                    for metric in (
                        "psnr",
                        "lpips_alex",
                        "fd_lite0",
                        "kid",
                        "kid_standard_deviation",
                    ):
                        assert np.isfinite(at_size[metric]), (size, metric)
                    assert ("lpips_vgg" in at_size) == (size == "64")
                    assert (at_size["ssim"] is None) == (int(size) < 11)
                    low, high = at_size["intervals"]["psnr"]
                    assert low < at_size["psnr"] < high
                    assert at_size["protocol"]["size"] == [int(size)] * 2

    def test_of_a_small_size_are_those_of_averaged_views(self, profile, causal, causal_scores):
        views, keys = held_out_set(profile, "extra")
        images = torch.from_numpy(averaged(views, 16))
        expected = psnr_per_image(causal.decode(causal.encode(images)), images)
        scores = causal_scores["sets"]["extra"]["16"]
        assert scores["psnr"] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert scores["photographs"] == sorted(set(keys)) and sum(scores["counts"]) == len(keys)
        assert scores["protocol"]["images"] == len(keys)
        assert (
            scores["protocol"]["views"] == f"random crops of {len(set(keys))} held-out photographs"
        )

    def test_of_photographs_with_several_views_are_their_means(
        self, profile, causal, causal_scores
    ):
        views, keys = held_out_set(profile, "extra")
        similarity = ssim_per_image(causal.decode(causal.encode(views)), views).numpy()
        scores = causal_scores["sets"]["extra"]["64"]
        means = [similarity[np.array(keys) == key].mean() for key in sorted(set(keys))]
        assert scores["by_photograph"]["ssim"] == pytest.approx(means, rel=6e-4)
        assert sorted(scores["counts"]) == [1] * 6 + [2] * 2

    def test_distances_are_those_of_the_features(self, profile, lite0, causal, causal_scores):
        views, _ = held_out_set(profile, "extra")
        features = [lite0_features(x, lite0) for x in (causal.decode(causal.encode(views)), views)]
        scores = causal_scores["sets"]["extra"]["64"]
        assert scores["fd_lite0"] == pytest.approx(frechet_distance(*features), rel=1e-4)
        assert scores["kid"] == pytest.approx(
            kernel_distance(*features, subset_size=5, seed=1)[0], rel=1e-3, abs=1e-5
        )
        logits = [lite0.classifier(x) for x in features]
        assert scores["lite0_score"] == pytest.approx(classifier_score(logits[0]), rel=1e-4)
        assert scores["lite0_score_originals"] == pytest.approx(
            classifier_score(logits[1]), rel=1e-4
        )

    def test_top_level_is_the_first_set_at_full_size(self, profile, causal, causal_scores):
        first = causal_scores["sets"]["landscapes"]["64"]
        for name, value in first.items():
            if name in ("photographs", "counts", "by_photograph"):
                assert name not in causal_scores
            else:
                assert causal_scores[name] == value
        images, _ = held_out_set(profile)
        reconstructions = causal.decode(causal.encode(images))
        assert (
            causal_scores["psnr"] == psnr_per_image(reconstructions, images).double().mean().item()
        )
        assert causal_scores["error_by_scale"] == error_by_scale(images, reconstructions)
        assert causal_scores["parameters"] == 17
        assert causal_scores["protocol"]["source"] == "data/landscapes"
        assert causal_scores["protocol"]["seed"] == 1

    def test_codes_are_those_of_the_first_set(
        self, profile, causal, causal_scores, baseline_scores
    ):
        codes = causal.encode(held_out_set(profile)[0])
        usage = 100 * min(len(scale.unique()) for scale in codes.unbind(1)) / NUM_CODES
        assert causal_scores["usage"] == pytest.approx(usage)
        details = {f"details_{scale}" for scale in (2, 3, 4, 5)}
        assert set(causal_scores["codebooks"]) == {"approximation", *details}
        assert len(causal_scores["scales"]) == 5 and causal_scores["usage_images"] == 4
        assert set(baseline_scores["codebooks"]) == {"approximation"}

    def test_bits_per_pixel(self, causal_scores, baseline_scores):
        assert causal_scores["bits_per_pixel"] == 5 * 16 * 8 / 64**2
        assert causal_scores["sets"]["extra"]["4"]["bits_per_pixel"] == 1 * 16 * 8 / 4**2
        # The baseline has as many tokens for a small image as for a large one.
        assert baseline_scores["sets"]["extra"]["16"]["bits_per_pixel"] == 16 * 8 / 16**2

    def test_the_protocol_says_what_was_resized(self, causal_scores, baseline_scores):
        for scores, sizes in ((causal_scores, set()), (baseline_scores, {"32", "16"})):
            at_sizes = scores["sets"]["landscapes"]
            assert {
                s for s, at_size in at_sizes.items() if "size_change" in at_size["protocol"]
            } == sizes

    def test_survive_their_file(self, causal_scores, tmp_path):
        write_json(tmp_path / "scores.json", causal_scores)
        scores = read_json(tmp_path / "scores.json")
        assert scores["psnr"] == pytest.approx(causal_scores["psnr"], rel=1e-5)
        assert scores["sets"].keys() == causal_scores["sets"].keys()
        json.dumps(scores, allow_nan=False)

    def test_a_missing_inception_network_is_found_out_at_the_start(
        self, profile, causal, monkeypatch
    ):
        monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
        evaluation = dataclasses.replace(profile.tokenizer.evaluation, inception=True)
        section = dataclasses.replace(profile.tokenizer, evaluation=evaluation)
        monkeypatch.setattr(tokenizer_evaluation, "load_lite0", lambda: None)
        monkeypatch.setattr(tokenizer_evaluation, "reconstructed", None)
        with pytest.raises(InceptionError, match="pip install"):
            evaluate_tokenizer(causal, dataclasses.replace(profile, tokenizer=section))

    def test_the_inception_network_judges_reconstructions_against_originals(
        self, profile, baseline, evaluate, monkeypatch
    ):
        pairs = []

        class Judge:
            def reset(self):
                pairs.clear()

            def add(self, images, real, **options):
                pairs.append(images)

            def compute(self, **options):
                return {"fid": 3.0, "inception_score": 1.5, "inception_score_originals": 2.0}

        monkeypatch.setattr(tokenizer_evaluation, "InceptionMetrics", Judge)
        monkeypatch.setattr(tokenizer_evaluation, "evaluated_sizes", lambda tokenizer: [64, 32])
        evaluation = profile.tokenizer.evaluation
        sets = {"extra": dataclasses.replace(evaluation.sets["extra"], views=2)}
        evaluation = dataclasses.replace(evaluation, sets=sets, inception=True)
        section = dataclasses.replace(profile.tokenizer, evaluation=evaluation)
        scores = evaluate(baseline, dataclasses.replace(profile, tokenizer=section))
        assert scores["fid"] == 3 and "fid" not in scores["sets"]["extra"]["32"]
        images, references = pairs
        assert torch.equal(references, held_out_set(profile, "extra")[0][:2])
        assert torch.equal(images, baseline.decode(baseline.encode(references)))

    def test_do_not_depend_on_the_parts_in_which_a_set_is_measured(
        self, profile, causal, causal_scores, evaluate, monkeypatch
    ):
        monkeypatch.setattr(tokenizer_evaluation, "PART", 3)
        most = []

        def counted(tokenizer, images):
            most.append(len(images))
            return reconstructed(tokenizer, images)

        monkeypatch.setattr(tokenizer_evaluation, "reconstructed", counted)
        scores = evaluate(causal, profile)
        assert max(most) == 3 < profile.tokenizer.evaluation.sets["extra"].views

        def flat(values, where=""):
            if isinstance(values, dict):
                return {
                    k: v
                    for key, value in values.items()
                    for k, v in flat(value, f"{where}/{key}").items()
                }
            if isinstance(values, list):
                return flat(dict(enumerate(values)), where)
            return {where: values}

        found, expected = flat(scores), flat(causal_scores)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (
                pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
            ), key


class TestFeaturesOfOriginals:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tokenizer_evaluation, "FEATURES", str(tmp_path / "features"))
        return tmp_path / "features"

    @pytest.fixture
    def runs(self, monkeypatch):
        """Counts the passes through the network."""
        runs = []

        def counted(images, lite0, **options):
            runs.append(len(images))
            return lite0_features(images, lite0, **options)

        monkeypatch.setattr(tokenizer_evaluation, "lite0_features", counted)
        return runs

    def test_are_computed_once(self, folder, lite0, runs):
        images = torch.rand(3, 3, 16, 16)
        first, again = (original_features(images, lite0, ["a set", 16, 0]) for _ in range(2))
        assert runs == [3] and torch.equal(first, again)
        torch.testing.assert_close(first, lite0_features(images, lite0))
        assert len(list(folder.iterdir())) == 1

    def test_of_other_pixels_or_another_set_are_others(self, folder, lite0, runs):
        images = torch.rand(2, 3, 16, 16)
        original_features(images, lite0, ["a set"])
        original_features(images, lite0, ["another set"])
        images[0, 0, 0, 0] += 1e-3
        original_features(images, lite0, ["a set"])
        assert runs == [2, 2, 2] and len(list(folder.iterdir())) == 3

    @pytest.mark.parametrize("damage", [lambda x: x[:-100], lambda x: b"", lambda x: b"{" * 64])
    def test_in_a_damaged_file_are_made_again(self, folder, lite0, runs, damage):
        images = torch.rand(2, 3, 16, 16)
        expected = original_features(images, lite0, [])
        (path,) = folder.iterdir()
        path.write_bytes(damage(path.read_bytes()))
        assert torch.equal(original_features(images, lite0, []), expected)
        assert torch.equal(original_features(images, lite0, []), expected) and runs == [2, 2]

    def test_need_no_file(self, folder, lite0):
        folder.write_text("in the way")
        images = torch.rand(2, 3, 16, 16)
        assert original_features(images, lite0, []).shape == (2, 1280)


def test_the_error_budget_adds_up_to_the_error_and_finds_its_scale():
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = images + 0.1 * torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    budget = error_by_scale(images, noisy)
    assert sum(budget) == pytest.approx(4 * float((images - noisy).square().mean()), rel=1e-5)
    darker = error_by_scale(images, images - 0.1)  # a constant error is one of the approximation
    assert darker[0] == pytest.approx(4 * 0.01, rel=1e-4) and sum(darker[1:]) < 1e-8
