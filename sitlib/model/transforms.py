"""How an image is taken apart into scales and put together again, and which values of a scale make up a token.

The model's way is the wavelet transform. The others are what it is compared with: an average-pooling pyramid, which has scales but no
wavelets, and blocks of raster-scan patches, which have neither. All are exactly invertible. Knows nothing of learning.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sitlib.model.lifting import patch_dwt2, patch_idwt2
from sitlib.model.patchify import SpectralGeometry
from sitlib.model.wavelets import dwt2, idwt2

Transform = Literal["wavelet", "pyramid", "raster"]


class WaveletScales(SpectralGeometry):
    """Scales of a discrete wavelet transform (SIT, arXiv 2412.09607, section 4).

    Args:
        wavelet: any discrete wavelet of PyWavelets; with `patch_local` one that `sitlib.model.lifting` has.
        patch_local: transform the part of the image that a token stands for by itself, mirrored at its borders, so that no coefficient
            depends on the pixels of another token however long the filters are.
    """

    def __init__(
        self, size: int, levels: int, grid: int, wavelet: str = "haar", patch_local: bool = False
    ):
        super().__init__(size, levels, grid)
        self.wavelet, self.patch_local = wavelet, patch_local

    def split(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] -> one map [B, C_s, h_s, h_s] for every scale, coarsest first."""
        if self.patch_local:
            return patch_dwt2(images, self.wavelet, self.levels, self.grid)
        return dwt2(images, self.wavelet, self.levels)

    def merge(self, maps: list[Tensor]) -> Tensor:
        """The inverse; the first k maps give an image of 1 / 2^(S - k) of the side."""
        if self.patch_local:
            return patch_idwt2(maps, self.wavelet, self.grid)
        return idwt2(maps, self.wavelet)


class PyramidScales(SpectralGeometry):
    """Scales without wavelets: the averaged image, then what every doubling of its side adds (Burt and Adelson's pyramid, 1983).

    A scale is the image averaged to its size minus the enlarged one of the scale before (bilinear), so there are a third more values
    than pixels. Everything else is as with wavelets: equal grids, and the first k scales are the image of 1 / 2^(S - k) of the side.
    """

    def scale_channels(self, scale: int) -> int:
        return self.channels

    def scale_size(self, scale: int) -> int:
        return self.size >> (self.levels - scale + 1)

    def split(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] -> [B, 3, h_s, h_s] for every scale, coarsest first."""
        averaged = [images]
        for _ in range(self.levels):
            averaged.append(F.avg_pool2d(averaged[-1], 2))
        averaged.reverse()
        details = [
            large - _doubled(small)
            for small, large in zip(averaged[:-1], averaged[1:], strict=True)
        ]
        return [averaged[0], *details]

    def merge(self, maps: list[Tensor]) -> Tensor:
        """The inverse; the first k maps give an image of 1 / 2^(S - k) of the side."""
        image = maps[0]
        for detail in maps[1:]:
            image = _doubled(image) + detail
        return image


class RasterBlocks(SpectralGeometry):
    """No scales at all: pixel patches in raster order, cut into S runs of grid^2 tokens, as many as the model with scales has.

    What a "scale" is to the model with scales is here a horizontal stripe, so that attention from block to block and parameters of
    their own for the first block can be had without a transform.
    """

    def __init__(self, size: int, levels: int, grid: int):
        super().__init__(size, levels, grid)
        self.tokens_per_side = round(self.num_tokens**0.5)
        if (
            self.tokens_per_side**2 != self.num_tokens
            or self.tokens_per_scale % self.tokens_per_side
            or size % self.tokens_per_side
        ):
            raise ValueError(
                f"{self.num_tokens} raster tokens cannot tile a square in {self.num_scales} stripes of whole rows: use 3 levels."
            )

    def scale_channels(self, scale: int) -> int:
        return self.channels

    def patch_size(self, scale: int) -> int:
        return self.size // self.tokens_per_side

    def split(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] -> S stripes [B, 3, H / S, H], the top one first."""
        return list(images.chunk(self.num_scales, dim=2))

    def merge(self, maps: list[Tensor]) -> Tensor:
        """The inverse; the first k stripes give the upper k / S of the image."""
        return torch.cat(maps, dim=2)

    def patchify(self, coefficients: list[Tensor]) -> list[Tensor]:
        """Stripes [B, 3, H / S, H] -> token values [B, N, V] each, row-major."""
        patch = self.patch_size(1)
        return [F.unfold(x, patch, stride=patch).transpose(1, 2) for x in coefficients]

    def unpatchify(self, values: list[Tensor]) -> list[Tensor]:
        """Inverse of `patchify`."""
        patch, shape = self.patch_size(1), (self.size // self.num_scales, self.size)
        return [F.fold(x.transpose(1, 2), shape, patch, stride=patch) for x in values]


Decomposition = WaveletScales | PyramidScales | RasterBlocks


def decomposition(
    transform: Transform, size: int, levels: int, grid: int, wavelet: str, patch_local: bool
) -> Decomposition:
    """The decomposition of images of `size` px that a configuration asks for."""
    if transform == "pyramid":
        return PyramidScales(size, levels, grid)
    if transform == "raster":
        return RasterBlocks(size, levels, grid)
    return WaveletScales(size, levels, grid, wavelet, patch_local)


def _doubled(images: Tensor) -> Tensor:
    return F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
