"""Geometry of spectral tokens: which coefficients make up which token (SIT, arXiv 2412.09607, section 4).

An L-level DWT gives S = L + 1 scales: scale 1 is the approximation, scales 2 ... S the details, coarsest first. Every scale is cut into
the same grid x grid patches, N = grid^2 tokens, so a patch covers the same part of the picture at every scale and holds 4 times the
values from one detail scale to the next. Zero levels give ViT-VQGAN's pixel patches. Knows nothing of learning.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpectralGeometry:
    """Scales and patches of images of `size` x `size` px.

    Args:
        size: side of the image, px; a multiple of grid * 2^levels.
        levels: DWT levels L.
        grid: tokens per side of every scale.
        channels: colour channels.
    """

    size: int
    levels: int
    grid: int
    channels: int = 3

    def __post_init__(self):
        unit = self.grid * 2**self.levels
        if self.size <= 0 or self.size % unit:
            lower = max(self.size // unit, 1) * unit
            raise ValueError(
                f"{self.size} px cannot be cut into {self.grid}x{self.grid} tokens at each of {self.levels + 1} scales: "
                f"sizes must be multiples of {unit}, for example {lower} or {lower + unit}."
            )

    @property
    def num_scales(self) -> int:
        return self.levels + 1

    @property
    def tokens_per_scale(self) -> int:
        return self.grid**2

    @property
    def num_tokens(self) -> int:
        return self.num_scales * self.tokens_per_scale

    def scale_channels(self, scale: int) -> int:
        """Channels of a scale's coefficients: colours for the approximation, three bands of them for details."""
        return self.channels if scale == 1 else 3 * self.channels

    def scale_size(self, scale: int) -> int:
        """Side of a scale's coefficient map, px; details of scale 2 are as large as the approximation."""
        return self.size >> (self.levels - max(scale - 2, 0))

    def patch_size(self, scale: int) -> int:
        """Side of a token's patch in the coefficient map of `scale`."""
        return self.scale_size(scale) // self.grid

    def patch_dim(self, scale: int) -> int:
        """Coefficients in one token: 12, 36, 144, 576 for SIT-4 at 256 px with a grid of 16."""
        return self.scale_channels(scale) * self.patch_size(scale) ** 2

    @property
    def scales(self) -> range:
        return range(1, self.num_scales + 1)

    def patchify(self, coefficients: list[Tensor]) -> list[Tensor]:
        """Cuts coefficients [B, C_s, h_s, w_s], coarsest first, into token values [B, N, V_s], row-major.

        Raises:
            ValueError: a coefficient map has another shape than this geometry's.
        """
        values = []
        for scale, x_BCHW in zip(self.scales, coefficients, strict=True):
            batch, channels, height, width = x_BCHW.shape
            side, patch = self.scale_size(scale), self.patch_size(scale)
            if (channels, height, width) != (self.scale_channels(scale), side, side):
                raise ValueError(
                    f"scale {scale} must be [B, {self.scale_channels(scale)}, {side}, {side}] for {self.size} px images, "
                    f"it is {list(x_BCHW.shape)}."
                )
            x = x_BCHW.reshape(batch, channels, self.grid, patch, self.grid, patch)
            values.append(
                x.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.grid**2, self.patch_dim(scale))
            )
        return values

    def unpatchify(self, values: list[Tensor]) -> list[Tensor]:
        """Inverse of `patchify`: [B, N, V_s] for every scale -> [B, C_s, h_s, w_s]. A prefix of the scales may be given."""
        coefficients = []
        for scale, x_BNV in zip(self.scales, values, strict=False):
            patch, side = self.patch_size(scale), self.scale_size(scale)
            batch, channels = len(x_BNV), self.scale_channels(scale)
            x = x_BNV.reshape(batch, self.grid, self.grid, channels, patch, patch)
            coefficients.append(x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side, side))
        return coefficients


def band_statistics(coefficients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and standard deviation of every channel of every scale, over batch and space: two lists of [C_s, 1, 1]."""
    means = [x.mean(dim=(0, 2, 3), keepdim=True)[0] for x in coefficients]
    deviations = [
        x.std(dim=(0, 2, 3), keepdim=True)[0].clamp_min(torch.finfo(x.dtype).eps)
        for x in coefficients
    ]
    return means, deviations
