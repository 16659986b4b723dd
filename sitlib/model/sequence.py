"""Transformer over one sequence of tokens: generator, text encoder, diffusion model.

Beyond the tokenizer's: RMSNorm, SwiGLU, rotary positions, cross-attention and a KV cache.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitlib.model.transformer import init_blocks, sdpa


@dataclass(frozen=True)
class BlockOptions:
    """Parts of a block. Defaults are ViT-VQGAN's; LlamaGen has "rms", "swiglu" and no biases."""

    norm: Literal["layer", "rms"] = "layer"  # RMSNorm: arXiv 1910.07467
    mlp: Literal["gelu", "swiglu"] = "gelu"  # SwiGLU (arXiv 2002.05202): half as many weights again
    bias: bool = True  # of linear layers and LayerNorm
    qk_norm: bool = False  # of each head, so that attention cannot saturate (arXiv 2302.05442)
    cross_attention: bool = False  # a second attention before the MLP, which reads a `Context`

    def make_norm(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, bias=self.bias) if self.norm == "layer" else nn.RMSNorm(dim)


VIT = BlockOptions()

# Another sequence, for cross-attention: keys and values [B, H, L, D] of every layer, and a mask
# [B, L], False for padding; None: there is none.
Context = list[tuple[Tensor, Tensor, Tensor | None]]


# What tokens see where that is neither all nor the earlier ones: runs of queries, in order, each with
# the runs of keys that it sees.
Sight = list[tuple[slice, list[slice]]]


def attend_by_runs(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """Attention of [B, H, T, D], a call for each run of queries: no mask, and the fast kernels."""
    outputs = []
    for rows, runs in sight:
        keys, values = (
            x[:, :, runs[0]] if len(runs) == 1 else torch.cat([x[:, :, run] for run in runs], dim=2)
            for x in (k, v)
        )
        outputs.append(sdpa(q[:, :, rows], keys, values))
    return torch.cat(outputs, dim=2)


class KVCache:
    """Keys and values of up to `capacity` positions, in memory that is allocated once.

    A step reads up to the last filled position. In a static cache (`static_on` is its GPU) it reads
    a multiple of `READ` positions, with a mask for those to come, and a GPU tensor says where to
    write: then steps are the same kernels on the same memory, which a CUDA graph can replay.
    """

    READ = 256

    def __init__(self, capacity: int, static_on: torch.device | None = None):
        self.layers: list[Tensor] = []  # keys and values [2, B, H, capacity, D] of each
        self.capacity, self.length = capacity, 0  # length: positions that every layer has filled
        self.position = None
        if static_on is not None:
            self.position = torch.zeros(1, dtype=torch.int64, device=static_on)

    def span(self, count: int) -> tuple[slice | Tensor, int]:
        """Where the next `count` tokens are stored, and how many positions these read.

        The place is a tensor in a static cache after its first tokens. Then `count` is 1.
        """
        stop = self.length + count
        if self.position is None or self.length == 0:
            return slice(self.length, stop), stop
        return self.position, min(-(-stop // self.READ) * self.READ, self.capacity)

    def update(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values [B, H, T, D]; return views of all that attention reads."""
        B, H, count, D = k_BHTD.shape
        assert 0 < count <= self.capacity - self.length
        assert self.position is None or count == 1 or self.length == 0
        if layer == len(self.layers):
            self.layers.append(v_BHTD.new_zeros(2, B, H, self.capacity, D))
        (k, v), (rows, reach) = self.layers[layer], self.span(count)
        k[:, :, rows] = k_BHTD.to(k.dtype)  # normalized keys are of a higher precision
        v[:, :, rows] = v_BHTD
        return k[:, :, :reach], v[:, :, :reach]


def rope_freqs(pos_TP: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines [2, T, D / 2] of rotary positions [T, P] (RoPE, arXiv 2104.09864).

    P = 1 in a sequence; 2 in a grid, where row and column get half of the frequencies each.
    """
    count = head_dim // (2 * pos_TP.shape[1])
    frequency = 10_000.0 ** (-torch.arange(count, device=pos_TP.device) / count)
    angles = (pos_TP[:, :, None] * frequency).flatten(1)  # [T, D / 2]
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary_emb(x_BHTD: Tensor, rope_2TF: Tensor) -> Tensor:
    """Rotate pairs of dimensions (d, d + D / 2) of queries or keys by their positions' angles."""
    first, second = x_BHTD.chunk(2, dim=-1)
    cos, sin = rope_2TF.to(x_BHTD.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class ContextProjection(nn.Linear):
    """Keys and values of a context, for all layers before the first block runs: FSDP's own unit."""


class CrossAttention(nn.Module):
    """Pre-norm attention of tokens to a `Context`."""

    def __init__(self, dim: int, num_heads: int, options: BlockOptions):
        super().__init__()
        self.num_heads = num_heads
        self.norm = options.make_norm(dim)
        self.query = nn.Linear(dim, dim, bias=options.bias)
        self.key_value = ContextProjection(dim, 2 * dim, bias=options.bias)
        self.attention_out = nn.Linear(dim, dim, bias=options.bias)

    def encode_context(self, context_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, D]."""
        k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in self.key_value(context_BLC).chunk(2, dim=-1)
        )
        return k.contiguous(), v.contiguous()  # they are read many times

    def forward(self, x_BTC: Tensor, k: Tensor, v: Tensor, mask_BL: Tensor | None) -> Tensor:
        q = self.query(self.norm(x_BTC)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        y = sdpa(q, k, v, attn_mask=mask)  # [B, H, T, D]
        return self.attention_out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm self-attention, optional cross-attention, MLP."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        options: BlockOptions = VIT,
    ):
        super().__init__()
        hidden, bias = int(dim * mlp_ratio), options.bias
        self.num_heads, self.dropout, self.gated = num_heads, dropout, options.mlp == "swiglu"
        self.attention_norm = options.make_norm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.attention_out = nn.Linear(dim, dim, bias=bias)
        self.mlp_norm = options.make_norm(dim)
        self.mlp_in = nn.Linear(dim, 2 * hidden if self.gated else hidden, bias=bias)
        self.mlp_out = nn.Linear(hidden, dim, bias=bias)
        norms = nn.ModuleList(nn.RMSNorm(dim // num_heads) for _ in range(2))
        self.qk_norm = norms if options.qk_norm else None
        self.cross = CrossAttention(dim, num_heads, options) if options.cross_attention else None

    def forward(
        self,
        x: Tensor,
        causal: bool,
        cache: KVCache | None = None,
        layer: int = 0,
        *,
        rope_2TF: Tensor | None = None,
        mask_BT: Tensor | None = None,
        sight: Sight | None = None,
        context: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; arguments as for `Transformer.forward`, context of this layer."""
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for x in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        if self.qk_norm is not None:
            q, k = (norm(x) for norm, x in zip(self.qk_norm, (q, k), strict=True))
        if rope_2TF is not None:
            q, k = apply_rotary_emb(q, rope_2TF), apply_rotary_emb(k, rope_2TF)
        if cache is not None:
            k, v = cache.update(layer, k, v)
        # A plain bool: with varying lengths a compiler would make a symbol of the condition.
        is_causal = True if causal and q.shape[2] > 1 else False  # noqa: SIM210
        mask = None if mask_BT is None else mask_BT[:, None, None]
        attend = partial(sdpa, attn_mask=mask, is_causal=is_causal)
        attend = attend if sight is None else partial(attend_by_runs, sight=sight)
        y = attend(q, k, v)
        y = self.attention_out(y.transpose(1, 2).flatten(2))
        x = x + F.dropout(y, self.dropout, self.training)

        if self.cross is not None:
            assert context is not None
            x = x + F.dropout(self.cross(x, *context), self.dropout, self.training)

        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


class Transformer(nn.Module):
    """Blocks and a final norm."""

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,  # of residual branches: SDPA's fast kernels have none of weights
        options: BlockOptions = VIT,
    ):
        super().__init__()
        self.gradient_checkpointing = False  # recompute blocks in backward (arXiv 1604.06174)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, dropout, options) for _ in range(num_layers)
        )
        self.norm = options.make_norm(dim)
        init_blocks(self.blocks, branches=3 if options.cross_attention else 2)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        cache: KVCache | None = None,
        *,
        rope_2TF: Tensor | None = None,
        mask_BT: Tensor | None = None,
        sight: Sight | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; with a cache, of new positions only, which it stores.

        `rope_2TF` is `rope_freqs` of these positions, with a cache of all; `mask_BT` bool [B, T] is
        False for padding, which no token sees (not with `causal`); `sight`, without a cache, says
        who sees whom.
        """
        count = x.shape[1]
        if cache is not None:
            rows, reach = cache.span(count)
            rope_2TF = None if rope_2TF is None else rope_2TF[:, rows]
            if isinstance(rows, Tensor):  # positions that are read, but not yet filled, are hidden
                mask_BT = torch.arange(reach, device=x.device)[None] <= rows
        options: dict[str, Any] = {"rope_2TF": rope_2TF, "mask_BT": mask_BT, "sight": sight}
        for layer, block in enumerate(self.blocks):
            if context is not None:  # its layer's part: a compiled block must not see an index
                options["context"] = context[layer]
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, causal, use_reentrant=False, **options)
            else:
                x = block(x, causal, cache, layer, **options)
        if cache is not None:
            cache.length += count
            if cache.position is not None:
                cache.position += count
        return self.norm(x)

    def encode_context(self, context_BLC: Tensor, mask_BL: Tensor | None = None) -> Context:
        """Keys and values of a sequence for every layer's cross-attention; mask False: padding."""
        readers = [cast(CrossAttention, block.cross) for block in self.blocks]
        return [(*reader.encode_context(context_BLC), mask_BL) for reader in readers]
