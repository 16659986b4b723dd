"""The wavelet transform, and those it is compared with: PyWavelets, block means, exact inverses."""

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.transforms import TRANSFORMS
from sitlib.model.wavelets import dwt2, idwt2, orthonormal_gains

# Only the truncated Meyer filters, "dmey", do not reconstruct exactly (nor in PyWavelets).
INVERTIBLE = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]
HAAR_ONLY = ("lifted_wavelet", "pyramid", "pyramid_nearest")
TRANSFORMED = [("wavelet", "haar"), ("wavelet", "bior4.4"), *((name, "haar") for name in HAAR_ONLY)]


def random_images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore:Level value")  # PyWavelets', about sides below the filters'
@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
@pytest.mark.parametrize("shape", [(1, 1, 16, 8), (2, 3, 32, 80)])
def test_every_discrete_wavelet_is_that_of_pywavelets(wavelet, shape):
    images = random_images(*shape, dtype=torch.float64)
    LL, *details = pywt.wavedec2(images.numpy(), wavelet, "periodization", 3, axes=(-2, -1))
    theirs = [LL, *(np.concatenate(bands, axis=1) for bands in details)]
    expected = [
        torch.from_numpy(x) / 2.0**power for x, power in zip(theirs, (3, 3, 2, 1), strict=True)
    ]
    assert_near(dwt2(images, wavelet, 3), expected, 1e-10)
    assert_near(dwt2(images.float(), wavelet, 3), [x.float() for x in expected], 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    wavelet=st.sampled_from(INVERTIBLE),
    levels=st.integers(0, 4),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    channels=st.integers(1, 4),
    batch=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_reconstructs_and_counts(wavelet, levels, height, width, channels, batch, dtype):
    images = random_images(batch, channels, height << levels, width << levels, dtype=dtype)
    coefficients = dwt2(images, wavelet, levels)
    assert len(coefficients) == levels + 1
    assert sum(scale.numel() for scale in coefficients) == images.numel()
    assert_near(idwt2(coefficients, wavelet), images, 1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("prefix", [1, 2, 3, 4, 5])
def test_coefficients_of_a_downsampled_image_are_the_first_scales(prefix):
    images = random_images(2, 3, 64, 96)
    full, small = dwt2(images, "haar", levels=4), F.avg_pool2d(images, 2 ** (5 - prefix))
    assert_near(dwt2(small, "haar", levels=prefix - 1), full[:prefix], 1e-6)
    assert_near(idwt2(full[:prefix]), small, 1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_orthonormal_gains_keep_the_energy(wavelet):
    images = random_images(1, 3, 32, 64, dtype=torch.float64)
    scales = zip(dwt2(images, wavelet, 3), orthonormal_gains(3), strict=True)
    energy = sum((gain * scale).square().sum() for scale, gain in scales)
    torch.testing.assert_close(energy, images.square().sum())


# -- dtypes, compilers, devices ---------------------------------------------------------


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_even_under_autocast(wavelet, dtype):
    images = random_images(2, 3, 16, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coefficients = dwt2(images, wavelet, 2)
        restored = idwt2(coefficients, wavelet)
    assert {scale.dtype for scale in coefficients} == {dtype} == {restored.dtype}
    assert_near(restored, images, max(1e-10, 8 * torch.finfo(dtype).eps))


@pytest.mark.parametrize("wavelet", ["haar", "db3"])
def test_half_precision_is_rounded_once(wavelet):
    for dtype, value in ((torch.bfloat16, 0.7), (torch.float16, 60_000.0)):
        image = torch.full((1, 1, 256, 256), value, dtype=dtype)
        coefficients = dwt2(image, wavelet, 8)
        assert torch.equal(coefficients[0].flatten(), image[0, 0, 0, :1])
        assert torch.equal(idwt2(coefficients, wavelet), image)


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2"])
def test_the_compiler_goes_through(wavelet):
    def energy(x):
        return sum(scale.square().sum() for scale in dwt2(x, wavelet, 2))

    x = random_images(2, 3, 16, 16)
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), energy(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_cuda_equals_cpu(wavelet):
    images = random_images(3, 3, 64, 32)
    on_gpu = dwt2(images.cuda(), wavelet, 3)
    assert_near([x.cpu() for x in on_gpu], dwt2(images, wavelet, 3), 1e-6)
    assert_near(idwt2(on_gpu, wavelet).cpu(), images, 1e-5)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dwt2(zeros(1, 3, 60, 64), "haar", 3), "3 levels of 60x64 px: .* at most 2 levels"),
        (lambda: dwt2(zeros(3, 64, 64), "haar", 2), r"floating point tensor \[B, C, H, W\]"),
        (lambda: dwt2(zeros(1, 3, 8, 8, dtype=torch.uint8)), r"images.float\(\) / 255"),
        (lambda: dwt2(zeros(1, 3, 8, 8), "bior44"), "bior4.4"),
        (lambda: idwt2(zeros(1, 3, 4, 4)), "must be a list"),
        (lambda: idwt2([zeros(1, 3, 4, 4), zeros(1, 9, 8, 8)]), "scale 2 must be .* without a gap"),
        (lambda: idwt2([zeros(1, 3, 4, 4), zeros(1, 9, 4, 4).double()]), "float32.*not .*float64"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# -- what wavelets are compared with ---------------------------------------------------------------


def geometry_of(transform, wavelet="haar", size=64, levels=3, grid_size=4, grids=None):
    return TRANSFORMS[transform](size, levels, grid_size, wavelet, grids)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(TRANSFORMED), st.integers(0, 2**31), st.integers(1, 3))
def test_images_come_back_from_maps_and_maps_from_patches(case, seed, batch):
    images = random_images(batch, 3, 64, 64, dtype=torch.float64, seed=seed)
    geometry = geometry_of(*case)
    maps = geometry.forward(images)
    assert_near(geometry.inverse(maps), images, 1e-9)
    patches = geometry.patchify(maps)
    assert [x.shape for x in patches] == [(batch, 16, geometry.patch_dim(s)) for s in (1, 2, 3, 4)]
    for back, there in zip(geometry.unpatchify(patches), maps, strict=True):
        assert torch.equal(back, there)


def test_first_scales_of_the_pyramid_are_averaged_images():
    images = torch.rand(2, 3, 64, 64)
    for name in ("pyramid", "pyramid_nearest", "lifted_wavelet"):
        geometry = geometry_of(name)
        maps = geometry.forward(images)
        for k in range(1, 5):
            averaged = F.avg_pool2d(images, 2 ** (4 - k))
            assert_near(geometry.inverse(maps[:k]), averaged, 1e-6)
            smaller = geometry_of(name, size=64 >> 4 - k, levels=k - 1)
            assert_near(smaller.forward(averaged), maps[:k], 1e-6)
    repeated = F.avg_pool2d(images, 2).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    nearest = geometry_of("pyramid_nearest").forward(images)
    assert_near(nearest[-1], images - repeated, 1e-6)


def enlarged(x, axis):
    """Twice as many samples along an axis: three quarters of the nearest, a quarter of the next."""
    x = np.moveaxis(x, axis, 0)
    before, after = np.concatenate([x[:1], x[:-1]]), np.concatenate([x[1:], x[-1:]])
    pairs = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis=1)
    return np.moveaxis(pairs.reshape(-1, *x.shape[1:]), 0, axis)


def test_lifted_details_are_those_of_pywavelets_less_those_of_the_enlarged_approximation():
    images = random_images(2, 3, 32, 32, dtype=torch.float64)
    ours = geometry_of("lifted_wavelet", size=32, levels=2).forward(images)
    assert sum(x.numel() for x in ours) == images.numel()
    LL = images.numpy()
    for scale in (2, 1):
        LL, details = pywt.dwt2(LL, "haar", axes=(-2, -1))
        LL, details = LL / 2, np.concatenate(details, axis=1) / 2  # of unit DC gain
        _, predicted = pywt.dwt2(enlarged(enlarged(LL, 2), 3), "haar", axes=(-2, -1))
        expected = details - np.concatenate(predicted, axis=1) / 2
        assert_near(ours[scale], torch.from_numpy(expected), 1e-12)
    assert_near(ours[0], torch.from_numpy(LL), 1e-12)
