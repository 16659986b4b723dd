"""Transforms that SIT is compared with: pyramids, and wavelets with a lifting step.

Each replaces the DWT of `SpectralGeometry` and is exactly invertible.
"""

import torch.nn.functional as F
from torch import Tensor

from sitlib.model.patchify import SpectralGeometry
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


# TokenizerConfig.transform -> class.
TRANSFORMS: dict[str, type[SpectralGeometry]] = {
    "wavelet": SpectralGeometry,
    "lifted_wavelet": LiftedWaveletGeometry,
    "pyramid": PyramidGeometry,
    "pyramid_nearest": NearestPyramidGeometry,
}
