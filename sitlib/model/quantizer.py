"""One codebook with an l2-normalized, low-dimensional lookup (ViT-VQGAN, arXiv 2110.04627, section 3.2).

Encoder outputs and codes both live on the unit sphere of a few dimensions, where the nearest code is the one with the largest dot
product. Codes follow the gradient, as in ViT-VQGAN, or moving averages of the outputs that chose them (VQ-VAE-2, arXiv 1906.00446).
Gradients pass the lookup straight through, or are rotated with the vector (arXiv 2410.06424). Codes start at k-means centres, and dead
ones restart at current encoder outputs (SoundStream, arXiv 2107.03312). Knows nothing of scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.train.distributed import (
    num_processes,
    of_first_process,
    process_index,
    sum_over_processes,
)

SIMILARITIES = 2**28  # of vectors and codes, in memory at a time while k-means runs: 1 GiB


@dataclass
class Quantized:
    """What a codebook makes of vectors [..., D]."""

    vectors: Tensor  # [..., D] the chosen codes, with the gradient of the input (straight-through)
    codes: Tensor  # [...] int64
    commitment_loss: (
        Tensor  # [...] mean over D of the squared distance to the code, which is held fixed
    )
    codebook_loss: Tensor  # [...] the same distance, moving the code instead


class Codebook(nn.Module):
    """`num_codes` unit vectors of `dim` dimensions.

    Args:
        num_codes: size of the vocabulary.
        dim: dimension of the lookup space (8 to 32 keeps all codes in use).
        learning: "gradient" of the codebook loss, or "ema": `ema_update` moves codes to the mean of the outputs that choose them.
        decay: of these moving averages.
        gradient: "straight_through" copies the gradient of the code to the output; "rotation" turns it by the angle between them.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        learning: Literal["gradient", "ema"] = "gradient",
        decay: float = 0.99,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ):
        super().__init__()
        self.learning, self.decay, self.gradient = learning, decay, gradient
        weight = F.normalize(torch.randn(num_codes, dim), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=learning == "gradient")
        self.register_buffer("steps_unused", torch.zeros(num_codes, dtype=torch.int64))
        if learning == "ema":  # as if every code had been chosen once, by an output like itself
            self.register_buffer("chosen_sum", weight.clone())

    @property
    def num_codes(self) -> int:
        return self.weight.shape[0]

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of `z` [..., D], which need not be normalized."""
        z = F.normalize(z, dim=-1)
        codes = self.nearest(z)
        chosen = self.lookup(codes)
        return Quantized(
            vectors=_rotated(z, chosen.detach())
            if self.gradient == "rotation"
            else z + (chosen - z).detach(),
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
    def initialize(self, z: Tensor, iterations: int = 20) -> None:
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
        rows = max(1, SIMILARITIES // self.num_codes)
        for _ in range(iterations):
            owner = torch.cat([(part @ centres.T).argmax(-1) for part in z.split(rows)])
            sums = torch.zeros_like(centres).index_add_(0, owner, z)
            empty = torch.bincount(owner, minlength=self.num_codes) == 0
            sums[empty] = z[torch.randint(len(z), (int(empty.sum()),), device=z.device)]
            centres = F.normalize(sums, dim=-1)
        self._place(torch.ones(self.num_codes, dtype=torch.bool, device=z.device), centres)

    @torch.no_grad()
    def ema_update(self, z: Tensor, codes: Tensor) -> None:
        """With learning "ema": moves every code towards the mean of the outputs `z` [..., D] that chose it as `codes` [...].

        Of several processes each gives its own outputs, and all move their codes by those of all.
        """
        if self.learning != "ema":
            return
        z, codes = F.normalize(z.reshape(-1, z.shape[-1]), dim=-1), codes.reshape(-1)
        sums = sum_over_processes(torch.zeros_like(self.chosen_sum).index_add_(0, codes, z))
        chosen = (
            self._count(codes)[:, None] > 0
        )  # the others stay: a sum that only decays would vanish
        self.chosen_sum.copy_(
            torch.where(chosen, self.chosen_sum.lerp(sums, 1 - self.decay), self.chosen_sum)
        )
        self.weight.copy_(torch.where(chosen, F.normalize(self.chosen_sum, dim=-1), self.weight))

    @torch.no_grad()
    def reset_dead_codes(self, z: Tensor, codes: Tensor, after: int) -> Tensor:
        """Counts use, and moves codes unused for `after` steps onto random vectors of `z` [M, D].

        Of several processes each gives its own vectors and codes. A code is unused if no process used it, the vectors are drawn from those
        of all, and all processes move the same codes to the same places.

        Returns:
            bool [num_codes], True for the codes that were moved, so that the optimizer can forget their history.
        """
        used = self._count(codes.reshape(-1)) > 0
        self.steps_unused.add_(1).masked_fill_(used, 0)
        if not after:
            return torch.zeros_like(used)
        dead = self.steps_unused >= after
        z = F.normalize(z.reshape(-1, z.shape[-1]), dim=-1)
        if (
            dead.is_cuda
        ):  # to know how many are needed one would have to wait for the GPU: one for every code
            places = torch.randint(num_processes() * len(z), dead.shape, device=z.device)
        elif not dead.any():
            return dead
        else:
            places = torch.zeros_like(self.steps_unused)
            places[dead] = torch.randint(num_processes() * len(z), (int(dead.sum()),))
        here = of_first_process(places) - process_index() * len(z)
        is_mine = (here >= 0) & (here < len(z))
        vectors = torch.where(is_mine[:, None], z[here.clamp(0, len(z) - 1)], 0.0)
        self._place(dead, sum_over_processes(vectors))
        return dead

    def _count(self, codes: Tensor) -> Tensor:
        """How often each code was chosen, over all processes: int64 [num_codes]. (A GPU has to be waited for in `bincount`.)"""
        counts = torch.zeros_like(self.steps_unused).index_add_(0, codes, torch.ones_like(codes))
        return sum_over_processes(counts)

    def _place(self, moved: Tensor, vectors: Tensor) -> None:
        """Puts the codes `moved`, bool [num_codes], at their unit vectors [num_codes, D], without a history."""
        self.weight.copy_(torch.where(moved[:, None], vectors, self.weight))
        self.steps_unused.masked_fill_(moved, 0)
        if self.learning == "ema":
            self.chosen_sum.copy_(torch.where(moved[:, None], vectors, self.chosen_sum))


def _rotated(z: Tensor, chosen: Tensor) -> Tensor:
    """`chosen` as the constant rotation of z that takes one unit vector [..., D] to the other: the gradient is turned with it."""
    start = z.detach()
    between = F.normalize(start + chosen, dim=-1)
    mirrored = z - 2 * (z * between).sum(-1, keepdim=True) * between
    return mirrored + 2 * (z * start).sum(-1, keepdim=True) * chosen
