"""Two-dimensional discrete wavelet transform of images: Mallat's pyramid, batched, differentiable.

One level splits an image into four bands of half the size: LL (low-pass both ways: a smaller image) and the
details H, V, D; the next level splits LL again. Borders are periodic, so that there are exactly as many
coefficients as pixels.

| band | high-pass along | answers to | name in PyWavelets |
|---|---|---|---|
| H | height (top to bottom) | horizontal edges | cH, "da" |
| V | width (left to right) | vertical edges | cV, "ad" |
| D | both | diagonals, corners, checkerboards | cD, "dd" |

Scaling: unit DC gain. A constant image of value v has LL = v at every level, so LL stays in the range of the
pixels. Every band of level l (1 = finest) is that of `pywt.wavedec2(..., mode="periodization")` divided by
2**l: see `orthonormal_gains`. With Haar, LL is then the mean of 2**l x 2**l pixels, and the coefficients of
an image that was downsampled by area averaging are exactly the first scales of the coefficients of the full
image.

Sources: Mallat, "A theory for multiresolution signal decomposition", IEEE PAMI 11(7), 1989 (the pyramid);
Cohen, Daubechies, Feauveau, "Biorthogonal bases of compactly supported wavelets", 1992; filters and alignment
are those of PyWavelets.
"""

import difflib
import math
from collections.abc import Sequence
from functools import lru_cache

import pywt
import torch
from torch import Tensor

__all__ = ["dwt2", "idwt2", "max_levels", "orthonormal_gains"]

# On a CPU a batch goes through Haar in pieces whose intermediate results stay in the cache: of 1 to 16 MiB, 3
# was fastest (a fifth faster than the whole batch of benchmarks/dwt.py at once).
_CPU_PIECE_BYTES = 3 * 2**20


def dwt2(images: Tensor, wavelet: str = "haar", levels: int = 3) -> list[Tensor]:
    """Wavelet coefficients of a batch of images, coarsest scale first.

    Args:
        images: floating point [B, C, H, W], H and W multiples of 2**levels. Any range, any device; gradients
            flow.
        wavelet: any discrete wavelet of PyWavelets: "haar", "db2", "bior2.2" (LeGall 5/3), "bior4.4" (CDF
            9/7), ... (of "dmey", the truncated Meyer filters, the inverse is only good to about 1e-2).
        levels: number of halvings L; 0 returns `[images]`.

    Returns:
        L + 1 tensors `[approximation, details_coarsest, ..., details_finest]`. The approximation (LL) is
        [B, C, H / 2**L, W / 2**L]; the details of level l are [B, 3C, H / 2**l, W / 2**l]: H of all C
        channels, then V, then D. From pixels in [0, 1], Haar gives an approximation in [0, 1] and details in
        [-1/2, 1/2].

    Raises:
        ValueError: not a 4-D floating-point tensor, a side that is no multiple of 2**levels, too many levels,
            not a discrete wavelet.
    """
    analysis, _ = _filters(wavelet)
    _check_images(images, levels)
    approximation, details = images, []
    for _ in range(levels):
        approximation, detail = _Split.apply(approximation, analysis)
        details.append(detail)
    return [approximation, *reversed(details)]


def idwt2(coefficients: Sequence[Tensor], wavelet: str = "haar") -> Tensor:
    """Images from their wavelet coefficients: the inverse of `dwt2`.

    Args:
        coefficients: as `dwt2` returns them, coarsest first: [B, C, h, w], [B, 3C, h, w], [B, 3C, 2h, 2w],
            ... Leaving out the last n gives the image at 1 / 2**n of its size (with Haar: downsampled by
            area).
        wavelet: the one they were made with.

    Returns:
        [B, C, h * 2**L, w * 2**L] from L + 1 scales.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together, nothing at all, not a discrete
            wavelet.
    """
    _, synthesis = _filters(wavelet)
    _check_coefficients(coefficients)
    images = coefficients[0]
    for details in coefficients[1:]:
        images = _Merge.apply(images, details, synthesis)
    return images


def orthonormal_gains(levels: int) -> list[float]:
    """What each scale of `dwt2`, coarsest first, is multiplied by to have the scaling of PyWavelets.

    It is 2**l for all bands of level l, thus `[2**L, 2**L, 2**(L - 1), ..., 2]`. With it an orthogonal
    wavelet (Haar, Daubechies) keeps the sum of squares, as energies and thresholds need.
    """
    return [2.0**levels, *(2.0**level for level in range(levels, 0, -1))]


def max_levels(height: int, width: int) -> int:
    """Largest number of levels for images of this size in pixels: how often both sides halve exactly."""
    return min(_twos(height), _twos(width))


# --- One level ----------------------------------------------------------------------------------------------
# A split with kernels g is linear, its transpose the merge with the same g: each is the other's gradient.
# The inverse of a split is a merge with the synthesis kernels.

Filters = tuple[tuple[float, ...], tuple[float, ...]]  # low-pass, high-pass, as correlation kernels


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, filters):
        ctx.filters = filters
        gain = _haar_gain(filters)
        if gain is None:
            return _split(images, filters)
        return _haar_split(images, gain)

    @staticmethod
    def backward(ctx, grad_approximation, grad_details):  # pyrefly: ignore[bad-override]
        return _Merge.apply(grad_approximation, grad_details, ctx.filters), None


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, approximation, details, filters):
        ctx.filters = filters
        gain = _haar_gain(filters)
        if gain is None:
            return _merge(approximation, details, filters)
        return _haar_merge(approximation, details, gain)

    @staticmethod
    def backward(ctx, grad_images):  # pyrefly: ignore[bad-override]
        return *_Split.apply(grad_images, ctx.filters), None


def _haar_gain(filters: Filters) -> float | None:
    """Factor on the sums and differences of 2x2 pixels if these are Haar's kernels, by whatever name."""
    return round(filters[0][0] ** 2, 12) if len(filters[0]) == 2 else None


# --- Haar ---------------------------------------------------------------------------------------------------
# Sums and differences of neighbours, written straight into the results: passes over the memory are the cost.


def _haar_split(images: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """[B, C, 2h, 2w] -> gain * LL [B, C, h, w], details [B, 3C, h, w]: sums, differences of 2x2 pixels."""
    B, C, H, W = images.shape
    approximation = images.new_empty(B, C, H // 2, W // 2)
    details = images.new_empty(B, 3, C, H // 2, W // 2)
    for image, LL, bands in _pieces(images, approximation, details):
        left, right = image[..., 0::2], image[..., 1::2]
        low, high = left + right, left - right  # [b, C, 2h, w]
        if gain != 1:
            low, high = low.mul_(gain), high.mul_(gain)
        torch.add(low[..., 0::2, :], low[..., 1::2, :], out=LL)
        torch.sub(low[..., 0::2, :], low[..., 1::2, :], out=bands[:, 0])  # H
        torch.add(high[..., 0::2, :], high[..., 1::2, :], out=bands[:, 1])  # V
        torch.sub(high[..., 0::2, :], high[..., 1::2, :], out=bands[:, 2])  # D
    return approximation, details.view(B, 3 * C, H // 2, W // 2)


def _haar_merge(approximation: Tensor, details: Tensor, gain: float) -> Tensor:
    """The transpose of `_haar_split` of the same gain; with gain 1 the inverse of the split of gain 1/4."""
    B, C, h, w = approximation.shape
    images = approximation.new_empty(B, C, h, 2, 2 * w)
    for image, LL, bands in _pieces(images, approximation, details.reshape(B, 3, C, h, w)):
        horizontal, vertical, diagonal = bands.unbind(1)
        # Both columns of a pair of pixels side by side, so that the second step reads and writes whole rows.
        low, high = LL.new_empty(*LL.shape, 2), LL.new_empty(*LL.shape, 2)
        torch.add(LL, vertical, out=low[..., 0])
        torch.sub(LL, vertical, out=low[..., 1])
        torch.add(horizontal, diagonal, out=high[..., 0])
        torch.sub(horizontal, diagonal, out=high[..., 1])
        torch.add(low.flatten(-2), high.flatten(-2), out=image[..., 0, :])
        torch.sub(low.flatten(-2), high.flatten(-2), out=image[..., 1, :])
    if gain != 1:
        images.mul_(gain)
    return images.view(B, C, 2 * h, 2 * w)


def _pieces(images: Tensor, *others: Tensor):
    """The batch piece by piece on a CPU, in one elsewhere."""
    size = max(1, len(images))
    if images.device.type == "cpu" and images.numel():
        size = max(1, _CPU_PIECE_BYTES * len(images) // (images.numel() * images.element_size()))
    return zip(*(tensor.split(size) for tensor in (images, *others)), strict=True)


# --- Any other wavelet: periodised filter banks -------------------------------------------------------------
# PyWavelets' alignment, for a filter of length n as a correlation kernel g, all indices modulo the side:
# band[o] = sum_k g[k] x[2 o + k - offset], offset = n / 2 - 1. Summed tap by tap over even and odd samples:
# on a CPU four to seven times faster than torch's convolutions of one channel, and never in TF32 on a GPU.


def _split(images: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """[B, C, 2h, 2w] -> LL [B, C, h, w], details [B, 3C, h, w]."""
    B, C, H, W = images.shape
    approximation = images.new_empty(B, C, H // 2, W // 2)
    details = images.new_empty(B, 3, C, H // 2, W // 2)
    for image, LL, bands in _pieces(images, approximation, details):
        low, high = _analyse(image, -1, filters)
        for half, outputs in ((low, (LL, bands[:, 0])), (high, (bands[:, 1], bands[:, 2]))):
            for band, output in zip(_analyse(half, -2, filters), outputs, strict=True):
                output.copy_(band)
    return approximation, details.view(B, 3 * C, H // 2, W // 2)


def _merge(approximation: Tensor, details: Tensor, filters: Filters) -> Tensor:
    """The transpose of `_split` with the same filters; its inverse with the synthesis filters."""
    B, C, h, w = approximation.shape
    images = approximation.new_empty(B, C, 2 * h, 2 * w)
    for image, LL, bands in _pieces(images, approximation, details.reshape(B, 3, C, h, w)):
        low = _synthesise(LL, bands[:, 0], -2, filters)
        high = _synthesise(bands[:, 1], bands[:, 2], -2, filters)
        image.copy_(_synthesise(low, high, -1, filters))
    return images


def _analyse(x: Tensor, dim: int, filters: Filters) -> list[Tensor]:
    """Low and high band of `x` along `dim`, half as long."""
    half = x.shape[dim] // 2
    kernels, offset = _periodise(filters, 2 * half)
    before, after = (offset + 1) // 2, (len(kernels[0]) - 1 - offset) // 2
    phases = x.unflatten(dim, (half, 2)).unbind(dim)  # even samples, odd samples
    phases = [_extend(phase, dim, before, after) for phase in phases]
    bands = []
    for kernel in kernels:
        terms = []
        for k, tap in enumerate(kernel):
            shift, phase = divmod(k - offset, 2)
            terms.append((phases[phase].narrow(dim, before + shift, half), tap))
        bands.append(_weighted_sum(terms))
    return bands


def _synthesise(low: Tensor, high: Tensor, dim: int, filters: Filters) -> Tensor:
    """The transpose of `_analyse`: twice as long as the bands along `dim`."""
    half = low.shape[dim]
    kernels, offset = _periodise(filters, 2 * half)
    before, after = (len(kernels[0]) - 1 - offset) // 2, (offset + 1) // 2
    bands = [_extend(band, dim, before, after) for band in (low, high)]
    x = low.new_empty(
        [2 * side if i == low.ndim + dim else side for i, side in enumerate(low.shape)]
    )
    for phase, samples in enumerate(
        x.unflatten(dim, (half, 2)).unbind(dim)
    ):  # even samples, odd samples
        terms = []
        for band, kernel in zip(bands, kernels, strict=True):
            for k in range((phase + offset) % 2, len(kernel), 2):
                terms.append(
                    (band.narrow(dim, before + (phase + offset - k) // 2, half), kernel[k])
                )
        samples.copy_(_weighted_sum(terms))
    return x


def _extend(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """`x` continued periodically along `dim`."""
    with torch.autocast(
        x.device.type, enabled=False
    ):  # or cat changes, or on a CPU refuses, some dtypes
        return torch.cat(
            [x.narrow(dim, x.shape[dim] - before, before), x, x.narrow(dim, 0, after)], dim
        )


def _weighted_sum(terms: list[tuple[Tensor, float]]) -> Tensor:
    (first, tap), *rest = [term for term in terms if term[1] != 0]
    total = first * tap
    for x, tap in rest:
        total.add_(x, alpha=tap)
    return total


def _periodise(filters: Filters, side: int) -> tuple[list[list[float]], int]:
    """Both filters, wound round a side shorter than they are, and their offset n / 2 - 1 modulo the side."""
    offset = len(filters[0]) // 2 - 1
    if len(filters[0]) <= side:
        return [list(taps) for taps in filters], offset
    return [
        [math.fsum(taps[start::side]) for start in range(side)] for taps in filters
    ], offset % side


def _filters(wavelet: str) -> tuple[Filters, Filters]:
    """Analysis and synthesis filters of unit DC gain."""
    name = wavelet.lower() if isinstance(wavelet, str) else ""
    if name in _discrete():
        return _bank(name)
    close = difflib.get_close_matches(name, _discrete(), n=4, cutoff=0.5)
    problem = "is not the name of a discrete wavelet"
    if name in pywt.wavelist(kind="continuous"):  # pyrefly: ignore[missing-attribute]
        problem, close = "is a continuous wavelet and has no filter bank", []
    example = ", ".join(close or ["haar", "db2", "bior2.2", "bior4.4"])
    raise ValueError(
        f"{wavelet!r} {problem}: use {example} (all names: pywt.wavelist(kind='discrete'))."
    )


@lru_cache
def _discrete() -> tuple[str, ...]:
    return tuple(pywt.wavelist(kind="discrete"))  # pyrefly: ignore[missing-attribute]


@lru_cache
def _bank(name: str) -> tuple[Filters, Filters]:
    bank = pywt.Wavelet(name)  # pyrefly: ignore[missing-attribute]
    root = math.sqrt(2)
    low, high = (tuple(tap / root for tap in reversed(taps)) for taps in (bank.dec_lo, bank.dec_hi))
    low_again, high_again = (
        tuple(tap * root for tap in taps) for taps in (bank.rec_lo, bank.rec_hi)
    )
    return (low, high), (low_again, high_again)


# --- What is accepted ---------------------------------------------------------------------------------------


def _twos(side: int) -> int:
    """How often a side can be halved exactly."""
    return (side & -side).bit_length() - 1


def _check_images(images: Tensor, levels: int) -> None:
    if images.ndim != 4:
        shape = list(images.shape)
        raise ValueError(f"images must be [B, C, H, W], not {shape}: add or fold dimensions first.")
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point, not {images.dtype}: for uint8 take images.float() / 255."
        )
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 0:
        raise ValueError(f"levels must be a whole number of at least 0, not {levels!r}.")
    H, W = images.shape[2:]
    if min(H, W) == 0:
        raise ValueError(f"images of {H}x{W} pixels are empty: both sides need at least one pixel.")
    possible, most = max_levels(H, W), min(H, W).bit_length() - 1
    if levels > most:
        if possible < most:
            accepted = f"at most {possible} for this size, or {most} after cropping it to {_nearest(H, W, most)[0]}"
        else:
            accepted = f"at most {possible}, or images whose sides are multiples of 2**{levels}"
        raise ValueError(
            f"{levels} levels are too many for images of {H}x{W} pixels: use {accepted}."
        )
    if levels > possible:
        sizes = " or ".join(_nearest(H, W, levels))
        fewer = f"at most {possible} levels" if possible else "no levels"
        raise ValueError(
            f"{levels} levels need sides that are multiples of {2**levels}, and {H}x{W} pixels are not: "
            f"crop or resize the images to {sizes}, or use {fewer}."
        )


def _nearest(height: int, width: int, levels: int) -> list[str]:
    """The next smaller and the next larger size that so many levels divide."""
    step = 2**levels
    smaller = f"{height // step * step}x{width // step * step}"
    larger = f"{-(-height // step) * step}x{-(-width // step) * step}"
    return [smaller, larger]


def _check_coefficients(coefficients: Sequence[Tensor]) -> None:
    if isinstance(coefficients, Tensor) or len(coefficients) == 0:
        raise ValueError(
            "coefficients must be a list [approximation, details_coarsest, ..., details_finest]."
        )
    first = coefficients[0]
    if first.ndim != 4 or not first.is_floating_point():
        found = f"{first.dtype} {list(first.shape)}"
        raise ValueError(f"the approximation must be floating point [B, C, h, w], not {found}.")
    B, C, h, w = first.shape
    for level, details in enumerate(coefficients[1:]):
        name, expected = f"scale {level + 2}", [B, 3 * C, h << level, w << level]
        if list(details.shape) != expected:
            raise ValueError(
                f"{name} must be {expected} to go with an approximation of {[B, C, h, w]}, not "
                f"{list(details.shape)}: pass the scales coarsest first and without a gap."
            )
        if (details.dtype, details.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {details.dtype} on {details.device} but the approximation {first.dtype} on "
                f"{first.device}: convert one of them."
            )
