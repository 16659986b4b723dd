"""Codebooks before and during training: where codes start, and what moves them besides gradients."""

from typing import cast

import torch
from torch import Tensor, nn

from sitlib.model.quantizer import Codebook
from sitlib.model.tokenizer import SpectralTokenizer, TokenizerOutput

PIXELS_AT_A_TIME = 2**25  # 170 images of 256 px


@torch.no_grad()
def initialize_codebooks(tokenizer: SpectralTokenizer, images: Tensor) -> None:
    """Whiten the latents of training images [B, 3, H, H], then start codes by k-means.

    Latents of photographs first vary in hardly more than one direction (brightness), and a
    codebook that starts there learns the others slowly.
    """
    batch_size = max(1, PIXELS_AT_A_TIME // images[0].numel())

    def latents() -> tuple[Tensor, ...]:
        z = torch.cat([tokenizer.latents(batch) for batch in images.split(batch_size)])
        return tokenizer.by_codebook(z)

    for head, z in zip(tokenizer.pre_quant, latents(), strict=True):
        _whiten(cast(nn.Linear, cast(nn.Sequential, head)[-1]), z.flatten(0, 2))
    for codebook, z in zip(tokenizer.codebooks, latents(), strict=True):
        cast(Codebook, codebook).initialize(z.flatten(0, 2))


def update_codebooks(
    tokenizer: SpectralTokenizer, output: TokenizerOutput, reset_dead_codes_after: int
) -> list[Tensor]:
    """Move codes by moving averages (if so configured), and dead ones onto current latents.

    Returns:
        Moved codes, bool [K] of each codebook, for the optimizer to forget their history.
    """
    moved = []
    for codebook, z, codes in zip(
        cast(list[Codebook], tokenizer.codebooks),
        tokenizer.by_codebook(output.latents),
        tokenizer.by_codebook(output.codes),
        strict=True,
    ):
        codebook.ema_update(z, codes)
        moved.append(codebook.reset_dead_codes(z, codes, reset_dead_codes_after))
    return moved


def _whiten(linear: nn.Linear, outputs: Tensor) -> None:
    """Change a layer so that its outputs [M, D] get mean 0 and covariance I (symmetrically)."""
    mean = outputs.mean(0)
    variance, axes = torch.linalg.eigh(torch.cov(outputs.T))
    variance = variance.clamp_min(1e-4 * variance[-1])  # do not blow up empty directions
    whitening = axes @ torch.diag(variance.rsqrt()) @ axes.T
    linear.bias.copy_(whitening @ (linear.bias - mean))
    linear.weight.copy_(whitening @ linear.weight)
