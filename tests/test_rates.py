"""Bits beside quality: files of every format, and the mean difference of two curves."""

from functools import partial

import numpy as np
import pytest
import torch.nn.functional as F
from test_codec import counted
from tiny import photographs

from workbook import rates


def curve(bits, quality):
    return [
        {"bits_per_pixel": b, "psnr": q, "lpips_vgg": -q}
        for b, q in zip(bits, quality, strict=True)
    ]


@pytest.mark.parametrize("measure", ["psnr", "lpips_vgg"])
def test_bd_rate_is_the_mean_difference_of_logarithms(measure):
    bits = np.array([0.1, 0.2, 0.5, 1.1])
    theirs = curve(bits, [20, 24, 29, 33])
    assert rates.bd_rate(curve(bits / 2, [20, 24, 29, 33]), theirs, measure) == pytest.approx(-50)
    # Straight lines: log2 bits = q against 0.8 q, on 1 ... 2: 0.3 of a bit on average.
    first, second = curve([2, 4, 8], [1, 2, 3]), curve(2 ** np.array([0.4, 0.8, 1.6]), [0.5, 1, 2])
    assert rates.bd_rate(first, second, measure) == pytest.approx(100 * (2**0.3 - 1))
    assert rates.bd_rate(theirs[::-1], theirs, measure) == pytest.approx(0)
    wasteful = curve([*bits, 0.9], [20, 24, 29, 33, 28])  # more bits for less than 0.5 give
    assert rates.bd_rate(wasteful, theirs, measure) == pytest.approx(0)
    assert rates.bd_rate(curve([1, 2], [40, 50]), theirs, measure) is None


def test_between_points_the_quality_is_on_a_line_over_the_logarithm_of_bits():
    points = curve([1, 4, 8, 16], [20, 24, 23, 26])  # the third is surpassed by the second
    assert rates.at_bits(points, 2, "psnr") == pytest.approx(22)
    assert rates.at_bits(points, 8, "psnr") == pytest.approx(25)
    assert rates.at_bits(points, 17, "psnr") is rates.at_bits(points, 0.9, "psnr") is None


def test_an_interval_is_over_photographs_that_both_formats_are_measured_on():
    rng = np.random.default_rng(1)
    difficulty, noise = rng.normal(0, 2, 30), rng.normal(0, 0.3, 30)

    def points(factor, noise):
        return [
            {"each": {"bits_per_pixel": factor * 2.0**k + 0 * noise, "psnr": 20 + 5 * k + noise}}
            for k in range(5)
        ]

    widths = []  # how hard photographs are is common to both, noise is not
    for of_ours in (0, noise):
        low, high = rates.bootstrapped(
            partial(rates.bd_rate, measure="psnr"),
            points(1, difficulty + of_ours),
            points(2, difficulty),
        )
        assert low - 1e-6 <= -50 <= high + 1e-6  # half the bits at equal quality
        widths.append(high - low)
    assert widths[0] < 0.01 < 0.3 < widths[1]


def test_a_file_may_be_of_the_resized_image(weights_folder):
    tokenizer = counted()
    images = [F.interpolate(photographs(1), 192, mode="bicubic")[0].clamp(0, 1)]
    through = partial(rates.through_codes, tokenizer=tokenizer)
    whole, small = (rates.measured(images, ".sit", "", through, side) for side in (0, 64))
    assert small["bits_per_pixel"] < whole["bits_per_pixel"] and small["each"]["psnr"]
    decoded = tokenizer.reconstruct(rates.resized(images[0], (64, 64))[None])[0]
    error = (rates.resized(decoded, (192, 192)) - images[0]).square().mean()
    assert small["psnr"] == pytest.approx(float(-10 * error.log10()), rel=1e-3)
