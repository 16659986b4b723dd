"""ADTransformer: encoder and decoder of the tokenizer (SIT, arXiv 2412.09607, section 4).

AD is approximation and detail: norms, q, k, v and MLP exist twice, for tokens of the approximation
(scale 1, LL) and of the details (all finer scales); attention is joint.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitlib.model.block import Block, BlockOptions, init_blocks, scale_causal


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inference_autocast(device: torch.device) -> AbstractContextManager:
    """Mixed precision of trained models on a GPU; on a CPU none: results stay exact."""
    if device.type != "cuda":
        return nullcontext()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16 if has_bf16 else torch.float16)


def in_weight_dtype(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers(x)` without autocast: no later layer mends the rounding of the first and last."""
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(next(layers.parameters()).dtype))


class ScaleMixing(nn.Module):
    """One linear map across the scales of each location: x[s] += sum_s' W[s, s'] x[s'].

    Not in the paper. Attention has to discover which tokens show the same location; this tells it.
    Where attention is scale-causal, W[s, s'] = 0 for s' > s.
    """

    def __init__(self, num_scales: int, dim: int, causal: bool):
        super().__init__()
        weight = torch.randn(num_scales, dim, num_scales, dim) * 0.7 * (num_scales * dim) ** -0.5
        self.weight = nn.Parameter(weight)
        mask = torch.ones(num_scales, num_scales).tril()[:, None, :, None] if causal else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor, num_scales: int) -> Tensor:
        """[B, k N, C] -> [B, k N, C], of the first k scales where causal, else of all."""
        weight = self.weight if self.mask is None else self.weight * self.mask
        weight = weight[:num_scales, :, :num_scales].flatten(2).flatten(0, 1)  # [k C, k C]
        x_BNSC = x.unflatten(1, (num_scales, -1)).transpose(1, 2)
        mixed = F.linear(x_BNSC.flatten(2), weight).unflatten(2, (num_scales, -1))
        return x + mixed.transpose(1, 2).flatten(1, 2)


class SeparateBlocks(nn.ModuleList):
    """Two transformers joined by cross-attention, the variant that SIT rejected: tokens attend to
    their own type, then to the other as it comes in here; nothing is shared.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_types: int):
        shape, options = (dim, num_heads, mlp_ratio), BlockOptions(cross_attention=True)
        super().__init__(Block(*shape, options=options) for _ in range(num_types))

    def forward(self, x_by_type: list[Tensor], **_: Any) -> list[Tensor]:
        """Tokens [B, T_t, C] of both types, with full attention -> the same shapes."""
        outputs = []
        for block, x, other in zip(self, x_by_type, reversed(x_by_type), strict=True):
            normed = F.layer_norm(other, other.shape[-1:])  # gain and bias: in the linear layer
            kv = block.cross.encode_context(normed)  # pyrefly: ignore[missing-attribute]
            outputs += block([x], context=(*kv, None))
        return outputs


class ADTransformer(nn.Module):
    """Mixing across scales, learned positions, ADTransformer blocks, final norm.

    A sequence is up to S runs of N = grid_size^2 tokens, row-major. With scale-causal attention the
    first k scales do not depend on finer ones, and may be passed alone. With `num_types` 2
    approximation and details have their own parameters, with 1 they share them; `grids` are the
    tokens per side of each scale, if not alike.
    """

    def __init__(
        self,
        num_scales: int,
        grid_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        attention: Literal["full", "scale_causal"] = "full",
        num_types: int = 2,
        scale_mixing: bool = False,
        typed: bool | str = True,
        grids: Sequence[int] | None = None,
    ):
        super().__init__()
        self.tokens_per_scale, self.attention = grid_size**2, attention
        self.gradient_checkpointing = False  # recompute blocks in backward (arXiv 1604.06174)
        grids = grids or [grid_size] * num_scales
        self.approximation_tokens = grids[0] ** 2
        self.pos_emb = nn.Parameter(_initial_pos_emb(grids, dim))  # [S N, C]
        self.scale_mixing = None
        if scale_mixing and num_scales > 1:
            self.scale_mixing = ScaleMixing(num_scales, dim, causal=attention == "scale_causal")
        block, shape = SeparateBlocks, (dim, num_heads, mlp_ratio)
        if typed != "separate":
            block = partial(Block, qkv_types=1 if typed == "mlp" else num_types)
        blocks = (block(*shape, num_types=num_types) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_types))
        init_blocks(self.blocks, branches=3 if typed == "separate" else 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, k N, C] of the first k scales, coarsest first -> [B, k N, C]."""
        T, N, A = x.shape[1], self.tokens_per_scale, self.approximation_tokens
        is_causal = self.attention == "scale_causal" and T > N
        sight = scale_causal(T // N, N) if is_causal else None
        if self.scale_mixing is not None:
            x = self.scale_mixing(x, T // N)
        x = x + self.pos_emb[:T]

        # Approximation tokens come first, so types are two slices of the sequence.
        lengths = [A, T - A] if len(self.norm) == 2 and T > A else [T]
        x_by_type = list(x.split(lengths, dim=1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_by_type = checkpoint(block, x_by_type, use_reentrant=False, sight=sight)
            else:
                x_by_type = block(x_by_type, sight=sight)
        return torch.cat([norm(x) for x, norm in zip(x_by_type, self.norm, strict=False)], dim=1)


def _initial_pos_emb(grids: Sequence[int], dim: int) -> Tensor:
    """Positions [T, C] at first: sines and cosines of the place, a random vector of the scale."""
    finest, positions = max(grids), []
    frequency = torch.pi / finest * 2 ** torch.linspace(0, math.log2(finest), -(-dim // 4))
    for side, scale_C in zip(grids, torch.randn(len(grids), dim), strict=True):
        places = (torch.arange(side) + 0.5) * (finest / side) - 0.5  # in tokens of the finest grid
        y, x = torch.meshgrid(places, places, indexing="ij")
        angles = [coordinate.flatten()[:, None] * frequency for coordinate in (y, x)]  # [N, C / 4]
        waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
        positions.append(0.5 * (scale_C + torch.cat(waves, dim=1)[:, :dim]))
    return torch.cat(positions)
