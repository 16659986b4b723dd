"""Transforms of images into scales: exact inverses, no leakage, agreement with PyWavelets."""

from dataclasses import replace

import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.patchify import TRANSFORMS
from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transforms import LIFTING
from workbook.profile import load_profile

CASES = [
    ("wavelet", "haar"),
    ("wavelet", "bior4.4"),
    ("local_wavelet", "bior2.2"),
    ("local_wavelet", "bior4.4"),
    ("pyramid", "haar"),
    ("raster", "haar"),
]


def geometry_of(transform, wavelet="haar", size=64, levels=3, grid_size=4):
    return TRANSFORMS[transform](size, levels, grid_size, wavelet)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 3))
def test_images_come_back_from_maps_and_maps_from_patches(case, seed, batch):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 3, 64, 64, generator=generator, dtype=torch.float64)
    geometry = geometry_of(*case)
    maps = geometry.forward(images)
    assert torch.allclose(geometry.inverse(maps), images, atol=1e-9)
    patches = geometry.patchify(maps)
    assert [x.shape for x in patches] == [(batch, 16, geometry.patch_dim(s)) for s in (1, 2, 3, 4)]
    for back, there in zip(geometry.unpatchify(patches), maps, strict=True):
        assert torch.equal(back, there)


def test_first_scales_of_the_pyramid_are_averaged_images_and_raster_blocks_are_stripes():
    images = torch.rand(2, 3, 64, 64)
    pyramid, raster = geometry_of("pyramid"), geometry_of("raster")
    for k in range(1, 5):
        averaged = F.avg_pool2d(images, 2 ** (4 - k))
        assert torch.allclose(pyramid.inverse(pyramid.forward(images)[:k]), averaged, atol=1e-6)
    assert torch.equal(raster.inverse(raster.forward(images)[:3]), images[:, :, :48])
    patches = torch.cat(raster.patchify(raster.forward(images)), dim=1)  # 64 patches of 8 px
    assert torch.equal(patches[1, 9], images[1, :, 8:16, 8:16].flatten())


@pytest.mark.parametrize("wavelet", LIFTING)
def test_only_with_local_wavelets_a_pixel_changes_no_other_token(wavelet):
    images = torch.rand(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 17, 30] += 1  # in row 1, column 1 of the grid, beside the border of column 2
    touched = {}
    for name in ("wavelet", "local_wavelet"):
        geometry = geometry_of(name, wavelet)
        before, after = (geometry.patchify(geometry.forward(x)) for x in (images, changed))
        pairs = zip(before, after, strict=True)
        touched[name] = {int(n) for a, b in pairs for n in (a != b).any(-1).nonzero()[:, 1]}
    assert touched["local_wavelet"] == {5} and len(touched["wavelet"]) > 1


def test_constants_have_no_details():
    constant = torch.full((1, 3, 64, 64), 0.7, dtype=torch.float64)
    for wavelet in LIFTING:
        low, *details = geometry_of("local_wavelet", wavelet).forward(constant)
        assert torch.allclose(low, torch.full_like(low, 0.7))
        assert max(detail.abs().max() for detail in details) < 1e-12


@pytest.mark.parametrize("wavelet", LIFTING)
def test_lifting_is_the_wavelet_of_pywavelets_away_from_borders(wavelet):
    image = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    low, details = geometry_of("local_wavelet", wavelet, levels=1, grid_size=1).forward(image)
    LL, (H, *_) = pywt.dwt2(image[0, 0].numpy(), wavelet, mode="symmetric")
    for ours, theirs in ((low[0, 0], LL), (details[0, 0], H)):
        theirs, inner = torch.from_numpy(theirs), ours[8:24, 8:24].flatten()
        # PyWavelets keeps more samples, begins elsewhere, and has other signs and factors.
        shifted = [
            torch.corrcoef(torch.stack([inner, theirs[8 + i : 24 + i, 8 + j : 24 + j].flatten()]))
            for i in range(-4, 5)
            for j in range(-4, 5)
        ]
        assert max(matrix[0, 1].abs() for matrix in shifted) > 1 - 1e-9


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "pyramid"},
        {"transform": "raster"},
        {"wavelet": "bior4.4", "transform": "local_wavelet"},
        {"wavelet": "bior4.4", "neighbor_mixing": True},
    ],
)
def test_tokenizers_of_every_kind_run_and_a_scale_causal_one_keeps_to_its_scales(changes):
    causal = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}
    config = replace(load_profile("smoke").tokenizer_variant("sit4_two"), **causal, **changes)
    torch.manual_seed(0)
    tokenizer, images = SpectralTokenizer(config), torch.rand(2, 3, 64, 64)
    for parameter in tokenizer.parameters():  # the mixing of neighbors starts at zero
        torch.nn.init.normal_(parameter, std=0.2) if parameter.abs().max() == 0 else None
    tokenizer.fit_normalization(images)
    output = tokenizer(images)
    assert output.reconstruction.shape == images.shape and output.codes.shape == (2, 4, 16)
    output.reconstruction.mean().backward()
    codes = tokenizer.encode(images)
    first = tokenizer.decode(codes, scales=2)
    codes[:, 2:] = 0
    assert torch.allclose(first, tokenizer.decode(codes, scales=2))
    assert torch.allclose(
        tokenizer.to_images(tokenizer.normalized_patches(images)), images, atol=1e-5
    )
