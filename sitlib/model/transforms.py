"""Transforms that SIT is compared with: an average-pooling pyramid, raster blocks, local wavelets.

Each replaces the DWT of `SpectralGeometry` and is exactly invertible.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.patchify import TRANSFORMS, SpectralGeometry


class PyramidGeometry(SpectralGeometry):
    """Laplacian pyramid (Burt and Adelson, 1983): scales without wavelets.

    Scale 1 is the averaged image; a later one is the image averaged to its size minus the enlarged
    scale before. There are a third more values than pixels.
    """

    def scale_channels(self, scale: int) -> int:
        return self.channels

    def scale_size(self, scale: int) -> int:
        return self.size >> (self.levels - scale + 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        averaged = [images]
        for _ in range(self.levels):
            averaged.insert(0, F.avg_pool2d(averaged[0], 2))
        pairs = zip(averaged[:-1], averaged[1:], strict=True)
        return [averaged[0], *(large - _enlarge(small) for small, large in pairs)]

    def inverse(self, maps: list[Tensor]) -> Tensor:
        image = maps[0]
        for detail in maps[1:]:
            image = _enlarge(image) + detail
        return image


def _enlarge(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


class RasterGeometry(SpectralGeometry):
    """No scales: pixel patches in raster order, cut into S stripes of as many tokens as a scale.

    Separates what block-causal attention and typed parameters bring from what wavelets bring.
    """

    def __init__(self, size: int, levels: int, grid_size: int, wavelet: str = "haar"):
        super().__init__(size, levels, grid_size, wavelet)
        self.columns = math.isqrt(self.num_tokens)  # whole, as the configuration asks for 3 levels
        self.rows = self.tokens_per_scale // self.columns  # of patches in a stripe

    def scale_channels(self, scale: int) -> int:
        return self.channels

    def patch_size(self, scale: int) -> int:
        return self.size // self.columns

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] -> S stripes [B, 3, H / S, H], the top one first."""
        return list(images.chunk(self.num_scales, dim=2))

    def inverse(self, maps: list[Tensor]) -> Tensor:
        """The first k stripes give the upper k / S of the image."""
        return torch.cat(maps, dim=2)


# --- Wavelets of single patches by lifting --------------------------------------------------------
# A filter longer than two taps reaches over the border of a patch, so that a token also depends on
# its neighbors' pixels. Lifting takes the mirrored sample there, as JPEG 2000 does at the border
# of a tile (ISO/IEC 15444-1, annex F): nothing leaks, and the number of values stays.

# Alternating steps: odd samples change by the factor times the sum of their neighbors, then even.
LIFTING_STEPS = {
    "haar": (),  # two taps: no neighbors
    "bior2.2": (-0.5, 0.25),  # LeGall 5/3
    "bior4.4": (-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971),
}
CDF97_LOW_GAIN = 1.230174104914001  # of the low band after the four steps


class LocalWaveletGeometry(SpectralGeometry):
    """Wavelets of LIFTING_STEPS, of the part of the image that each token covers by itself."""

    def forward(self, images: Tensor) -> list[Tensor]:
        LL, details = self._to_patches(images), []
        for _ in range(self.levels):
            low, high = _split(LL, -1, self.wavelet)
            (LL, H), (V, D) = (_split(x, -3, self.wavelet) for x in (low, high))
            details.append(torch.cat([_to_map(band) for band in (H, V, D)], dim=1))
        return [_to_map(LL), *reversed(details)]

    def inverse(self, maps: list[Tensor]) -> Tensor:
        LL = self._to_patches(maps[0])
        for details in maps[1:]:
            H, V, D = (self._to_patches(band) for band in details.chunk(3, dim=1))
            low, high = _merge(LL, H, -3, self.wavelet), _merge(V, D, -3, self.wavelet)
            LL = _merge(low, high, -1, self.wavelet)
        return _to_map(LL)

    def _to_patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, g, h, g, w]: rows of a patch at dimension -3, columns at -1."""
        return x.unflatten(3, (self.grid_size, -1)).unflatten(2, (self.grid_size, -1))


def _to_map(patches: Tensor) -> Tensor:
    return patches.flatten(4, 5).flatten(2, 3)


def _split(x: Tensor, dim: int, wavelet: str) -> tuple[Tensor, Tensor]:
    """Low and high band along `dim`, half as long, of unit DC gain."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    if wavelet == "haar":
        return (even + odd) / 2, (even - odd) / 2
    for step, factor in enumerate(LIFTING_STEPS[wavelet]):
        if step % 2 == 0:
            odd = odd + factor * (even + _shift(even, dim, 1))
        else:
            even = even + factor * (odd + _shift(odd, dim, -1))
    gain = CDF97_LOW_GAIN if wavelet == "bior4.4" else 1.0
    return even / gain, odd * (gain / 2)


def _merge(low: Tensor, high: Tensor, dim: int, wavelet: str) -> Tensor:
    """The inverse of `_split`: the same steps backwards."""
    if wavelet == "haar":
        even, odd = low + high, low - high
    else:
        gain = CDF97_LOW_GAIN if wavelet == "bior4.4" else 1.0
        even, odd = low * gain, high / (gain / 2)
        for step, factor in reversed(list(enumerate(LIFTING_STEPS[wavelet]))):
            if step % 2 == 0:
                odd = odd - factor * (even + _shift(even, dim, 1))
            else:
                even = even - factor * (odd + _shift(odd, dim, -1))
    at = dim % even.ndim + 1
    return torch.stack([even, odd], at).flatten(at - 1, at)


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """The next (by = 1) or previous (-1) samples; at the border the nearest, its mirror image."""
    length = x.shape[dim]
    index = torch.arange(by, length + by, device=x.device).clamp(0, length - 1)
    return x.index_select(dim, index)


TRANSFORMS |= {
    "local_wavelet": LocalWaveletGeometry,
    "pyramid": PyramidGeometry,
    "raster": RasterGeometry,
}
