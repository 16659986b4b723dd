"""Many sizes from one tokenizer: first scales, images of any size in tiles, batches and dtypes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_tokenizer import CAUSAL, SMOKE, assert_near, decoded, photographs, started, tokenizer_of

from sitlib.model.tiling import decode_codes, encode_image, pad
from sitlib.train.codebooks import initialize_codebooks
from sitlib.train.losses import TokenizerLoss


@pytest.mark.parametrize(
    ("variant", "transform"),
    [("sit5", "wavelet"), ("sit4_ours", "wavelet"), ("sit4", "lifted_wavelet")],
)
def test_codes_of_a_downsampled_photograph_are_the_first_scales_of_the_whole(variant, transform):
    tokenizer, images = started(variant, encoder_attention="scale_causal", transform=transform)
    codes = tokenizer.encode(images)
    levels = tokenizer.config.levels
    assert tokenizer.sizes == [64 >> n for n in range(levels, -1, -1)] and len(codes.unique()) > 30
    for scales, size in enumerate(tokenizer.sizes, 1):
        small = F.avg_pool2d(images, 64 // size)
        assert torch.equal(tokenizer.encode(small), codes[:, :scales]), size
    other, _ = started(variant, encoder_attention="scale_causal", wavelet="bior4.4")  # not of Haar
    assert not torch.equal(other.encode(F.avg_pool2d(images, 2)), other.encode(images)[:, :-1])
    assert tokenizer_of("sit4").sizes == [64]


def test_any_first_scales_can_be_decoded_and_ignore_the_others():
    tokenizer, images = started("sit5", **CAUSAL)
    codes, vectors = tokenizer.encode(images), tokenizer.quantize(tokenizer.latents(images)).vectors
    for scales, size in enumerate(tokenizer.sizes, 1):
        first = tokenizer.decode(codes, scales=scales)
        assert first.shape == (12, 3, size, size)
        assert torch.equal(first, tokenizer.decode(codes[:, :scales]))
        small = F.avg_pool2d(images, 64 // size)
        assert_near(tokenizer.reconstruct(small), first, 1e-4)
        # The whole image holds the smaller one: its Haar approximation, before clamping.
        whole = F.avg_pool2d(decoded(tokenizer, vectors), 64 // size)
        alone = decoded(tokenizer, vectors[:, :scales])
        assert_near(alone, whole, 1e-4)


@pytest.mark.parametrize("scales", [1, 4])
def test_the_loss_may_ask_for_the_image_of_the_first_scales(scales):
    tokenizer, images = started("sit5", **CAUSAL)
    output = tokenizer(images, preview_scales=scales)
    preview, target = output.preview
    expected = F.avg_pool2d(images, 64 // (4 << scales - 1))
    assert_near(target, expected, 1e-5)
    expected = tokenizer.decode(output.codes, scales)
    assert_near(preview.clamp(0, 1), expected, 1e-4)
    assert tokenizer(images).preview is None
    # Weights of a plain sum: L2 in [-1, 1], without LPIPS here.
    config = replace(SMOKE.tokenizer.loss, lpips=0.0, l2=3.0, multiscale=0.5)
    both = (TokenizerLoss(config)(x, images)[0] for x in (output, replace(output, preview=None)))
    expected = 0.5 * 3.0 * (2 * (preview - target)).square().mean()
    torch.testing.assert_close(next(both) - next(both), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("height", "width", "side"), [(64, 128, 64), (128, 64, 64), (90, 33, 64), (20, 30, 32)]
)
def test_images_of_any_size_are_encoded_tile_by_tile(height, width, side):
    tokenizer, images = started("sit5", **CAUSAL)
    image = F.interpolate(images[:1], (height, width), mode="area")
    encoded = encode_image(tokenizer, image)
    rows, columns = -(-height // side), -(-width // side)
    assert encoded.codes.shape == (5 - (64 // side - 1), 16 * rows * columns)
    assert encoded.token_grid == (4 * rows, 4 * columns)
    padded = pad(image, side)
    tiles = [
        torch.cat([tokenizer.reconstruct(tile) for tile in row.split(side, 3)], 3)
        for row in padded.split(side, 2)
    ]
    whole = decode_codes(tokenizer, encoded)
    assert_near(whole, torch.cat(tiles, 2)[:, :, :height, :width], 1e-5)
    # Codes are one grid over the whole image: the top left tile's are its top left corner.
    corner = encoded.codes.unflatten(1, encoded.token_grid)[:, :4, :4].flatten(1)
    assert torch.equal(corner[None], tokenizer.encode(padded[:, :, :side, :side]))
    small = decode_codes(tokenizer, encoded, scales=len(encoded.codes) - 1)
    assert small.shape[2:] == (-(-height // 2), -(-width // 2))


@pytest.mark.parametrize(("height", "width"), [(128, 240), (250, 130), (300, 128), (40, 129)])
def test_tiles_of_larger_grids_share_a_token_and_fade_over_it(height, width):
    """A naive loop adds up all tiles, each with weights that fall off over 16 px, where it has a
    neighbor."""
    tokenizer = tokenizer_of("sit4", size=128, grid_size=8)
    images = F.interpolate(photographs(), size=128, mode="bicubic").clamp(0, 1)
    tokenizer.fit_normalization(images)
    initialize_codebooks(tokenizer, images)
    image = F.interpolate(images[:1], (height, width), mode="bicubic").clamp(0, 1)
    encoded = encode_image(tokenizer, image)
    rows, columns = (1 + math.ceil(max(0, side - 128) / 112) for side in (height, width))
    assert encoded.token_grid == (8 * rows, 8 * columns)
    padded = F.pad(image, (0, 112 * columns + 16 - width, 0, 112 * rows + 16 - height), "replicate")
    sums = torch.zeros_like(padded)
    for row in range(rows):
        for column in range(columns):
            box = (slice(112 * row, 112 * row + 128), slice(112 * column, 112 * column + 128))
            weights = []
            for place, count in ((row, rows), (column, columns)):
                ramp = (torch.arange(16) + 0.5) / 16
                before = ramp if place else torch.ones(16)
                after = ramp.flip(0) if place + 1 < count else torch.ones(16)
                weights.append(torch.cat([before, torch.ones(96), after]))
            tile = tokenizer.reconstruct(padded[:, :, *box])
            sums[:, :, *box] += tile * weights[0][:, None] * weights[1]
    whole = decode_codes(tokenizer, encoded)
    assert_near(whole, sums[:, :, :height, :width], 1e-5)


def test_empty_batches_and_other_dtypes_and_layouts():
    tokenizer, images = started("sit5", **CAUSAL)
    assert tokenizer.encode(images[:0]).shape == (0, 5, 16)
    assert tokenizer.reconstruct(images[:0]).shape == (0, 3, 64, 64)
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer.encode(images.double()), codes)
    flipped = images.transpose(2, 3)  # not contiguous
    assert torch.equal(tokenizer.encode(flipped), tokenizer.encode(flipped.contiguous()))
    for dtype in (torch.int16, torch.uint16):  # the latter as shards hold them
        assert torch.equal(tokenizer.decode(codes.to(dtype)), tokenizer.decode(codes))
    for others in (images, images[0], images[:1] > 0):
        with pytest.raises(ValueError, match="give one image"):
            encode_image(tokenizer, others)
