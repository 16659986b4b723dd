"""One codebook with an l2-normalised, low-dimensional lookup (ViT-VQGAN, arXiv 2110.04627, section 3.2).

Encoder outputs and codes both live on the unit sphere of a few dimensions, where the nearest code is the one with the largest dot
product. Codes are learned by gradient; they start at k-means centres and dead ones restart at current encoder outputs (SoundStream,
arXiv 2107.03312). Knows nothing of scales.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Quantized:
    """What a codebook makes of vectors [..., D]."""

    vectors: Tensor  # [..., D] the chosen codes, with the gradient of the input (straight-through)
    codes: Tensor  # [...] int64
    commitment_loss: Tensor  # [...] mean over D of the squared distance to the code, which is held fixed
    codebook_loss: Tensor  # [...] the same distance, moving the code instead


class Codebook(nn.Module):
    """`num_codes` unit vectors of `dim` dimensions.

    Args:
        num_codes: size of the vocabulary.
        dim: dimension of the lookup space (8 to 32 keeps all codes in use).
    """

    def __init__(self, num_codes: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(num_codes, dim), dim=-1))
        self.register_buffer("steps_unused", torch.zeros(num_codes, dtype=torch.int64))

    @property
    def num_codes(self) -> int:
        return self.weight.shape[0]

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of `z` [..., D], which need not be normalised."""
        z = F.normalize(z, dim=-1)
        codes = self.nearest(z)
        chosen = self.lookup(codes)
        return Quantized(
            vectors=z + (chosen - z).detach(),
            codes=codes,
            commitment_loss=(z - chosen.detach()).square().mean(-1),
            codebook_loss=(z.detach() - chosen).square().mean(-1),
        )

    def nearest(self, z: Tensor) -> Tensor:
        """Codes [...] int64 of unit vectors [..., D]: on the sphere the nearest code has the largest dot product."""
        with torch.no_grad():
            return (
                (z.reshape(-1, z.shape[-1]) @ F.normalize(self.weight, dim=-1).T)
                .argmax(-1)
                .view(z.shape[:-1])
            )

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit vectors [..., D] of codes [...]."""
        return F.normalize(F.embedding(codes, self.weight), dim=-1)

    @torch.no_grad()
    def initialise(self, z: Tensor, iterations: int = 20) -> None:
        """Spherical k-means on encoder outputs [M, D]: the codes start where the data is.

        Raises:
            ValueError: fewer vectors than codes.
        """
        z = F.normalize(z.reshape(-1, z.shape[-1]), dim=-1)
        if len(z) < self.num_codes:
            raise ValueError(
                f"k-means needs at least {self.num_codes} vectors for as many codes, it was given {len(z)}."
            )
        centres = z[torch.randperm(len(z), device=z.device)[: self.num_codes]].clone()
        for _ in range(iterations):
            owner = (z @ centres.T).argmax(-1)
            sums = torch.zeros_like(centres).index_add_(0, owner, z)
            empty = torch.bincount(owner, minlength=self.num_codes) == 0
            sums[empty] = z[torch.randint(len(z), (int(empty.sum()),), device=z.device)]
            centres = F.normalize(sums, dim=-1)
        self.weight.copy_(centres)
        self.steps_unused.zero_()

    @torch.no_grad()
    def restart_dead(self, z: Tensor, codes: Tensor, after: int) -> Tensor:
        """Counts use, and moves codes unused for `after` steps onto random vectors of `z` [M, D].

        Returns:
            The indices of the codes that were moved, so that the optimiser can forget their history.
        """
        used = torch.bincount(codes.reshape(-1), minlength=self.num_codes) > 0
        self.steps_unused.add_(1).masked_fill_(used, 0)
        dead = (self.steps_unused >= after).nonzero(as_tuple=True)[0] if after else codes.new_empty(0)
        if len(dead):
            z = F.normalize(z.reshape(-1, z.shape[-1]), dim=-1)
            self.weight[dead] = z[torch.randint(len(z), (len(dead),), device=z.device)]
            self.steps_unused[dead] = 0
        return dead
