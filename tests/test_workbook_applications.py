"""Bits of codes and files, ways of enlarging, choices by previews, images in the making."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_applications import PLAIN, model_of, tokenizer_of
from test_applications import photographs as extra_photographs

from workbook.applications import choice_scores, enlarge
from workbook.evaluate import generation
from workbook.evaluate.generation import GREY, generation_frames
from workbook.evaluate.tokenizer import (
    encode_jpeg,
    encode_jpeg2000,
    largest_within,
    prefixes,
    through_files,
)


@pytest.fixture(scope="module")
def photographs():
    return extra_photographs(6)


def test_files_with_more_coded_data_are_closer_to_the_image(photographs):
    for encode, settings in ((encode_jpeg, (10, 50, 90)), (encode_jpeg2000, (40, 10, 4))):
        points = [through_files(photographs, partial(encode, setting)) for setting in settings]
        rates = [coded for coded, _, _ in points]
        errors = [float((decoded - photographs).square().mean()) for _, decoded, _ in points]
        assert rates == sorted(rates) and errors == sorted(errors, reverse=True)
        assert all(0 < coded < whole for coded, _, whole in points)


def test_coded_data_of_a_jpeg_are_what_stands_after_its_headers():
    """Read the format independently: every segment before the scan has a marker and a length."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data, coded = encode_jpeg(80, Image.fromarray(pixels))
    position, marker = 2, 0
    while marker != 0xDA:
        assert data[position] == 0xFF
        marker = data[position + 1]
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    assert coded == len(data) - position - 2 and data[-2:] == b"\xff\xd9"


@pytest.mark.parametrize("bits", [700, 2000, 6000])
def test_the_largest_file_within_a_budget(photographs, bits):
    image = Image.fromarray((photographs[0] * 255).byte().permute(1, 2, 0).numpy())
    sizes = [8 * encode_jpeg(quality, image)[1] for quality in range(1, 96)]
    expected = max((size for size in sizes if size <= bits), default=sizes[0])
    size = 8 * largest_within(bits, encode_jpeg, range(1, 96), image)[1]
    # Sizes may dip between neighboring qualities.
    assert 0.97 * expected <= size <= max(bits, sizes[0])


def test_prefixes_of_a_code_take_their_share_of_its_bits(photographs):
    tokenizer = tokenizer_of()
    codes, points = tokenizer.encode(photographs), list(prefixes(tokenizer, photographs))
    assert [scales for scales, _, _ in points] == [1, 2, 3, 4, 5]
    for k, bits, images in points:
        assert bits == pytest.approx(
            16 * np.log2(tokenizer.config.codebook_sizes[:k]).sum() / 64**2
        )
        torch.testing.assert_close(images, tokenizer.decode(codes, k))
    assert [scales for scales, *_ in prefixes(tokenizer_of("sit4"), photographs)] == [4]


def test_enlarging_is_what_pillow_does(photographs):
    small = F.avg_pool2d(photographs, 8)
    pixels = (64 + small * 128).round()  # Pillow clips bytes between its two passes
    enlarged = enlarge(pixels / 255, 64, "lanczos")
    for image, result in zip(pixels.byte(), enlarged, strict=True):
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.array(image.resize((64, 64), Image.Resampling.LANCZOS))
        expected = torch.from_numpy(expected).permute(2, 0, 1) / 255
        torch.testing.assert_close(result, expected, atol=1.5 / 255, rtol=0)


def test_choosing_by_previews():
    finished = np.array([[0.0, 1.0, 2.0], [3.0, 5.0, 4.0]])
    right, wrong = choice_scores(finished, finished), choice_scores(-finished, finished)
    assert right["rank_correlation"] == pytest.approx(1) and right["gain"] == pytest.approx(1)
    assert right["chosen_by_preview"] == right["best"] == 3.5 and right["at_random"] == 2.5
    assert wrong["rank_correlation"] == pytest.approx(-1) and wrong["chosen_by_preview"] == 1.5


def test_films_of_scales_are_whole_and_those_of_rows_grey_where_nothing_is_sampled(monkeypatch):
    def film(variant, labels):
        models = model_of("class", variant), tokenizer_of(variant)
        monkeypatch.setattr(generation, "load_models", lambda *_: models)
        profile = SimpleNamespace(sampler=lambda variant: PLAIN)
        return generation_frames(profile, f"ar_{variant}", 0, torch.tensor(labels), 4)

    frames = film("sit5_sc", [0, 2])
    assert len(frames) == 5 and all(frame.shape == (2, 3, 64, 64) for frame in frames)
    assert len(frames[0][0].flatten(1).unique(dim=1).T) <= 16  # 4 x 4 px, enlarged
    assert not any((frame == GREY).all(dim=1).any() for frame in frames)
    frames = film("vit_vqgan", [1])
    assert len(frames) == 4
    for index, frame in enumerate(frames, 1):
        assert (frame[:, :, 16 * index :] == GREY).all()
        assert not (frame[:, :, : 16 * index] == GREY).all()
    with pytest.raises(ValueError, match="cannot be decoded alone"):
        film("sit4", [1])
