"""Quantizers: latents -> codes of a codebook. A new one is a class here and a line in
`QUANTIZERS`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

KMEANS_SIMILARITIES = 2**28  # of latents and codes in memory at a time: 1 GiB


@dataclass
class Quantized:
    """Codes of latents [..., D]."""

    vectors: Tensor  # [..., D] quantized latents, with a gradient to the latents
    codes: Tensor  # [...] int64
    commitment_loss: Tensor  # [...] mean squared distance to the code, which is held fixed
    codebook_loss: Tensor  # [...] the same distance, moving the code instead


class Codebook(nn.Module):
    """l2-normalized vector quantizer (ViT-VQGAN, arXiv 2110.04627, section 3.2).

    Latents and codes lie on the unit sphere of a few dimensions. Another quantizer is a subclass
    that overrides `forward`, `lookup` and, if its codes do not lie on the sphere, `project`, and
    what does not apply to it below them. Its `weight` [K, D] holds the vectors of all codes
    (`requires_grad=False` if they are fixed).

    Args:
        num_codes: size of the vocabulary K.
        dim: dimension D of the lookup space (8 to 32 keeps all codes in use).
        update: codes follow the "gradient" of the codebook loss, or an "ema" of the latents that
            chose them (VQ-VAE-2, arXiv 1906.00446).
        decay: of the moving average.
        gradient: "straight_through" copies the gradient of the code to the latent; "rotation"
            rotates it by the angle between them (arXiv 2410.06424).
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        update: Literal["gradient", "ema"] = "gradient",
        decay: float = 0.99,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
    ):
        super().__init__()
        self.num_codes, self.update, self.decay, self.gradient = num_codes, update, decay, gradient
        weight = F.normalize(torch.randn(num_codes, dim), dim=-1)
        self.weight = nn.Parameter(weight, requires_grad=update == "gradient")  # [K, D]
        self.register_buffer("steps_unused", torch.zeros(num_codes, dtype=torch.int64))
        if update == "ema":  # as if a latent equal to each code had chosen it once
            self.register_buffer("ema_sum", weight.clone())

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of latents [..., D], which need not be normalized."""
        z = self.project(z)
        codes = self.nearest(z)  # [...]
        q = self.lookup(codes)  # [..., D]
        vectors = z + (q - z).detach()  # value of q, gradient of z
        if self.gradient == "rotation":
            vectors = _rotate(z, q.detach())
        return Quantized(
            vectors,
            codes,
            commitment_loss=(z - q.detach()).square().mean(-1),
            codebook_loss=(z.detach() - q).square().mean(-1),
        )

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

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 20) -> None:
        """Start the codes at centroids of spherical k-means of latents [..., D].

        Raises:
            ValueError: fewer latents than codes.
        """
        z = self.project(z.reshape(-1, z.shape[-1]))  # [M, D]
        if len(z) < self.num_codes:
            raise ValueError(
                f"k-means of {self.num_codes} codes needs at least {self.num_codes} vectors, "
                f"not {len(z)}."
            )
        centroids = z[torch.randperm(len(z), device=z.device)[: self.num_codes]].clone()
        rows = max(1, KMEANS_SIMILARITIES // self.num_codes)
        for _ in range(iterations):
            nearest = torch.cat([(part @ centroids.T).argmax(-1) for part in z.split(rows)])
            sums = torch.zeros_like(centroids).index_add_(0, nearest, z)
            empty = torch.bincount(nearest, minlength=self.num_codes) == 0
            sums[empty] = z[torch.randint(len(z), (int(empty.sum()),), device=z.device)]
            centroids = F.normalize(sums, dim=-1)
        self._move(torch.ones(self.num_codes, dtype=torch.bool, device=z.device), centroids)

    @torch.no_grad()
    def ema_update(self, z: Tensor, codes: Tensor) -> None:
        """With update "ema", move each code towards the mean of latents [..., D] that chose it.

        Every rank gives its own latents and codes [...]; all move their codes alike.
        """
        if self.update != "ema":
            return
        z, codes = self.project(z.reshape(-1, z.shape[-1])), codes.reshape(-1)  # [M, D], [M]
        sums = _sum_over_ranks(torch.zeros_like(self.ema_sum).index_add_(0, codes, z))
        used = self._count(codes)[:, None] > 0  # unused codes stay: their sum would decay to 0
        ema = self.ema_sum.lerp(sums, 1 - self.decay)
        self.ema_sum.copy_(torch.where(used, ema, self.ema_sum))
        self.weight.copy_(torch.where(used, F.normalize(self.ema_sum, dim=-1), self.weight))

    @torch.no_grad()
    def reset_dead_codes(self, z: Tensor, codes: Tensor, after: int) -> Tensor:
        """Move codes unused for `after` steps (0: never) onto random latents (arXiv 2107.03312).

        Every rank gives its latents [..., D] and codes [...] of this step, as many as the others. A
        code is dead if no rank used it; the new places are drawn from the latents of all, the same
        on every rank.

        Returns:
            bool [K], True for moved codes, whose history the optimizer should forget.
        """
        used = self._count(codes.reshape(-1)) > 0
        self.steps_unused.add_(1).masked_fill_(used, 0)
        if not after:
            return torch.zeros_like(used)
        dead = self.steps_unused >= after
        z = self.project(z.reshape(-1, z.shape[-1]))  # [M, D]
        rank, world_size = _rank_and_world_size()
        if dead.is_cuda:  # counting the dead would wait for the GPU: draw for every code
            source = torch.randint(world_size * len(z), dead.shape, device=z.device)
        elif not dead.any():
            return dead
        else:
            source = torch.zeros_like(self.steps_unused)
            source[dead] = torch.randint(world_size * len(z), (int(dead.sum()),))
        if world_size > 1:
            dist.broadcast(source, src=0)
        source = source - rank * len(z)  # row of z, where the latent is this rank's
        is_mine = (source >= 0) & (source < len(z))
        vectors = torch.where(is_mine[:, None], z[source.clamp(0, len(z) - 1)], 0.0)
        self._move(dead, _sum_over_ranks(vectors))
        return dead

    def _count(self, codes: Tensor) -> Tensor:
        """Count the uses of each code by all ranks: int64 [K]; `bincount` waits for the GPU."""
        counts = torch.zeros_like(self.steps_unused).index_add_(0, codes, torch.ones_like(codes))
        return _sum_over_ranks(counts)

    def _move(self, moved: Tensor, vectors: Tensor) -> None:
        """Place the codes `moved`, bool [K], at unit vectors [K, D], without a history."""
        self.weight.copy_(torch.where(moved[:, None], vectors, self.weight))
        self.steps_unused.masked_fill_(moved, 0)
        if self.update == "ema":
            self.ema_sum.copy_(torch.where(moved[:, None], vectors, self.ema_sum))


# TokenizerConfig.quantizer -> class, called with the arguments of `Codebook`
QUANTIZERS: dict[str, type[Codebook]] = {"codebook": Codebook}


def _rotate(z: Tensor, q: Tensor) -> Tensor:
    """The value of q as a fixed rotation of z, both unit vectors [..., D]: it turns the gradient."""
    z0 = z.detach()
    middle = F.normalize(z0 + q, dim=-1)
    reflected = z - 2 * (z * middle).sum(-1, keepdim=True) * middle  # two reflections: a rotation
    return reflected + 2 * (z * z0).sum(-1, keepdim=True) * q


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _sum_over_ranks(x: Tensor) -> Tensor:
    if _rank_and_world_size()[1] > 1:
        dist.all_reduce(x)
    return x
