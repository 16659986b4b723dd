"""Bits of codes and files, and ways of enlarging, against what Pillow and torch say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sitlib.data import held_out_views, open_images
from workbook.evaluate.rate_distortion import (
    encode_jpeg,
    encode_jpeg2000,
    largest_within,
    prefixes,
    through_files,
)
from workbook.previews import choice_scores
from workbook.upsampling import enlarged


@pytest.fixture(scope="module")
def photographs():
    return held_out_views(open_images("data/extra", "test"), 6, 64, 0)[0]


def test_files_are_read_again_and_their_coded_data_are_less_than_the_file(photographs):
    for encode, settings in ((encode_jpeg, (10, 50, 90)), (encode_jpeg2000, (40, 10, 4))):
        rates, errors = [], []
        for setting in settings:
            coded, found, whole = through_files(
                photographs, lambda image, e=encode, s=setting: e(s, image)
            )
            assert 0 < coded < whole and found.shape == photographs.shape
            rates.append(coded)
            errors.append(float((found - photographs).square().mean()))
        assert rates == sorted(rates) and errors == sorted(errors, reverse=True)


def test_coded_data_of_a_flat_image_are_next_to_nothing_though_its_file_is_not():
    flat = Image.new("RGB", (64, 64), "grey")
    for data, coded in (encode_jpeg(50, flat), encode_jpeg2000(10, flat)):
        assert coded < 80 and len(data) > coded + 80


def test_coded_data_of_a_jpeg_are_what_stands_after_its_headers():
    """Independent reading of the format: every segment before the scan has a marker and a length."""
    rng = np.random.default_rng(0)
    data, coded = encode_jpeg(
        80, Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    )
    position = 2
    while True:
        marker, length = (
            data[position + 1],
            int.from_bytes(data[position + 2 : position + 4], "big"),
        )
        assert data[position] == 0xFF
        position += 2 + length
        if marker == 0xDA:
            break
    assert coded == len(data) - position - 2 and data[-2:] == b"\xff\xd9"


def test_enlarging_is_what_torch_and_pillow_do(photographs):
    small = F.avg_pool2d(photographs, 8)
    torch.testing.assert_close(
        enlarged(small, 64, "bicubic"), F.interpolate(small, (64, 64), mode="bicubic").clamp(0, 1)
    )
    pixels = (64 + small * 128).round()  # Pillow clips bytes between its two passes
    ours = enlarged(pixels / 255, 64, "lanczos")
    for image, result in zip(pixels.byte(), ours, strict=True):
        whole = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (64, 64), Image.Resampling.LANCZOS
        )
        expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
        torch.testing.assert_close(result, expected, atol=1.5 / 255, rtol=0)
    with pytest.raises(ValueError, match="choose 'bicubic' or 'lanczos'"):
        enlarged(small, 64, "nearest")


@pytest.mark.parametrize("bits", [700, 2000, 6000])
def test_files_as_large_as_a_code_take_the_most_bits_that_it_allows(photographs, bits):
    image = Image.fromarray((photographs[0] * 255).byte().permute(1, 2, 0).numpy())
    qualities = range(1, 96)
    sizes = [8 * encode_jpeg(quality, image)[1] for quality in qualities]
    expected = max((size for size in sizes if size <= bits), default=sizes[0])
    found = 8 * largest_within(bits, encode_jpeg, qualities)(image)[1]
    assert (
        found <= max(bits, sizes[0]) and found >= 0.97 * expected
    )  # sizes may dip between neighbouring qualities


def test_choosing_by_previews():
    finished = np.array([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]])
    right = choice_scores(finished, finished)
    assert (
        right["rank_correlation"] == pytest.approx(1.0)
        and right["chosen_by_preview"] == right["best"] == 3.5
    )
    assert right["gain"] == pytest.approx(1.0) and right["at_random"] == 2.5
    wrong = choice_scores(-finished, finished)
    assert wrong["rank_correlation"] == pytest.approx(-1.0) and wrong["chosen_by_preview"] == 1.5
    nothing = choice_scores(np.zeros((2, 3)), finished)
    assert nothing["rank_correlation"] == 0.0


def test_prefixes_of_a_code_take_their_share_of_its_bits(photographs):
    from test_applications import tokenizer_of

    tokenizer = tokenizer_of()
    codes = tokenizer.encode(photographs)
    for k, (scales, bits, images) in enumerate(prefixes(tokenizer, photographs), 1):
        assert scales == k
        assert bits == pytest.approx(k * 16 * np.log2(tokenizer.config.num_codes) / 64**2)
        torch.testing.assert_close(images, tokenizer.decode(codes, k))
    assert k == 5
    assert [scales for scales, *_ in prefixes(tokenizer_of("sit4"), photographs)] == [4]
