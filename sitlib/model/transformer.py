"""ADTransformer: encoder and decoder of the tokenizer (SIT, arXiv 2412.09607, section 4).

AD is approximation and detail: norms, q, k, v and MLP exist twice, for tokens of the approximation
(scale 1, LL) and of the details (all finer scales); attention is joint.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Gradients of cuDNN's attention with a mask can be NaN on Hopper GPUs (pytorch issue 196678), and
# it prepares itself for every new shape. Flash and memory-efficient attention remain.
torch.backends.cuda.enable_cudnn_sdp(False)


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


@dataclass(frozen=True)
class SequenceLayout:
    """Runs of tokens, one for each scale, and who sees whom."""

    num_scales: int
    tokens_per_scale: int
    # scale_causal: own and coarser scales; causal: itself and earlier tokens.
    attention: Literal["full", "scale_causal", "causal"] = "full"


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention of [B, H, T, D]; on a CPU in float32, also under autocast."""
    # In bf16 the backward pass took eight times as long (torch 2.14, Xeon with AMX).
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
    """Softmax attention of [B, H, T, D] under a layout, with no mask in memory.

    Scale-causal attention is one call per scale: its queries see all keys of its own and coarser
    scales. That is exact, and the fastest kernels take no mask.
    """
    if layout.attention == "scale_causal" and layout.num_scales > 1:
        N, outputs = layout.tokens_per_scale, []
        for scale, q_scale in enumerate(q.split(N, dim=2), 1):
            y = sdpa(q_scale, k[:, :, : scale * N], v[:, :, : scale * N])
            outputs.append(y.transpose(1, 2))  # [B, N, H, D], as the kernel leaves it: no copy
        return torch.cat(outputs, dim=1).transpose(1, 2)
    return sdpa(q, k, v, is_causal=layout.attention == "causal")


class ADBlock(nn.Module):
    """Pre-norm attention and MLP; each type of token has its own, but for `attention_out`."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_types: int = 2, qkv_types=2):
        super().__init__()
        hidden, types = int(dim * mlp_ratio), range(num_types)
        self.num_heads = num_heads
        self.attention_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in types[:qkv_types])
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in types[:qkv_types])
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.ModuleList(nn.LayerNorm(dim) for _ in types)
        self.mlp_in = nn.ModuleList(nn.Linear(dim, hidden) for _ in types)
        self.mlp_out = nn.ModuleList(nn.Linear(hidden, dim) for _ in types)

    def forward(self, x_by_type: list[Tensor], layout: SequenceLayout) -> list[Tensor]:
        """Tokens [B, T_t, C] of each type present -> the same shapes."""
        modules = zip(x_by_type, [*self.attention_norm] * 2, [*self.qkv] * 2, strict=False)
        qkv = torch.cat([linear(norm(x)) for x, norm, linear in modules], dim=1)  # [B, T, 3C]
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for x in qkv.chunk(3, dim=-1)
        )
        y = attend(q, k, v, layout).transpose(1, 2).flatten(2)  # [B, T, C]
        y_by_type = self.attention_out(y).split([x.shape[1] for x in x_by_type], dim=1)
        x_by_type = [x + y for x, y in zip(x_by_type, y_by_type, strict=True)]

        modules = zip(x_by_type, self.mlp_norm, self.mlp_in, self.mlp_out, strict=False)
        return [x + mlp_out(F.gelu(mlp_in(norm(x)))) for x, norm, mlp_in, mlp_out in modules]


def init_blocks(blocks: nn.ModuleList, branches: int = 2) -> None:
    """Initialize the linear layers of blocks with `branches` residual branches each."""
    for name, linear in blocks.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        # Unit gain (LeCun). The usual fixed 0.02 is a quarter of it at width 128.
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        with torch.no_grad():
            if ".qkv" in name:  # keys like queries: similar tokens attend (arXiv 2305.09828)
                query, key, _ = linear.weight.chunk(3)
                key.add_(query).mul_(0.5**0.5)
            if name.endswith("attention_out") or ".mlp_out" in name:  # GPT-2's rule for depth
                linear.weight /= (branches * len(blocks)) ** 0.5


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
        block = partial(ADBlock, qkv_types=1) if typed == "mlp" else ADBlock
        if typed == "separate":
            from sitlib.model.separate import SeparateBlocks as block  # it imports this module
        shape = dim, num_heads, mlp_ratio, num_types
        self.blocks = nn.ModuleList(block(*shape) for _ in range(num_layers))
        self.norm = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_types))
        init_blocks(self.blocks, branches=3 if typed == "separate" else 2)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, k N, C] of the first k scales, coarsest first -> [B, k N, C]."""
        T, N, A = x.shape[1], self.tokens_per_scale, self.approximation_tokens
        layout = SequenceLayout(T // N, N, self.attention)
        if self.scale_mixing is not None:
            x = self.scale_mixing(x, T // N)
        x = x + self.pos_emb[:T]

        # Approximation tokens come first, so types are two slices of the sequence.
        lengths = [A, T - A] if len(self.norm) == 2 and T > A else [T]
        x_by_type = list(x.split(lengths, dim=1))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_by_type = checkpoint(block, x_by_type, layout, use_reentrant=False)
            else:
                x_by_type = block(x_by_type, layout)
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
