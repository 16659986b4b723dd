"""Images into patches of wavelet coefficients and back (SIT, arXiv 2412.09607, section 4)."""

from itertools import accumulate

import torch.nn.functional as F
from torch import Tensor

from sitlib.model.wavelets import dwt2, idwt2


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, h, w] -> patches [B, N, C * patch^2], row-major, N = (h / patch) (w / patch)."""
    B, C, h, w = x.shape
    x = x.reshape(B, C, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (h // patch) * (w // patch), C * patch**2)


def unpatchify(x: Tensor, patch: int, columns: int) -> Tensor:
    """Patches [B, N, C * patch^2], `columns` in a row -> [B, C, h, w]: inverts `patchify`."""
    B, N, P = x.shape
    C, rows = P // patch**2, N // columns
    x = x.reshape(B, rows, columns, C, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(B, C, rows * patch, columns * patch)


def add_overlaps(x: Tensor, patch: int, columns: int) -> Tensor:
    """Patches [B, N, C (patch + 2 m)^2] that reach m px into their neighbors, m = `margin(patch)`.

    They are added up, and cut into patches [B, N, C patch^2] again.
    """
    size, m = ((x.shape[1] // columns) * patch, columns * patch), margin(patch)
    sums = F.fold(x.transpose(1, 2), size, patch + 2 * m, stride=patch, padding=m)  # [B, C, h, w]
    return patchify(sums, patch)


def margin(patch: int) -> int:
    """Half a patch, rounded up."""
    return -(-patch // 2)


class SpectralGeometry:
    """Wavelet scales of square images, cut into patches.

    L levels give S = L + 1 scales: scale 1 is LL, scales 2 ... S are the details, coarsest first.
    All scales have the same grid of N = grid_size^2 tokens, so that a token covers one part of the
    image at every scale. Zero levels give ViT-VQGAN's pixel patches. The side of the image, `size`
    px, is a multiple of grid_size * 2^levels. `sitlib.model.transforms` has others.
    `grids`, if given, are tokens per side of each scale; `num_scales` then counts runs of N tokens.
    """

    channels = 3  # of the image

    def __init__(self, size: int, levels: int, grid_size: int, wavelet: str = "haar", grids=None):
        self.size, self.levels, self.grid_size, self.wavelet = size, levels, grid_size, wavelet
        self.scales = range(1, levels + 2)
        self.grids: list[int] = grids or [grid_size] * (levels + 1)
        self.ends = [*accumulate(grid**2 for grid in self.grids)]  # of scales in the sequence
        self.tokens_per_scale, self.num_tokens = grid_size**2, self.ends[-1]
        self.num_scales = self.num_tokens // self.tokens_per_scale

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, H] -> a map [B, C_s, h_s, w_s] of every scale, coarsest first."""
        return dwt2(images, self.wavelet, self.levels)

    def inverse(self, maps: list[Tensor]) -> Tensor:
        """The inverse; the first k maps give the image at 1 / 2^(S - k) of its side."""
        return idwt2(maps, self.wavelet)

    def scale_channels(self, scale: int) -> int:
        """Channels C_s of a scale's map: colors, or three bands of them."""
        return self.channels if scale == 1 else 3 * self.channels

    def scale_size(self, scale: int) -> int:
        """Side of a scale's map in px; scale 2 is as large as scale 1."""
        return self.size >> (self.levels - max(scale - 2, 0))

    def patch_size(self, scale: int) -> int:
        """Side in px of a token's patch in the map of `scale`."""
        return self.scale_size(scale) // self.grids[scale - 1]

    def patch_dim(self, scale: int) -> int:
        """Values P_s in a patch: 12, 36, 144, 576 for SIT-4 at 256 px with a grid of 16."""
        return self.scale_channels(scale) * self.patch_size(scale) ** 2

    def written_dim(self, scale: int) -> int:
        """Values that a token of `scale` writes where patches overlap: see `add_overlaps`."""
        patch = self.patch_size(scale)
        return self.scale_channels(scale) * (patch + 2 * margin(patch)) ** 2

    def patchify(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps [B, C_s, h_s, w_s], coarsest first -> patches [B, N, P_s] of every scale."""
        return [patchify(x, self.patch_size(s)) for s, x in enumerate(maps, 1)]

    def add_overlaps(self, patches: list[Tensor]) -> list[Tensor]:
        """Patches [B, N, written_dim] of the first k scales -> [B, N, P_s], see `add_overlaps`."""
        triples = zip(patches, self.scales, self.grids, strict=False)
        return [add_overlaps(x, self.patch_size(s), columns) for x, s, columns in triples]

    def unpatchify(self, patches: list[Tensor]) -> list[Tensor]:
        """The inverse of `patchify`, also of the first scales alone."""
        triples = zip(patches, self.scales, self.grids, strict=False)
        return [unpatchify(x, self.patch_size(s), columns) for x, s, columns in triples]
