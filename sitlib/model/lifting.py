"""Wavelet transforms of single patches by lifting, mirrored at the borders of the patch.

A filter bank that is longer than two taps reaches over the border of a patch, and the coefficients of a token then depend on pixels of
its neighbours. Lifting computes the same symmetric wavelets in place, and where a step would reach over the border it takes the mirrored
sample instead, as JPEG 2000 does at the border of a tile (ISO/IEC 15444-1, annex F). Nothing is added and nothing leaks.
Scaling: unit DC gain of the low band, as in `sitlib.model.wavelets`. Knows nothing of tokens.
"""

import torch
from torch import Tensor

# Alternating steps: odd samples change by the sum of their two neighbours times the factor, then even samples, and so on.
LIFTING_STEPS = {
    "haar": (),  # two taps: no neighbours
    "bior2.2": (-0.5, 0.25),  # LeGall 5/3
    "bior4.4": (
        -1.586134342059924,
        -0.052980118572961,
        0.882911075530934,
        0.443506852043971,
    ),  # CDF 9/7
}
CDF97_LOW_GAIN = 1.230174104914001  # of the low band after the four steps


def patch_dwt2(images: Tensor, wavelet: str, levels: int, grid: int) -> list[Tensor]:
    """Coefficients as `sitlib.model.wavelets.dwt2` returns them, of grid x grid patches that are each transformed alone.

    Args:
        images: [B, C, H, H], H a multiple of grid * 2^levels.
        wavelet: one of LIFTING_STEPS.
    """
    approximation, details = _patches(images, grid), []
    for _ in range(levels):
        low, high = _split(approximation, -1, wavelet)
        (approximation, horizontal), (vertical, diagonal) = (
            _split(x, -3, wavelet) for x in (low, high)
        )
        details.append([horizontal, vertical, diagonal])
    maps = [_image(approximation)]
    maps += [torch.cat([_image(band) for band in bands], dim=1) for bands in reversed(details)]
    return maps


def patch_idwt2(coefficients: list[Tensor], wavelet: str, grid: int) -> Tensor:
    """The inverse of `patch_dwt2`; leaving out the last n scales gives the image at 1 / 2^n of its side."""
    approximation = _patches(coefficients[0], grid)
    for details in coefficients[1:]:
        horizontal, vertical, diagonal = (_patches(band, grid) for band in details.chunk(3, dim=1))
        low = _merge(approximation, horizontal, -3, wavelet)
        high = _merge(vertical, diagonal, -3, wavelet)
        approximation = _merge(low, high, -1, wavelet)
    return _image(approximation)


def _patches(x: Tensor, grid: int) -> Tensor:
    """[B, C, H, W] -> [B, C, grid, h, grid, w]: rows of a patch at dimension -3, columns at -1."""
    return x.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))


def _image(patches: Tensor) -> Tensor:
    return patches.flatten(4, 5).flatten(2, 3)


def _split(x: Tensor, dim: int, wavelet: str) -> tuple[Tensor, Tensor]:
    """Low and high band along `dim`, half as long."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    if wavelet == "haar":
        return (even + odd) / 2, (even - odd) / 2
    for number, factor in enumerate(LIFTING_STEPS[wavelet]):
        if number % 2 == 0:
            odd = odd + factor * (even + _shifted(even, dim, 1))
        else:
            even = even + factor * (odd + _shifted(odd, dim, -1))
    gain = CDF97_LOW_GAIN if wavelet == "bior4.4" else 1.0
    return even / gain, odd * (gain / 2)


def _merge(low: Tensor, high: Tensor, dim: int, wavelet: str) -> Tensor:
    """The inverse of `_split`."""
    if wavelet == "haar":
        even, odd = low + high, low - high
    else:
        gain = CDF97_LOW_GAIN if wavelet == "bior4.4" else 1.0
        even, odd = low * gain, high / (gain / 2)
        for number, factor in reversed(list(enumerate(LIFTING_STEPS[wavelet]))):
            if number % 2 == 0:
                odd = odd - factor * (even + _shifted(even, dim, 1))
            else:
                even = even - factor * (odd + _shifted(odd, dim, -1))
    position = dim % even.ndim + 1
    return torch.stack([even, odd], position).flatten(position - 1, position)


def _shifted(x: Tensor, dim: int, by: int) -> Tensor:
    """The next (by = 1) or the previous (-1) sample along `dim`, the last or first one again where there is none.

    Even and odd samples lie on alternate positions, so the mirror image of a neighbour beyond the border is the nearest one inside.
    """
    length = x.shape[dim]
    index = [min(max(i + by, 0), length - 1) for i in range(length)]
    return x[(slice(None),) * (dim % x.ndim) + (index,)]
