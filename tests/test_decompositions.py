"""Ways of taking images apart: exact inverses, no leakage, and agreement with PyWavelets where filters do not meet a border."""

from dataclasses import replace

import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.lifting import LIFTING_STEPS, patch_dwt2
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transforms import decomposition
from sitlib.model.wavelets import dwt2
from workbook.profile import load_profile

WAYS = [
    ("wavelet", "haar", False),
    ("wavelet", "bior4.4", False),
    ("wavelet", "bior2.2", True),
    ("wavelet", "bior4.4", True),
    ("pyramid", "haar", False),
    ("raster", "haar", False),
]


def made(transform, wavelet, patch_local, size=64, levels=3, grid=4):
    return decomposition(transform, size, levels, grid, wavelet, patch_local)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3))
def test_images_come_back_from_maps_and_maps_from_tokens(way, seed, batch):
    images = torch.rand(
        batch, 3, 64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    ours = made(*way)
    maps = ours.split(images)
    assert torch.allclose(ours.merge(maps), images, atol=1e-12)
    tokens = ours.patchify(maps)
    assert [x.shape for x in tokens] == [(batch, 16, ours.patch_dim(s)) for s in ours.scales]
    for back, there in zip(ours.unpatchify(tokens), maps, strict=True):
        assert torch.equal(back, there)


def test_the_pyramid_s_first_scales_are_the_averaged_image_and_raster_blocks_are_stripes():
    images = torch.rand(2, 3, 64, 64)
    pyramid = made("pyramid", "haar", False)
    for k in range(1, 5):
        averaged = torch.nn.functional.avg_pool2d(images, 2 ** (4 - k))
        assert torch.allclose(pyramid.merge(pyramid.split(images)[:k]), averaged, atol=1e-6)
    raster = made("raster", "haar", False)
    assert torch.equal(raster.merge(raster.split(images)[:3]), images[:, :, :48])
    patches = torch.cat(
        raster.patchify(raster.split(images)), dim=1
    )  # 64 patches of 8 px in raster order
    assert torch.equal(patches[1, 9], images[1, :, 8:16, 8:16].flatten())


@pytest.mark.parametrize("wavelet", [name for name in LIFTING_STEPS if name != "haar"])
def test_a_pixel_changes_coefficients_of_its_own_token_only_if_transforms_are_patch_local(wavelet):
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 17, 30] += (
        1  # in row 1, column 1 of the grid of 16 px parts, beside the border of column 2
    )
    touched = {}
    for local in (False, True):
        ours = made("wavelet", wavelet, local)
        pairs = zip(
            ours.patchify(ours.split(images)), ours.patchify(ours.split(changed)), strict=True
        )
        touched[local] = {int(n) for a, b in pairs for n in (a != b).any(-1).nonzero()[:, 1]}
    assert touched[True] == {5} and len(touched[False]) > 1


def test_patch_local_haar_is_haar_and_constants_have_no_details():
    images = torch.rand(2, 3, 32, 32)
    for ours, theirs in zip(patch_dwt2(images, "haar", 3, 4), dwt2(images, "haar", 3), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    for wavelet in LIFTING_STEPS:
        low, *details = patch_dwt2(
            torch.full((1, 3, 32, 32), 0.7, dtype=torch.float64), wavelet, 2, 2
        )
        assert torch.allclose(low, torch.full_like(low, 0.7)) and all(
            d.abs().max() < 1e-12 for d in details
        )


@pytest.mark.parametrize("wavelet", [name for name in LIFTING_STEPS if name != "haar"])
def test_lifting_is_the_wavelet_of_pywavelets_away_from_borders(wavelet):
    rows = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    low, details = patch_dwt2(rows, wavelet, 1, 1)
    expected_low, (horizontal, *_) = pywt.dwt2(rows[0, 0].numpy(), wavelet, mode="symmetric")
    for ours, theirs in ((low[0, 0], expected_low), (details[0, 0], horizontal)):
        theirs = torch.from_numpy(theirs)
        inner = ours[8:24, 8:24].flatten()
        found = [  # PyWavelets keeps more samples, and may begin elsewhere and count with other signs and factors
            torch.corrcoef(torch.stack([inner, theirs[8 + i : 24 + i, 8 + j : 24 + j].flatten()]))[
                0, 1
            ].abs()
            for i in range(-4, 5)
            for j in range(-4, 5)
        ]
        assert max(found) > 1 - 1e-9


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "pyramid"},
        {"transform": "raster"},
        {"wavelet": "bior4.4", "patch_local": True},
        {"wavelet": "bior4.4", "neighbour_mixing": True},
    ],
)
def test_tokenizers_of_every_kind_run_and_a_scale_causal_one_keeps_to_its_scales(changes):
    profile = load_profile("smoke")
    causal = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}
    config = replace(profile.tokenizer_variant("sit4_two"), **causal, **changes)
    torch.manual_seed(0)
    tokenizer = SpectralTokenizer(config)
    for parameter in tokenizer.parameters():  # the mixing of neighbours starts at nothing
        torch.nn.init.normal_(parameter, std=0.2) if parameter.abs().max() == 0 else None
    images = torch.rand(2, 3, 64, 64)
    tokenizer.fit_normalization(images)
    output = tokenizer(images)
    assert output.reconstruction.shape == images.shape and output.codes.shape == (2, 4, 16)
    output.reconstruction.mean().backward()
    codes = tokenizer.encode(images)
    first = tokenizer.decode(codes, scales=2)
    codes[:, 2:] = 0
    assert torch.allclose(first, tokenizer.decode(codes, scales=2))
    assert torch.allclose(tokenizer.images(tokenizer.normalized_patches(images)), images, atol=1e-5)
