"""Evaluations of tokenizers: sets, sizes, metrics, and errors by scale."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_evaluate import PROFILE, Inception, tiny_tokenizer, with_evaluation
from tiny import tokenizer_of
from torch.nn.functional import interpolate

from sitlib import evaluate, metrics
from sitlib.data import held_out_views, open_images
from sitlib.evaluate import error_by_scale
from sitlib.model.tokenizer import SpectralTokenizer
from workbook.evaluate import tokenizer
from workbook.evaluate.tokenizer import evaluated_sizes
from workbook.tokenizers import held_out_set


@pytest.fixture(scope="module")
def few():
    """The smoke profile with few views: 10 of 8 extra photographs."""
    sets = PROFILE.tokenizer.evaluation.sets
    few = {name: replace(sets[name], views=n) for name, n in (("landscapes", 4), ("extra", 10))}
    return with_evaluation(PROFILE, "tokenizer", sets=few, seed=1, inception=True)


@pytest.fixture(scope="module")
def scores_of(few, weights_folder):
    """Scores of untrained tokenizers, views three at a time, the baseline down to 16 px only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "PART", 3)
        patch.setattr(tokenizer, "SMALLEST_SIZE", 16)
        patch.setattr(tokenizer, "trained_tokenizer", tiny_tokenizer)
        patch.setattr(tokenizer.metrics, "InceptionMetrics", Inception)
        names = ("sit5_sc", "vit_vqgan")
        return {name: tokenizer.evaluate_tokenizer(few, name, 0) for name in names}


def test_views_are_those_of_the_set(few):
    images, keys = held_out_set(few, "extra", 16)
    expected, _, expected_keys = held_out_views(open_images("data/extra", "test"), 10, 16, 1)
    assert torch.equal(images, expected) and keys == expected_keys
    assert torch.equal(held_out_set(few)[0], held_out_set(few, "landscapes", 64)[0])
    with pytest.raises(ValueError, match="landscapes, extra"):
        held_out_set(few, "faces")


@pytest.mark.parametrize(
    "variant, sizes",
    [
        ("sit5_sc", [64, 32, 16, 8, 4]),
        ("sit5_sc_second", [64]),  # encodes small images, but its decoder needs all scales
        ("vit_vqgan", [64, 32, 16, 8, 4]),
        ("sit6", [128]),
    ],
)
def test_sizes_at_which_tokenizers_are_judged(variant, sizes):
    assert evaluated_sizes(SpectralTokenizer(PROFILE.tokenizer_variant(variant))) == sizes


def test_the_baseline_sees_small_images_enlarged():
    images, causal, baseline = torch.rand(6, 3, 16, 16), tokenizer_of(), tokenizer_of("vit_vqgan")
    codes, reconstructions = evaluate.reconstruct(causal, images)
    assert torch.equal(codes, causal.encode(images)) and codes.shape == (6, 3, 16)
    assert torch.equal(reconstructions, causal.decode(codes))
    codes, reconstructions = evaluate.reconstruct(baseline, images)
    large = interpolate(images, (64, 64), mode="bicubic").clamp(0, 1)
    assert torch.equal(codes, baseline.encode(large))
    averaged = interpolate(baseline.decode(codes), 16, mode="area")
    torch.testing.assert_close(reconstructions, averaged)


def test_every_set_and_size_has_every_metric(scores_of):
    names = ("psnr", "lpips_alex", "fd_lite0", "kid", "kid_standard_deviation")
    for variant, sizes in (("sit5_sc", [64, 32, 16, 8, 4]), ("vit_vqgan", [64, 32, 16])):
        is_baseline = variant == "vit_vqgan"
        for by_size in scores_of[variant]["sets"].values():
            assert [int(size) for size in by_size] == sizes
            for size, one in zip(sizes, by_size.values(), strict=True):
                assert all(np.isfinite(one[name]) for name in names)
                assert ("lpips_vgg" in one) == (size == 64) and (one["ssim"] is None) == (size < 11)
                views = sum(one["counts"])
                assert one["fid"] == {f"{size} px": views, f"{size} px, real": views}
                assert ("size_change" in one["protocol"]) == (is_baseline and size < 64)
                # The baseline has as many tokens for a small image as for a large one.
                books = PROFILE.tokenizer_variant(variant).codebook_sizes
                books = books[: sizes[::-1].index(size) + 1]
                bits = 64 * 6 if is_baseline else 16 * sum(np.log2(books))
                assert one["bits_per_pixel"] == bits / size**2
        json.dumps(scores_of[variant], allow_nan=False)


def test_scores_are_those_of_the_metrics(few, scores_of):
    (views, keys), model = held_out_set(few, "extra"), tokenizer_of()
    of_size, small = scores_of["sit5_sc"]["sets"]["extra"], interpolate(views, 16, mode="area")
    expected = metrics.psnr_per_image(model.reconstruct(small), small)
    assert of_size["16"]["psnr"] == pytest.approx(expected.mean().item(), abs=1e-4)
    reconstructions, scores = model.reconstruct(views), of_size["64"]
    assert scores["photographs"] == sorted(set(keys)) and sum(scores["counts"]) == 10
    assert scores["protocol"]["views"] == "random crops of 8 held-out photographs"
    similarity = metrics.ssim_per_image(reconstructions, views).numpy()
    means = [similarity[np.array(keys) == key].mean() for key in sorted(set(keys))]
    assert scores["by_photograph"]["ssim"] == pytest.approx(means, rel=6e-4)
    x, y = (metrics.lite0_features(images) for images in (reconstructions, views))
    assert scores["fd_lite0"] == pytest.approx(metrics.frechet_distance(x, y), rel=1e-4)
    kid = metrics.kernel_distance(x, y, subset_size=5, seed=1)[0]
    assert scores["kid"] == pytest.approx(kid, rel=1e-3, abs=1e-5)
    assert scores["lite0_score"] == pytest.approx(metrics.lite0_score(x), rel=1e-4)
    assert scores["lite0_score_originals"] == pytest.approx(metrics.lite0_score(y), rel=1e-4)


def test_top_level_is_the_first_set_at_full_size(few, scores_of):
    scores, model = scores_of["sit5_sc"], tokenizer_of()
    first = scores["sets"]["landscapes"]["64"]
    assert all(scores[name] == first[name] for name in set(first) & set(scores))
    images = held_out_set(few)[0]
    codes = model.encode(images)
    budget = error_by_scale(images, model.decode(codes)).mean(0).tolist()
    assert scores["error_by_scale"] == pytest.approx(budget, rel=1e-5)
    assert scores["parameters"] == sum(p.numel() for p in model.parameters())
    used = [len(scale.unique()) for scale in codes.unbind(1)]
    books = zip(used, model.config.codebook_sizes, strict=True)
    assert scores["usage"] == pytest.approx(100 * min(count / size for count, size in books))


def test_error_by_scale_adds_up_to_the_error_and_finds_its_scale():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 64, 64, generator=generator)
    noisy = images + 0.1 * torch.randn(3, 3, 64, 64, generator=generator)
    total = 4 * float((images - noisy).square().mean())
    assert float(error_by_scale(images, noisy).mean(0).sum()) == pytest.approx(total, rel=1e-5)
    # A constant error is of the approximation.
    darker = error_by_scale(images, images - 0.1).mean(0)
    assert darker[0] == pytest.approx(4 * 0.01, rel=1e-4) and sum(darker[1:]) < 1e-8
