"""A transformer over the tokens of scales: encoder and decoder of the tokenizer.

Tokens of one place exist once in every scale. Besides the blocks, this holds what knows of scales and places: learned positions and,
optionally, one linear map across the scales of a place. Knows nothing of images or codes.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.model.transformer import SequenceLayout, Transformer


class ScaleMixing(nn.Module):
    """One linear map across the scales of every place: x[s, n] += sum over s' of W[s, s'] x[s', n].

    Not in the paper. Attention has to discover which tokens show the same place at different scales; this hands it the answer, so
    that in a short run detail tokens can also carry what the codes of the approximation cannot. Where attention is scale-causal,
    so is the map: W[s, s'] = 0 for s' > s.
    """

    def __init__(self, num_scales: int, width: int, causal: bool):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(num_scales, width, num_scales, width) * 0.7 * (num_scales * width) ** -0.5
        )
        mask = torch.ones(num_scales, num_scales).tril()[:, None, :, None] if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x_BTC: Tensor, num_scales: int) -> Tensor:
        """[B, k N, C] -> [B, k N, C], for the first k scales where the map is causal, else for all."""
        x_BNSC = x_BTC.unflatten(1, (num_scales, -1)).transpose(1, 2)
        weight = self.weight if self.mask is None else self.weight * self.mask
        weight = weight[:num_scales, :, :num_scales].flatten(2).flatten(0, 1)
        mixed = F.linear(x_BNSC.flatten(2), weight).unflatten(2, (num_scales, -1))
        return x_BTC + mixed.transpose(1, 2).flatten(1, 2)


class NeighbourMixing(nn.Module):
    """One 3x3 convolution over the grid of tokens of every scale, added to its input; it starts as nothing.

    Not in the paper. With wavelets longer than Haar the coefficients of a token also tell of its neighbours' pixels, and the pixels of a
    token need its neighbours' coefficients: this brings them together.
    """

    def __init__(self, num_scales: int, grid: int, width: int):
        super().__init__()
        self.grid = grid
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1) for _ in range(num_scales)
        )
        for parameter in self.convolutions.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, k N, C] -> [B, k N, C] for the first k scales."""
        x_BSCHW = x_BTC.transpose(1, 2).unflatten(2, (-1, self.grid, self.grid)).transpose(1, 2)
        mixed = [
            convolution(x_BCHW).flatten(2).transpose(1, 2)
            for convolution, x_BCHW in zip(self.convolutions, x_BSCHW.unbind(1), strict=False)
        ]
        return x_BTC + torch.cat(mixed, dim=1)


class ScaleTransformer(nn.Module):
    """Mixing across scales, learned absolute positions, transformer.

    Args:
        num_scales, grid: the longest sequence: `num_scales` runs of grid * grid tokens, row-major.
        attention: "full" or "scale_causal"; the latter takes the first k scales alone, and gives them what it would give them among all.
        num_layers, width, num_heads, mlp_ratio, num_types: shape of the transformer; num_types 2 is an ADTransformer.
        mixes: with `ScaleMixing` at its start.
        neighbours: where there is `NeighbourMixing`, if anywhere: before everything else or after it.
    """

    def __init__(
        self,
        num_scales: int,
        grid: int,
        attention: Literal["full", "scale_causal"],
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        num_types: int,
        mixes: bool,
        neighbours: Literal["before", "after"] | None = None,
    ):
        super().__init__()
        self.num_tokens, self.attention = grid**2, attention
        self.position = nn.Parameter(_initial_positions(num_scales, grid, width))
        self.mixing = (
            ScaleMixing(num_scales, width, attention == "scale_causal")
            if mixes and num_scales > 1
            else None
        )
        self.transformer = Transformer(num_layers, width, num_heads, mlp_ratio, num_types)
        self.neighbours = neighbours
        self.neighbour_mixing = NeighbourMixing(num_scales, grid, width) if neighbours else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        """[B, k N, C] -> [B, k N, C]."""
        length = x_BTC.shape[1]
        num_scales = length // self.num_tokens
        if self.neighbour_mixing is not None and self.neighbours == "before":
            x_BTC = self.neighbour_mixing(x_BTC)
        if self.mixing is not None:
            x_BTC = self.mixing(x_BTC, num_scales)
        layout = SequenceLayout(num_scales, self.num_tokens, self.attention)
        x_BTC = self.transformer(x_BTC + self.position[:length], layout)
        if self.neighbour_mixing is not None and self.neighbours == "after":
            x_BTC = self.neighbour_mixing(x_BTC)
        return x_BTC


def _initial_positions(num_scales: int, grid: int, width: int) -> Tensor:
    """Where the learned absolute positions [S N, C] start: a sine-cosine code of the place, the same for every scale, plus a random
    vector of the scale; so that tokens of one place resemble each other from the first step on."""
    frequency = torch.pi / grid * 2 ** torch.linspace(0, math.log2(grid), -(-width // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (y, x)]
    place_NC = torch.cat(
        [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1
    )[:, :width]
    scale_SC = torch.randn(num_scales, width)
    return 0.5 * (scale_SC[:, None] + place_NC).flatten(0, 1)
