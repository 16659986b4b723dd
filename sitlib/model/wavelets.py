"""Discrete wavelet transform of image batches: Haar first, any wavelet of PyWavelets below.

One level splits an image into LL, a half-size image, and the details H, V, D; the next level
splits LL again (Mallat, IEEE PAMI 11(7), 1989). Borders are periodic: as many values as pixels.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import pywt
import torch
from torch import Tensor


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One Haar level: [B, C, 2h, 2w] -> LL [B, C, h, w], details [B, 3C, h, w].

    LL is the mean of 2x2 pixels. H answers to horizontal edges, V to vertical
    ones, D to diagonals; each is given for all channels before the next.
    """
    left, right = x[..., 0::2], x[..., 1::2]
    low, high = 0.25 * (left + right), 0.25 * (left - right)  # along rows: [B, C, 2h, w]
    low_top, low_bottom = low[..., 0::2, :], low[..., 1::2, :]
    high_top, high_bottom = high[..., 0::2, :], high[..., 1::2, :]
    H, V, D = low_top - low_bottom, high_top + high_bottom, high_top - high_bottom
    return low_top + low_bottom, torch.cat([H, V, D], dim=1)


def inverse_haar(LL: Tensor, details: Tensor) -> Tensor:
    """LL [B, C, h, w], details [B, 3C, h, w] -> [B, C, 2h, 2w]; inverts `haar`."""
    H, V, D = details.chunk(3, dim=1)
    low = torch.stack([LL + V, LL - V], dim=-1).flatten(-2)  # columns interleaved: [B, C, h, 2w]
    high = torch.stack([H + D, H - D], dim=-1).flatten(-2)
    return torch.stack([low + high, low - high], dim=-2).flatten(-3, -2)  # then rows


def dwt2(images: Tensor, wavelet: str = "haar", levels: int = 3) -> list[Tensor]:
    """Wavelet coefficients of images [B, C, H, W], coarsest scale first; differentiable.

    LL [B, C, H / 2^L, W / 2^L], then details [B, 3C, H / 2^l, W / 2^l] of levels l = L ... 1: H of
    all channels, then V, then D. H and W are multiples of 2^L. The DC gain is 1, so LL keeps the
    range of the pixels; PyWavelets' values are larger by `orthonormal_gains`. With Haar, an image
    downsampled by area has exactly the first scales. "dmey" is inverted to about 1e-2 only.
    """
    analysis, _ = filters_of(wavelet)
    check_images(images)
    H, W = images.shape[2:]
    if not isinstance(levels, Integral) or not 0 <= levels <= max_levels(H, W):
        raise ValueError(
            f"{levels!r} levels of {H}x{W} px: sides must be multiples of 2^levels, here at most "
            f"{max_levels(H, W)} levels; crop or resize the images, or use fewer."
        )
    LL, details = _at_least_float32(images), []
    with torch.autocast(images.device.type, enabled=False):  # keep the dtype of the images
        for _ in range(levels):
            LL, detail = _split(LL, analysis)
            details.append(detail)
    return [x.to(images.dtype) for x in (LL, *reversed(details))]


def idwt2(coefficients: Sequence[Tensor], wavelet: str = "haar") -> Tensor:
    """Images [B, C, 2^L h, 2^L w] from `dwt2`'s L + 1 scales, coarsest first: its inverse.

    The first k scales alone give a smaller image; with Haar, the image downsampled by area.
    """
    _, synthesis = filters_of(wavelet)
    if isinstance(coefficients, Tensor) or len(coefficients) == 0:
        raise ValueError("coefficients must be a list [LL, details_coarsest, ..., details_finest].")
    LL, *details = coefficients
    check_images(LL, name="LL")
    B, C, h, w = LL.shape
    for level, x in enumerate(details):
        needed = (B, 3 * C, h << level, w << level), LL.dtype, LL.device
        if (given := ((*x.shape,), x.dtype, x.device)) != needed:
            raise ValueError(
                f"scale {level + 2} must be {needed} to go with LL, not {given}: pass the scales "
                "coarsest first and without a gap."
            )
    images = _at_least_float32(LL)
    with torch.autocast(images.device.type, enabled=False):
        for x in details:
            images = _merge(images, _at_least_float32(x), synthesis)
    return images.to(LL.dtype)


def orthonormal_gains(levels: int) -> list[float]:
    """Factors [2^L, 2^L, 2^(L-1), ..., 2] with which orthogonal wavelets keep sums of squares."""
    return [2.0**levels, *(2.0**level for level in range(levels, 0, -1))]


def max_levels(height: int, width: int) -> int:
    """Largest number of levels for images of this size: how often both sides halve exactly."""
    return min((side & -side).bit_length() - 1 for side in (height, width))


def check_images(images: Any, channels: int | None = None, name: str = "images") -> None:
    """Raise ValueError unless the argument is a floating point tensor [B, channels, H, W]."""
    is_tensor = isinstance(images, Tensor)
    is_batch = is_tensor and images.ndim == 4 and images.is_floating_point()
    if not is_batch or channels not in (None, images.shape[1]):
        kind = f"{images.dtype} {list(images.shape)}" if is_tensor else type(images).__name__
        raise ValueError(
            f"{name} must be a floating point tensor [B, {channels or 'C'}, H, W], not {kind}: of "
            "a NumPy array take torch.from_numpy, of uint8 images.float() / 255."
        )


def _at_least_float32(x: Tensor) -> Tensor:
    """Half precision would round, and overflow, in every sum: it is rounded once, at the end."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- One level of any filter bank -----------------------------------------------------------------

Filters = tuple[tuple[float, ...], tuple[float, ...]]  # low-pass, high-pass


def filters_of(wavelet: str) -> tuple[Filters, Filters]:
    """Analysis and synthesis kernels of unit DC gain."""
    name = str(wavelet).lower()
    if name not in pywt.wavelist(kind="discrete"):  # pyrefly: ignore[missing-attribute]
        raise ValueError(
            f"{wavelet!r} is not a discrete wavelet: use haar, db2, bior2.2, bior4.4 or another of "
            "pywt.wavelist(kind='discrete')."
        )
    bank, root = pywt.Wavelet(name), math.sqrt(2)  # pyrefly: ignore[missing-attribute]
    low, high = (tuple(tap / root for tap in reversed(taps)) for taps in (bank.dec_lo, bank.dec_hi))
    synthesis = tuple(tap * root for tap in bank.rec_lo), tuple(tap * root for tap in bank.rec_hi)
    return (low, high), synthesis


# PyWavelets cannot be traced. `torch.compiler.assume_constant_result` says the same, and imports
# the compiler, for which every command would wait a second.
filters_of._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]


def _split(x: Tensor, filters: Filters) -> tuple[Tensor, Tensor]:
    """[B, C, 2h, 2w] -> LL [B, C, h, w], details [B, 3C, h, w]."""
    if len(filters[0]) == 2:  # Haar, by whatever name
        return haar(x)
    low, high = _analyze(x, -1, filters)
    (LL, H), (V, D) = _analyze(low, -2, filters), _analyze(high, -2, filters)
    return LL, torch.cat([H, V, D], dim=1)


def _merge(LL: Tensor, details: Tensor, filters: Filters) -> Tensor:
    """The inverse of `_split`, given the synthesis filters."""
    if len(filters[0]) == 2:
        return inverse_haar(LL, details)
    H, V, D = details.chunk(3, dim=1)
    low, high = _synthesize(LL, H, -2, filters), _synthesize(V, D, -2, filters)
    return _synthesize(low, high, -1, filters)


# PyWavelets' alignment, for a kernel g of length n, all indices modulo the side:
# band[o] = sum_k g[k] x[2 o + k - offset], offset = n / 2 - 1. Summed tap by tap over even and odd
# samples: on a CPU 4 to 7 times faster than torch's convolutions, and never in TF32 on a GPU.


def _analyze(x: Tensor, dim: int, filters: Filters) -> list[Tensor]:
    """Low and high band of `x` along `dim`, half as long."""
    half = x.shape[dim] // 2
    kernels, offset = _periodize(filters, 2 * half)
    before, after = (offset + 1) // 2, (len(kernels[0]) - 1 - offset) // 2
    phases = x.unflatten(dim, (half, 2)).unbind(dim)
    even_odd = [_wrap(phase, dim, before, after) for phase in phases]

    def samples(k: int) -> Tensor:  # x[2 o + k - offset] of all o
        shift, phase = divmod(k - offset, 2)
        return even_odd[phase].narrow(dim, before + shift, half)

    return [_weighted_sum([(samples(k), tap) for k, tap in enumerate(taps)]) for taps in kernels]


def _synthesize(low: Tensor, high: Tensor, dim: int, filters: Filters) -> Tensor:
    """The transpose of `_analyze` with the same kernels: twice as long as the bands along `dim`."""
    half = low.shape[dim]
    kernels, offset = _periodize(filters, 2 * half)
    before, after = (len(kernels[0]) - 1 - offset) // 2, (offset + 1) // 2
    bands = [_wrap(band, dim, before, after) for band in (low, high)]
    even_odd = []
    for phase in (0, 1):
        first = (phase + offset) % 2  # only every second tap meets samples of this phase
        terms = [
            (band.narrow(dim, before + (phase + offset - k) // 2, half), kernel[k])
            for band, kernel in zip(bands, kernels, strict=True)
            for k in range(first, len(kernel), 2)
        ]
        even_odd.append(_weighted_sum(terms))
    return torch.stack(even_odd, dim).flatten(dim - 1, dim)


def _wrap(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """`x` continued periodically along `dim`."""
    last, first = x.narrow(dim, x.shape[dim] - before, before), x.narrow(dim, 0, after)
    return torch.cat([last, x, first], dim)


def _weighted_sum(terms: list[tuple[Tensor, float]]) -> Tensor:
    (first, tap), *rest = [term for term in terms if term[1] != 0]
    total = first * tap
    for x, tap in rest:
        total = total.add(x, alpha=tap)
    return total


def _periodize(filters: Filters, side: int) -> tuple[list[list[float]], int]:
    """Both kernels, wrapped around a side shorter than they are, and their offset modulo it."""
    length = len(filters[0])
    wrapped = [[math.fsum(taps[i::side]) for i in range(min(length, side))] for taps in filters]
    return wrapped, (length // 2 - 1) % side
