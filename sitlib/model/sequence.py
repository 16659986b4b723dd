"""Transformer over one sequence of tokens: generator, text encoder, diffusion model.

Beyond the tokenizer's: RMSNorm, SwiGLU, rotary positions, cross-attention and a KV cache.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitlib.model.transformer import init_blocks, sdpa


@dataclass(frozen=True)
class BlockOptions:
    """Parts of a block. Defaults are ViT-VQGAN's; LlamaGen has "rms", "swiglu" and no biases.

    Attributes:
        norm: LayerNorm, or RMSNorm (arXiv 1910.07467).
        mlp: two layers with GELU between, or SwiGLU (arXiv 2002.05202), which has half as many
            weights again at the same hidden width.
        bias: linear layers and LayerNorm have biases.
        qk_norm: RMSNorm of the queries and keys of each head (arXiv 2302.05442), so that attention
            cannot saturate.
        cross_attention: a second attention before the MLP, which reads a `Context`.
    """

    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qk_norm: bool = False
    cross_attention: bool = False

    def make_norm(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, bias=self.bias) if self.norm == "layer" else nn.RMSNorm(dim)


@dataclass(frozen=True)
class Context:
    """Keys and values of another sequence for cross-attention, from `Transformer.encode_context`.

    Attributes:
        keys_values: keys and values [B, H, L, D] of every layer.
        mask: bool [B, L], False for padding; None: there is none.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


class KVCache:
    """Keys and values of all positions so far, in memory that is allocated once.

    A growing cache is read up to the last filled position. A static one is read in multiples of
    `READ` positions, with a mask for those to come, and a GPU tensor says where to write: then
    steps are the same kernels on the same memory, which a CUDA graph can replay.

    Args:
        shape: [layers, 2, B, H, capacity, D].
        static: as above; for GPUs, where launching kernels costs more than reading in vain.
    """

    READ = 256

    def __init__(self, shape: tuple[int, ...], static: bool = False, device=None, dtype=None):
        self.store = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = shape[4]
        self.length = 0  # positions that every layer has filled
        self.position = torch.zeros(1, dtype=torch.int64, device=device) if static else None

    def rows(self, count: int) -> slice | Tensor:
        """Cache slots of the next `count` tokens.

        A slice; for a static cache after prefill, a tensor [1] on its device.
        """
        if self.position is None or self.length == 0:
            return slice(self.length, self.length + count)
        return self.position

    def reach(self, count: int) -> int:
        """Number of positions that attention of the next `count` tokens reads."""
        stop = self.length + count
        if isinstance(self.rows(count), slice):
            return stop
        return min(-(-stop // self.READ) * self.READ, self.capacity)

    def mask(self, count: int) -> Tensor | None:
        """Bool [1, reach], False for positions still to come; None where none is needed."""
        if isinstance(position := self.rows(count), slice):
            return None
        return torch.arange(self.reach(count), device=position.device)[None] <= position

    def update(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all that attention reads, views of the store."""
        count = k_BHTD.shape[2]
        if count > 1 and self.length > 0:
            raise ValueError("several positions at once can only be the first ones of a cache.")
        if self.length + count > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, not {self.length + count}: "
                "allocate a larger one."
            )
        (k, v), rows, reach = self.store[layer], self.rows(count), self.reach(count)
        k[:, :, rows] = k_BHTD.to(k.dtype)
        v[:, :, rows] = v_BHTD.to(v.dtype)
        return k[:, :, :reach], v[:, :, :reach]

    def advance(self, count: int) -> None:
        """Count `count` positions as filled, after the last layer has stored them."""
        self.length += count
        if self.position is not None:
            self.position += count


def rope_freqs(pos_TP: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines [2, T, D / 2] of rotary positions (RoPE, arXiv 2104.09864).

    Args:
        pos_TP: coordinates of each token: P = 1 in a sequence, P = 2 in a grid, where row and
            column get half of the frequencies each.

    Raises:
        ValueError: head_dim / 2 is no multiple of P.
    """
    P = pos_TP.shape[1]
    if head_dim % (2 * P):
        raise ValueError(
            f"rotary positions of {P} coordinate(s) need heads of a multiple of {2 * P} "
            f"dimensions, not {head_dim}."
        )
    count = head_dim // (2 * P)
    frequency = 10_000.0 ** (-torch.arange(count, device=pos_TP.device) / count)
    angles = (pos_TP[:, :, None] * frequency).flatten(1)  # [T, D / 2]
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary_emb(x_BHTD: Tensor, rope_2TF: Tensor) -> Tensor:
    """Rotate pairs of dimensions (d, d + D / 2) of queries or keys by their positions' angles."""
    first, second = x_BHTD.chunk(2, dim=-1)
    cos, sin = rope_2TF.to(x_BHTD.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class ContextProjection(nn.Linear):
    """Keys and values, side by side, of a context.

    A class of its own because all layers compute theirs before the first block runs: FSDP gathers
    these weights apart from those of their blocks.
    """


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
        options: BlockOptions | None = None,
    ):
        super().__init__()
        options = options or BlockOptions()
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
        context: Context | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; with a cache, of new positions only.

        Other arguments as for `Transformer.forward`; the context holds this layer's keys only.
        """
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
        y = sdpa(q, k, v, attn_mask=mask, is_causal=is_causal)
        x = x + self._drop(self.attention_out(y.transpose(1, 2).flatten(2)))

        if self.cross is not None:
            if context is None:
                raise ValueError("a block with cross-attention needs a context.")
            ((k, v),) = context.keys_values
            x = x + self._drop(self.cross(x, k, v, context.mask))

        hidden = self.mlp_in(self.mlp_norm(x))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        return x + self._drop(self.mlp_out(hidden))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    """Blocks and a final norm.

    Args:
        dropout: of residual branches. Attention weights have none: SDPA's fast kernels cannot.

    Attributes:
        gradient_checkpointing: recompute blocks in the backward pass (arXiv 1604.06174).
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        options: BlockOptions | None = None,
    ):
        super().__init__()
        options = options or BlockOptions()
        self.dim, self.num_heads = dim, num_heads
        self.gradient_checkpointing = False
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
        context: Context | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]; with a cache, of new positions only, which it stores.

        Args:
            causal: a token sees itself and earlier ones; else all.
            rope_2TF: `rope_freqs` of these positions.
            mask_BT: bool [B, T], False for padding, which no token sees; not with `causal`.
            context: from `encode_context`, for cross-attention.
        """
        if causal and mask_BT is not None:
            raise ValueError("keys can be hidden in full attention only, not in causal attention.")
        options: dict[str, Any] = {"rope_2TF": rope_2TF, "mask_BT": mask_BT}
        if cache is not None:
            options["mask_BT"] = cache.mask(x.shape[1])
        for layer, block in enumerate(self.blocks):
            if context is not None:  # its layer's part: a compiled block must not see an index
                options["context"] = Context([context.keys_values[layer]], context.mask)
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, causal, None, layer, use_reentrant=False, **options)
            else:
                x = block(x, causal, cache, layer, **options)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.norm(x)

    def encode_context(self, context_BLC: Tensor, mask_BL: Tensor | None = None) -> Context:
        """Keys and values of a sequence for every layer's cross-attention; mask False: padding."""
        readers = [cast(CrossAttention, cast(Block, block).cross) for block in self.blocks]
        return Context([reader.encode_context(context_BLC) for reader in readers], mask_BL)

    def new_cache(self, batch_size: int, capacity: int, static: bool | None = None) -> KVCache:
        """An empty cache on the model's device, in its precision; static by default on a GPU."""
        weight = cast(Block, self.blocks[0]).attention_out.weight
        head_dim = self.dim // self.num_heads
        shape = (len(self.blocks), 2, batch_size, self.num_heads, capacity, head_dim)
        static = weight.is_cuda if static is None else static
        return KVCache(shape, static, device=weight.device, dtype=matmul_dtype(weight))


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """dtype of matmuls with `weight`: the autocast dtype on a GPU, else weight.dtype."""
    is_cast = weight.is_cuda and weight.dtype == torch.float32 and torch.is_autocast_enabled("cuda")
    return torch.get_autocast_dtype("cuda") if is_cast else weight.dtype
