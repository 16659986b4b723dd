"""Quantizers: latents -> codes. A new one is a class here and a line in `QUANTIZERS`."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Quantized:
    """Codes of latents [..., D]."""

    vectors: Tensor  # [..., D] quantized latents, with a gradient to the latents
    codes: Tensor  # [...] int64
    commitment_loss: Tensor  # [...] mean squared distance to the code, which is held fixed
    codebook_loss: Tensor  # [...] the same distance, moving the code instead


class Codebook(nn.Module):
    """l2-normalized vector quantizer (ViT-VQGAN, arXiv 2110.04627, section 3.2).

    Latents and codes lie on the unit sphere of D dimensions; few, 8 to 32, keep most codes in use.
    Another quantizer is a subclass that overrides `forward`, `lookup` and, if its codes do not lie
    on the sphere, `project`. Its `weight` [K, D] holds the vectors of all codes.
    """

    codes_are_fixed = False  # True in a subclass: training leaves its codes where they are

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.num_codes = num_codes
        weight = F.normalize(torch.randn(num_codes, dim), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=not self.codes_are_fixed)  # [K, D]
        self.register_buffer("steps_unused", torch.zeros(num_codes, dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of latents [..., D], which need not be normalized."""
        z = self.project(z)
        codes = self.nearest(z)  # [...]
        q = self.lookup(codes)  # [..., D]
        vectors = z + (q - z).detach()  # value of q, gradient of z
        commitment_loss = (z - q.detach()).square().mean(-1)
        codebook_loss = (z.detach() - q).square().mean(-1)
        return Quantized(vectors, codes, commitment_loss, codebook_loss)

    def project(self, z: Tensor) -> Tensor:
        """Latents [..., D] -> the nearest points of the space of codes: here the unit sphere."""
        return F.normalize(z, dim=-1)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes [...] of unit vectors [..., D]: on the sphere, those of the largest dot product."""
        weight = F.normalize(self.weight.to(z.dtype), dim=-1)
        similarity = z.reshape(-1, z.shape[-1]) @ weight.T  # [M, K]
        return similarity.argmax(-1).view(z.shape[:-1])

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit vectors [..., D] of codes [...]."""
        return F.normalize(F.embedding(codes, self.weight), dim=-1)


# TokenizerConfig.quantizer -> class, called with num_codes and code_dim
QUANTIZERS: dict[str, type[Codebook]] = {"codebook": Codebook}
