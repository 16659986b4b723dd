"""Transforms that SIT is compared with: pyramids, lifted and local wavelets, raster blocks.

Each replaces the DWT of `SpectralGeometry` and is exactly invertible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.patchify import TRANSFORMS, SpectralGeometry, patchify, unpatchify
from sitlib.model.wavelets import haar, inverse_haar


class PyramidGeometry(SpectralGeometry):
    """Laplacian pyramid (Burt and Adelson, 1983): scales without wavelets.

    Scale 1 is the averaged image; a later one is the image averaged to its size minus the enlarged
    scale before. There are a third more values than pixels.
    """

    def scale_channels(self, scale: int) -> int:
        return self.channels

    def scale_size(self, scale: int) -> int:
        return self.size >> (self.levels - scale + 1)

    def enlarge(self, images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        averaged = [images]
        for _ in range(self.levels):
            averaged.insert(0, F.avg_pool2d(averaged[0], 2))
        pairs = zip(averaged[:-1], averaged[1:], strict=True)
        return [averaged[0], *(large - self.enlarge(small) for small, large in pairs)]

    def inverse(self, maps: list[Tensor]) -> Tensor:
        image = maps[0]
        for detail in maps[1:]:
            image = self.enlarge(image) + detail
        return image


class NearestPyramidGeometry(PyramidGeometry):
    """The pyramid with pixels repeated: as redundant, and enlarged as in Haar's synthesis."""

    def enlarge(self, images: Tensor) -> Tensor:
        return F.interpolate(images, scale_factor=2, mode="nearest")


class LiftedWaveletGeometry(PyramidGeometry):
    """Haar with a lifting step (Sweldens, 1996): the pyramid without its redundancy.

    Details are less those of the enlarged approximation, which predicts them. There are as many
    values as pixels, and the first scales give averaged images, as with Haar itself.
    """

    scale_channels, scale_size = SpectralGeometry.scale_channels, SpectralGeometry.scale_size

    def forward(self, images: Tensor) -> list[Tensor]:
        LL, *differences = super().forward(images)
        return [LL, *(haar(x)[1] for x in differences)]

    def inverse(self, maps: list[Tensor]) -> Tensor:
        image = maps[0]
        for detail in maps[1:]:
            image = inverse_haar(image, detail + haar(self.enlarge(image))[1])
        return image


class RasterGeometry(SpectralGeometry):
    """Pixel patches in raster order: four stripes are runs of one scale and share its modules."""

    def __init__(self, size: int, levels: int, grid_size: int, wavelet: str = "haar", grids=None):
        super().__init__(size, 0, grid_size, wavelet, [2 * grid_size])


# A wavelet's filters reach over the border of a patch, so that a token also depends on its
# neighbors' pixels. Lifting takes the mirrored sample there, as JPEG 2000 does at the border of a
# tile (ISO/IEC 15444-1, annex F): nothing leaks, and the number of values stays. Odd samples change
# by the first factor times the sum of their neighbors, then even ones by the second, and so on; the
# last number is the gain of the low band.
LIFTING = {
    "bior2.2": ((-0.5, 0.25), 1.0),  # LeGall 5/3
    "bior4.4": (  # CDF 9/7
        (-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971),
        1.230174104914001,
    ),
}


class LocalWaveletGeometry(SpectralGeometry):
    """Wavelets of LIFTING, of the part of the image that each token covers by itself."""

    def forward(self, images: Tensor) -> list[Tensor]:
        LL, details = self._cut(images), []
        for _ in range(self.levels):
            low, high = self._split(LL, -1)
            (LL, H), (V, D) = self._split(low, -2), self._split(high, -2)
            details.append(torch.cat([H, V, D], dim=1))
        return [self._join(x) for x in (LL, *reversed(details))]

    def inverse(self, maps: list[Tensor]) -> Tensor:
        LL, *details = (self._cut(x) for x in maps)
        for H, V, D in (x.chunk(3, dim=1) for x in details):
            LL = self._merge(self._merge(LL, H, -2), self._merge(V, D, -2), -1)
        return self._join(LL)

    def _cut(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the part of every token: [B N, C, h, w]."""
        side = x.shape[3] // self.grid_size
        return patchify(x, side).unflatten(2, (-1, side, side)).flatten(0, 1)

    def _join(self, parts: Tensor) -> Tensor:
        patches = parts.flatten(1).unflatten(0, (-1, self.tokens_per_scale))
        return unpatchify(patches, parts.shape[3], self.grid_size)

    def _split(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Low and high band along `dim`, half as long, of unit DC gain."""
        factors, gain = LIFTING[self.wavelet]
        even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
        even, odd = _lift(even, odd, dim, list(enumerate(factors)))
        return even / gain, odd * (gain / 2)

    def _merge(self, low: Tensor, high: Tensor, dim: int) -> Tensor:
        """The inverse of `_split`: the same steps backwards, with the other sign."""
        factors, gain = LIFTING[self.wavelet]
        steps = [(number, -factor) for number, factor in enumerate(factors)]
        even, odd = _lift(low * gain, high / (gain / 2), dim, steps[::-1])
        return torch.stack([even, odd], dim).flatten(dim - 1, dim)


def _lift(
    even: Tensor, odd: Tensor, dim: int, steps: list[tuple[int, float]]
) -> tuple[Tensor, Tensor]:
    last = even.shape[dim] - 1
    here = torch.arange(last + 1, device=even.device)
    after, before = (here + 1).clamp(max=last), (here - 1).clamp(min=0)  # mirrored at the border
    for number, factor in steps:
        if number % 2 == 0:
            odd = odd + factor * (even + even.index_select(dim, after))
        else:
            even = even + factor * (odd + odd.index_select(dim, before))
    return even, odd


TRANSFORMS |= {
    "lifted_wavelet": LiftedWaveletGeometry,
    "local_wavelet": LocalWaveletGeometry,
    "pyramid": PyramidGeometry,
    "pyramid_nearest": NearestPyramidGeometry,
    "raster": RasterGeometry,
}
