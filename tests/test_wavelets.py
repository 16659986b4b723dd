"""The wavelet transform against PyWavelets, against block means, and against its own algebra."""

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.wavelets import dwt2, idwt2, max_levels, orthonormal_gains

NAMED = ["haar", "db2", "bior2.2", "bior4.4", "db5", "sym4", "coif2", "rbio3.3", "bior1.1"]
# Only the truncated Meyer filters, "dmey", do not reconstruct exactly (nor in PyWavelets).
INVERTIBLE = [name for name in pywt.wavelist(kind="discrete") if name != "dmey"]


def random_images(*shape, dtype=torch.float32, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reference(images, wavelet, levels):
    """Coefficients by PyWavelets in the layout and scaling of dwt2."""
    found = pywt.wavedec2(
        images.double().numpy(), wavelet, mode="periodization", level=levels, axes=(-2, -1)
    )
    scales = [found[0], *(np.concatenate(bands, axis=1) for bands in found[1:])]
    powers = [levels, *range(levels, 0, -1)]
    return [
        torch.from_numpy(scale / 2.0**power) for scale, power in zip(scales, powers, strict=True)
    ]


@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("wavelet", NAMED)
def test_equals_pywavelets_in_float32(wavelet, size=(32, 80)):
    images = random_images(2, 3, *size)
    expected = reference(images, wavelet, 3)
    found = dwt2(images, wavelet, levels=3)
    assert [list(scale.shape) for scale in found] == [list(scale.shape) for scale in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings(
    "ignore:Level value"
)  # PyWavelets', about sides shorter than the filters
@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
def test_every_discrete_wavelet_equals_pywavelets(wavelet):
    images = random_images(1, 1, 16, 8, dtype=torch.float64)
    for ours, theirs in zip(dwt2(images, wavelet, 3), reference(images, wavelet, 3), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


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
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(idwt2(coefficients, wavelet), images, atol=tolerance, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    wavelet=st.sampled_from(INVERTIBLE),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_is_linear(wavelet, a, b, seed):
    x, y = random_images(2, 1, 2, 16, 24, dtype=torch.float64, seed=seed)
    together = dwt2(a * x + b * y, wavelet, 2)
    for scale, of_x, of_y in zip(together, dwt2(x, wavelet, 2), dwt2(y, wavelet, 2), strict=True):
        torch.testing.assert_close(scale, a * of_x + b * of_y, atol=1e-9, rtol=0)


@pytest.mark.parametrize("prefix", [1, 2, 3, 4, 5])
def test_coefficients_of_a_downsampled_image_are_the_first_scales(prefix):
    images = random_images(2, 3, 64, 96)
    full = dwt2(images, "haar", levels=4)
    factor = 2 ** (5 - prefix)
    small = F.avg_pool2d(images, factor)
    for own, first in zip(dwt2(small, "haar", levels=prefix - 1), full[:prefix], strict=True):
        torch.testing.assert_close(own, first, atol=1e-6, rtol=0)
    torch.testing.assert_close(idwt2(full[:prefix]), small, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wavelet", INVERTIBLE[::7] + ["haar", "bior2.2", "bior4.4"])
def test_a_constant_image_keeps_its_value_and_has_no_details(wavelet):
    approximation, *details = dwt2(torch.full((1, 3, 32, 32), 0.7, dtype=torch.float64), wavelet, 3)
    torch.testing.assert_close(
        approximation, torch.full_like(approximation, 0.7), atol=1e-6, rtol=0
    )
    assert max(detail.abs().max() for detail in details) < 1e-6


@pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4"])
def test_orthonormal_gains_keep_the_energy(wavelet):
    images = random_images(1, 3, 32, 64, dtype=torch.float64)
    scales = zip(dwt2(images, wavelet, 3), orthonormal_gains(3), strict=True)
    energy = sum((gain * scale).square().sum() for scale, gain in scales)
    torch.testing.assert_close(energy, images.square().sum())


def test_bands_answer_to_their_orientation():
    rows = torch.arange(16.0) % 2
    horizontal = rows.view(1, 1, 16, 1).expand(1, 2, 16, 16)  # edges that run left to right
    checkerboard = (rows.view(16, 1) - rows).abs().expand(1, 2, 16, 16)
    for images, band in ((horizontal, 0), (horizontal.mT, 1), (checkerboard, 2)):
        details = dwt2(images, "haar", 1)[1].view(3, 2, 8, 8)  # H, V, D of two channels
        strength = details.abs().amax(dim=(1, 2, 3))
        assert strength[band] == 0.5
        assert strength.sum() == 0.5


def test_channels_are_grouped_by_band():
    images = random_images(1, 3, 8, 8)
    details = dwt2(images, "haar", 1)[1]
    for channel in range(3):
        alone = dwt2(images[:, channel : channel + 1], "haar", 1)[1]
        assert torch.equal(details[:, channel::3], alone)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior4.4"])
def test_gradients(wavelet):
    images = random_images(1, 2, 4, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: tuple(dwt2(x, wavelet, 2)), images)
    assert torch.autograd.gradgradcheck(lambda x: tuple(s**2 for s in dwt2(x, wavelet, 1)), images)
    scales = [scale.detach().requires_grad_() for scale in dwt2(images, wavelet, 2)]
    assert torch.autograd.gradcheck(lambda *x: idwt2(x, wavelet), scales)
    assert torch.autograd.gradgradcheck(lambda *x: idwt2(x, wavelet) ** 2, scales)


@pytest.mark.parametrize("wavelet", ["haar", "bior2.2"])
def test_gradient_reaches_the_image_when_only_some_scales_are_used(wavelet):
    images = random_images(1, 1, 8, 8, dtype=torch.float64).requires_grad_()
    dwt2(images, wavelet, 2)[0].sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 16), atol=1e-12, rtol=0)


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype_even_under_autocast(wavelet, dtype):
    images = random_images(2, 3, 16, 16).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coefficients = dwt2(images, wavelet, 2)
        restored = idwt2(coefficients, wavelet)
    assert {scale.dtype for scale in coefficients} == {dtype} == {restored.dtype}
    torch.testing.assert_close(
        restored, images, atol=max(1e-10, 8 * torch.finfo(dtype).eps), rtol=0
    )


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
    expected = dwt2(images, wavelet, 2)
    for same in (images.to(memory_format=torch.channels_last), images.mT.contiguous().mT):
        found = dwt2(same, wavelet, 2)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(idwt2(found, wavelet), images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("wavelet", ["haar", "bior4.4"])
def test_cuda_equals_cpu(wavelet):
    images = random_images(3, 3, 64, 32)
    on_gpu = dwt2(images.cuda(), wavelet, 3)
    for ours, theirs in zip(on_gpu, dwt2(images, wavelet, 3), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(idwt2(on_gpu, wavelet).cpu(), images, atol=1e-5, rtol=0)


def test_no_levels_is_the_image_itself():
    images = random_images(1, 3, 5, 7)
    assert dwt2(images, levels=0)[0] is images
    assert idwt2([images]) is images


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dwt2(zeros(1, 3, 60, 64), "haar", 3), "3 levels of 60x64 px: .* at most 2 levels"),
        (lambda: dwt2(zeros(1, 3, 0, 64), "haar", 1), "1 levels of 0x64 px"),
        (
            lambda: dwt2(zeros(3, 64, 64), "haar", 2),
            "must be a floating point tensor \\[B, C, H, W\\]",
        ),
        (lambda: dwt2(zeros(1, 3, 64, 64), "haar", -1), "-1 levels of 64x64"),
        (lambda: dwt2(zeros(1, 3, 64, 64), "haar", 1.5), "1.5 levels of 64x64"),
        (lambda: dwt2(zeros(1, 3, 8, 8, dtype=torch.uint8)), "images.float\\(\\) / 255"),
        (lambda: dwt2(zeros(1, 3, 8, 8), "bior44"), "bior4.4"),
        (lambda: dwt2(zeros(1, 3, 8, 8), "mexh"), "not a discrete wavelet"),
        (lambda: idwt2([zeros(1, 3, 8, 8)], "harr"), "use haar"),
        (lambda: idwt2([zeros(1, 3, 8, 8)], None), "haar, db2"),
        (lambda: idwt2([]), "must be a list"),
        (lambda: idwt2(zeros(1, 3, 4, 4)), "must be a list"),
        (lambda: idwt2([zeros(3, 4, 4)]), "LL must be"),
        (lambda: idwt2([zeros(1, 3, 4, 4), zeros(1, 9, 8, 8)]), "scale 2 must be .* without a gap"),
        (lambda: idwt2([zeros(1, 3, 4, 4), zeros(1, 9, 4, 4).double()]), "float32.*not .*float64"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_max_levels_is_what_dwt2_accepts():
    for height, width in ((48, 64), (1, 8), (7, 64), (96, 32)):
        most = max_levels(height, width)
        images = torch.zeros(1, 1, height, width)
        assert len(dwt2(images, levels=most)) == most + 1
        with pytest.raises(ValueError):
            dwt2(images, levels=most + 1)
