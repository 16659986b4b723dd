"""The wavelet transform, and those it is compared with: PyWavelets, block means, exact inverses."""

from dataclasses import replace

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.tokenizer import SpectralTokenizer
from sitlib.model.transforms import TRANSFORMS
from sitlib.model.wavelets import dwt2, idwt2, orthonormal_gains
from workbook.profile import load_profile

# Only the truncated Meyer filters, "dmey", do not reconstruct exactly (nor in PyWavelets).
INVERTIBLE = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]
TRANSFORMED = [
    ("wavelet", "haar"),
    ("wavelet", "bior4.4"),
    ("lifted_wavelet", "haar"),
    ("pyramid", "haar"),
    ("pyramid_nearest", "haar"),
]


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


# -- gradients, dtypes, compilers, devices ---------------------------------------------------------


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior4.4"])
def test_gradients(wavelet):
    images = random_images(1, 2, 4, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(dwt2(x, wavelet, 2)), images)
    assert torch.autograd.gradgradcheck(lambda x: tuple(s**2 for s in dwt2(x, wavelet, 1)), images)
    scales = [scale.detach().requires_grad_() for scale in dwt2(images, wavelet, 2)]
    assert torch.autograd.gradcheck(lambda *x: idwt2(x, wavelet), scales)
    assert torch.autograd.gradgradcheck(lambda *x: idwt2(x[:2], wavelet) ** 2, scales[:2])
    dwt2(images, wavelet, 2)[0].sum().backward()  # also where only some scales are used
    assert_near(images.grad, torch.full_like(images, 1 / 16), 1e-12)


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
def test_function_transforms_and_the_compiler_go_through(wavelet):
    def energy(x):
        return sum(scale.square().sum() for scale in dwt2(x, wavelet, 2))

    x, tangent = random_images(2, 3, 16, 16).requires_grad_(), random_images(2, 3, 16, 16)
    energy(x).backward()
    assert torch.allclose(torch.func.grad(energy)(x), x.grad)
    assert len(dwt2(x, wavelet, np.int64(2))) == 3
    compiled = torch.compile(energy, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), energy(x))
    one_by_one = torch.func.vmap(lambda image: dwt2(image[None], wavelet, 2)[0][0])(x)
    assert torch.allclose(one_by_one, dwt2(x, wavelet, 2)[0], atol=1e-6)
    moved = torch.func.jvp(lambda x: dwt2(x, wavelet, 2)[1], (x,), (tangent,))[1]
    assert torch.allclose(moved, dwt2(tangent, wavelet, 2)[1], atol=1e-6)


@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_memory_layout_does_not_matter(wavelet):
    images = random_images(5, 3, 16, 32)
    for same in (images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
        found = dwt2(same, wavelet, 2)
        torch.testing.assert_close(found, dwt2(images, wavelet, 2))
        torch.testing.assert_close(idwt2(found, wavelet), images)


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
        (lambda: dwt2(zeros(1, 3, 64, 64), "haar", -1), "-1 levels of 64x64"),
        (lambda: dwt2(zeros(1, 3, 8, 8, dtype=torch.uint8)), r"images.float\(\) / 255"),
        (lambda: dwt2(zeros(1, 3, 8, 8), "bior44"), "bior4.4"),
        (lambda: dwt2(zeros(1, 3, 8, 8), "mexh"), "not a discrete wavelet"),
        (lambda: idwt2([zeros(1, 3, 8, 8)], None), "haar, db2"),
        (lambda: idwt2(zeros(1, 3, 4, 4)), "must be a list"),
        (lambda: idwt2([zeros(3, 4, 4)]), "LL must be"),
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


def test_each_scale_may_have_a_grid_of_its_own():
    images, grids = random_images(2, 3, 64, 64, dtype=torch.float64), [8, 4, 4, 2]
    geometry = geometry_of("wavelet", grid_size=2, grids=grids)
    patches = geometry.patchify(geometry.forward(images))
    assert [x.shape[1:] for x in patches] == [(64, 3), (16, 36), (16, 144), (4, 2304)]
    assert geometry.num_scales * geometry.tokens_per_scale == 100
    assert_near(geometry.inverse(geometry.unpatchify(patches)), images, 1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "pyramid"},
        {"transform": "pyramid_nearest"},
        {"transform": "lifted_wavelet"},
        {"typed_parameters": "mlp", "standardize": False},
    ],
)
def test_tokenizers_of_every_kind_run_and_a_scale_causal_one_keeps_to_its_scales(changes):
    causal = {"encoder_attention": "scale_causal", "decoder_attention": "scale_causal"}
    config = replace(load_profile("smoke").tokenizer_variant("sit4"), **causal, **changes)
    torch.manual_seed(0)
    tokenizer, images = SpectralTokenizer(config), torch.rand(2, 3, 64, 64)
    tokenizer.fit_normalization(images)
    assert_near(tokenizer.to_images(tokenizer.normalized_patches(images)), images, 1e-5)
    output = tokenizer(images)
    assert output.reconstruction.shape == images.shape and output.codes.shape == (2, 4, 16)
    output.reconstruction.mean().backward()
    codes = tokenizer.encode(images)
    first = tokenizer.decode(codes, scales=2)
    codes[:, 2:] = 0
    assert torch.allclose(first, tokenizer.decode(codes, scales=2))
