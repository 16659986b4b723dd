"""Bits beside quality: files of every format, and the mean difference of two curves."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_codec import counted
from tiny import photographs

from workbook.rates import FORMATS, bd_rate, through_codes, through_format


def curve(bits, quality):
    return [
        {"bits_per_pixel": b, "psnr": q, "lpips_vgg": -q}
        for b, q in zip(bits, quality, strict=True)
    ]


@pytest.mark.parametrize("measure", ["psnr", "lpips_vgg"])
def test_bd_rate_is_the_mean_difference_of_logarithms(measure):
    bits = np.array([0.1, 0.2, 0.5, 1.1])
    theirs = curve(bits, [20, 24, 29, 33])
    assert bd_rate(curve(bits / 2, [20, 24, 29, 33]), theirs, measure) == pytest.approx(-50)
    # Straight lines: log2 bits = q against 0.8 q, on 1 ... 2: 0.3 of a bit on average.
    first, second = curve([2, 4, 8], [1, 2, 3]), curve(2 ** np.array([0.4, 0.8, 1.6]), [0.5, 1, 2])
    assert bd_rate(first, second, measure) == pytest.approx(100 * (2**0.3 - 1))
    assert bd_rate(theirs[::-1], theirs, measure) == pytest.approx(0)
    wasteful = curve([*bits, 0.9], [20, 24, 29, 33, 28])  # more bits for less than 0.5 give
    assert bd_rate(wasteful, theirs, measure) == pytest.approx(0)
    assert bd_rate(curve([1, 2], [40, 50]), theirs, measure) is None


@pytest.mark.parametrize("name", FORMATS)
def test_more_bytes_of_a_format_are_closer_to_the_image(name):
    if name == "JPEG XL":
        pytest.importorskip("pillow_jxl")
    image = F.interpolate(photographs(1), 128, mode="bicubic")[0].clamp(0, 1)
    points = [through_format(image, name, options) for options in FORMATS[name]]
    sizes = [size for size, _, _ in points]
    errors = [float((decoded - image).square().mean()) for _, decoded, _ in points]
    assert sizes == sorted(sizes) and errors[0] > 4 * errors[-1]
    assert all(decoded.shape == image.shape for _, decoded, _ in points)


def test_a_file_of_codes_may_be_of_the_resized_image():
    tokenizer, image = counted(), photographs(1)[0]
    size, decoded, seconds = through_codes(image, tokenizer, 64)
    torch.testing.assert_close(decoded, tokenizer.reconstruct(image[None])[0])
    small, smaller, _ = through_codes(image, tokenizer, 32)
    assert small < size and smaller.shape == image.shape and min(seconds) > 0
