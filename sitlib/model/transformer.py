"""The transformer block that encoder, decoder, text encoder and autoregressive model share.

Pre-norm blocks over one sequence. Two things vary: which tokens attend to which (`SequenceLayout.attention`), and which tokens share
parameters. What a block is made of (norm, MLP, cross-attention) are `BlockOptions`. In an ADTransformer (SIT, arXiv 2412.09607, section 4)
the norms, the q, k, v embeddings and the MLP of every block exist twice, for approximation and for detail tokens, while attention itself
is joint; the attention's output projection is shared. Tokens of a type are contiguous, so a sequence is split once into one stream for
each type; the x_by_type meet only in attention, and typed parameters cost two matrix products instead of one, of together as many
operations. Knows nothing of images.
"""

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitlib.model.precision import product_dtype

# Hopper GPUs prefer cuDNN's attention, whose gradients with a mask can be NaN for some lengths (pytorch/pytorch issue 196678), and which
# prepares itself for every new shape. Flash and memory-efficient attention remain.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class SequenceLayout:
    """What the positions of a sequence are: `num_scales` runs of `tokens_per_scale` tokens, and who attends to whom.

    attention: "full"; "scale_causal": a token sees its own and all coarser scales; "causal": itself and earlier positions.
    """

    num_scales: int
    tokens_per_scale: int
    attention: Literal["full", "scale_causal", "causal"] = "full"

    def lengths(self, num_types: int) -> list[int]:
        """Positions of each type with its own parameters, in order: the first scale, then all others."""
        first, stop = self.tokens_per_scale, self.num_scales * self.tokens_per_scale
        return [stop] if num_types == 1 or self.num_scales == 1 else [first, stop - first]


@dataclass(frozen=True)
class BlockOptions:
    """What a block is made of. The defaults are ViT-VQGAN's (arXiv 2110.04627); LlamaGen (arXiv 2406.06525) has "rms", "swiglu", no biases.

    Attributes:
        norm: LayerNorm, or RMSNorm (arXiv 1910.07467).
        mlp: two layers with GELU between, or SwiGLU (arXiv 2002.05202): half as many weights again at the same hidden width.
        bias: whether linear layers and LayerNorm have biases.
        qk_norm: queries and keys of self-attention are normalized (RMSNorm over a head's dimensions, arXiv 2302.05442), so that it
            cannot saturate.
        cross_attention: a second attention, between the first and the MLP, that reads a `Context`.
    """

    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    qk_norm: bool = False
    cross_attention: bool = False

    def make_norm(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, bias=self.bias) if self.norm == "layer" else nn.RMSNorm(width)


@dataclass(frozen=True)
class Context:
    """What cross-attention reads: keys and values of another sequence, computed once by `Transformer.encode_context`.

    Attributes:
        keys_values: for every layer, keys and values [B, H, L, D].
        mask: bool [B, L], True where there is something to read; None: everywhere.
    """

    keys_values: list[tuple[Tensor, Tensor]]
    mask: Tensor | None


class KVCache:
    """Keys and values of all positions seen so far, in memory allocated once.

    Usually attention reads the positions that are filled, one more at every step. That of a static cache reads a multiple of `READ`
    positions, of which a mask hides those to come, and where the next one is written is said by a tensor: steps are then the same
    operations on the same memory, which a CUDA graph can repeat, until attention has to read further.

    Args:
        num_layers, batch_size, num_heads, capacity, head_dim: shape of the store, [layers, 2, B, H, capacity, D].
        static: for a GPU, where starting kernels costs more than what they read in vain.
    """

    READ = 256

    def __init__(
        self,
        num_layers,
        batch_size,
        num_heads,
        capacity,
        head_dim,
        *,
        static=False,
        device=None,
        dtype=None,
    ):
        self.store = torch.zeros(
            num_layers, 2, batch_size, num_heads, capacity, head_dim, device=device, dtype=dtype
        )
        self.length = (
            0  # positions filled by every layer; advanced by the transformer after its last layer
        )
        # The same number for a static cache, where kernels can see it.
        self.position = torch.zeros(1, dtype=torch.int64, device=device) if static else None

    @property
    def capacity(self) -> int:
        return self.store.shape[4]

    def rows(self, count: int) -> slice | Tensor:
        """Index of the next `count` positions in a table of all; on the device, int64 [1], if static and they are not the first."""
        if self.position is None or self.length == 0:
            return slice(self.length, self.length + count)
        return self.position

    def reach(self, count: int) -> int:
        """How many positions attention reads from the next `count`."""
        stop = self.length + count
        if isinstance(self.rows(count), slice):
            return stop
        return min(-(-stop // self.READ) * self.READ, self.capacity)

    def visible(self, count: int) -> Tensor | None:
        """Bool [1, reach], which of them the next `count` positions see; None: all, or as is usual between themselves."""
        if isinstance(at := self.rows(count), slice):
            return None
        return torch.arange(self.reach(count), device=at.device)[None] <= at

    def update(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values of new positions and returns those that attention reads, views of the store."""
        stop = self.length + k_BHTD.shape[2]
        if stop > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, position {stop} was asked for: allocate a larger one."
            )
        (k, v), rows, reach = (
            self.store[layer],
            self.rows(k_BHTD.shape[2]),
            self.reach(k_BHTD.shape[2]),
        )
        k[:, :, rows] = k_BHTD.to(k.dtype)
        v[:, :, rows] = v_BHTD.to(v.dtype)
        return k[:, :, :reach], v[:, :, :reach]

    def advance(self, count: int) -> None:
        """Says that every layer has stored `count` new positions."""
        self.length += count
        if self.position is not None:
            self.position += count


def rope_freqs(places_TP: Tensor, head_dim: int) -> Tensor:
    """Cosines and sines [2, T, head_dim / 2] of rotary positions (arXiv 2104.09864) for `apply_rotary_emb`.

    Args:
        places_TP: coordinates of every token: P = 1 for a sequence, 2 for places in a grid, which then share the frequencies out.

    Raises:
        ValueError: head_dim / 2 is no multiple of P.
    """
    coordinates = places_TP.shape[1]
    if head_dim % (2 * coordinates):
        raise ValueError(
            f"rotary positions of {coordinates} coordinate(s) need heads of a multiple of {2 * coordinates} dimensions, not {head_dim}."
        )
    count = head_dim // (2 * coordinates)
    frequency = 10_000.0 ** (-torch.arange(count, device=places_TP.device) / count)
    angles = (places_TP[:, :, None] * frequency).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rotary_emb(x_BHTD: Tensor, rope_2TF: Tensor) -> Tensor:
    """Queries or keys turned by the angles of their positions; the first half of the dimensions is paired with the second."""
    first, second = x_BHTD.chunk(2, dim=-1)
    cos, sin = rope_2TF.to(x_BHTD.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention(q_BHTD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, **options) -> Tensor:
    """PyTorch's attention; on a CPU in float32, also under autocast.

    In bf16 the backward pass of PyTorch's kernel for CPUs took eight times as long (torch 2.14, Xeon with AMX).
    """
    if q_BHTD.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                q_BHTD.float(), k_BHLD.float(), v_BHLD.float(), **options
            )
    return F.scaled_dot_product_attention(q_BHTD, k_BHLD, v_BHLD, **options)


def attend(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    layout: SequenceLayout,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention [B, H, T, D] under a layout, without a mask: SDPA may then choose its fastest kernel.

    Scale-causal attention is one call per scale: its queries against the keys of its own and coarser scales. That is exact, because
    inside a scale attention is full.

    Args:
        key_mask: bool [B, T], False for keys that nobody sees (the padding of short texts); with attention "full" only, or for one query.
    """
    if key_mask is not None:
        if layout.attention != "full" and q_BHTD.shape[2] > 1:
            raise ValueError(
                f"keys can be hidden in full attention only, not in {layout.attention} attention."
            )
        return attention(q_BHTD, k_BHTD, v_BHTD, attn_mask=key_mask[:, None, None])
    if layout.attention == "scale_causal" and layout.num_scales > 1:
        n, parts = layout.tokens_per_scale, []
        for scale, q_BHND in enumerate(q_BHTD.split(n, dim=2), 1):
            k, v = k_BHTD[:, :, : scale * n], v_BHTD[:, :, : scale * n]
            parts.append(attention(q_BHND, k, v).transpose(1, 2))
        # Joined as the kernel leaves them, a token's heads side by side: the output projection then copies nothing.
        return torch.cat(parts, dim=1).transpose(1, 2)
    # A plain bool: where lengths vary, a compiler makes a symbol of the condition itself, which attention does not take.
    is_causal = True if layout.attention == "causal" and q_BHTD.shape[2] > 1 else False  # noqa: SIM210
    return attention(q_BHTD, k_BHTD, v_BHTD, is_causal=is_causal)


class ContextProjection(nn.Linear):
    """Keys and values, side by side, of what cross-attention reads: all layers read it before the first block computes.

    So sharding gathers these weights by themselves (`sitlib.train.engine`), and those of the rest of a block when it computes.
    """


class CrossAttention(nn.Module):
    """Attention of tokens to a `Context`, pre-norm; part of a block."""

    def __init__(self, width: int, num_heads: int, options: BlockOptions):
        super().__init__()
        self.num_heads = num_heads
        self.norm = options.make_norm(width)
        self.query = nn.Linear(width, width, bias=options.bias)
        self.key_value = ContextProjection(width, 2 * width, bias=options.bias)
        self.out = nn.Linear(width, width, bias=options.bias)

    def encode_context(self, context_BLC: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, D]."""
        parts = self.key_value(context_BLC).chunk(2, dim=-1)
        k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return k.contiguous(), v.contiguous()  # read many times

    def forward(
        self, x_BTC: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask_BL: Tensor | None
    ) -> Tensor:
        """What is to be added to [B, T, C]."""
        q = self.query(self.norm(x_BTC)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        x_BHTD = attention(q, k_BHLD, v_BHLD, attn_mask=mask)
        return self.out(x_BHTD.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm attention and MLP, with one set of typed parameters for each type of token."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        num_types: int = 1,
        dropout: float = 0.0,
        options: BlockOptions | None = None,
    ):
        super().__init__()
        options = options or BlockOptions()
        hidden, bias = int(width * mlp_ratio), options.bias
        self.num_heads, self.gated = num_heads, options.mlp == "swiglu"
        self.attention_norm = nn.ModuleList(options.make_norm(width) for _ in range(num_types))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=bias) for _ in range(num_types))
        self.attention_out = nn.Linear(width, width, bias=bias)
        self.mlp_norm = nn.ModuleList(options.make_norm(width) for _ in range(num_types))
        inner = 2 * hidden if self.gated else hidden
        self.mlp_in = nn.ModuleList(nn.Linear(width, inner, bias=bias) for _ in range(num_types))
        self.mlp_out = nn.ModuleList(nn.Linear(hidden, width, bias=bias) for _ in range(num_types))
        head_dim = width // num_heads
        self.qk_norm = (
            nn.ModuleList(nn.RMSNorm(head_dim) for _ in range(2)) if options.qk_norm else None
        )
        self.cross = CrossAttention(width, num_heads, options) if options.cross_attention else None
        self.dropout = dropout

    def forward(
        self,
        x_by_type: list[Tensor],
        layout: SequenceLayout,
        cache: KVCache | None = None,
        layer: int = 0,
        *,
        rope_2TF: Tensor | None = None,
        key_mask: Tensor | None = None,
        context: Context | None = None,
    ) -> list[Tensor]:
        """Streams [B, T_t, C] of the types present, in the order of their positions -> the same shapes.

        With a cache, the one stream holds only the new positions (all of one type, causal attention). The context is what this layer
        reads. Other arguments as for `Transformer.forward`.
        """
        modules = zip(self.attention_norm, self.qkv, strict=True)
        qkv = _join(
            [linear(norm(x)) for x, (norm, linear) in zip(x_by_type, modules, strict=False)]
        )
        heads = (self.num_heads, -1)
        q, k, v = (
            part.unflatten(-1, heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
        )  # [B, H, T, D]
        if self.qk_norm is not None:
            q, k = (norm(x) for norm, x in zip(self.qk_norm, (q, k), strict=True))
        if rope_2TF is not None:
            q, k = apply_rotary_emb(q, rope_2TF), apply_rotary_emb(k, rope_2TF)
        if cache is not None:
            if q.shape[2] > 1 and cache.length > 0:
                raise ValueError(
                    "several positions at once can only be the first ones of a cache: is_causal aligns at the top left."
                )
            k, v = cache.update(layer, k, v)
        x_BHTD = attend(q, k, v, layout, key_mask)
        x_BTC = self._drop(self.attention_out(x_BHTD.transpose(1, 2).flatten(2)))
        parts = (
            x_BTC.split([x.shape[1] for x in x_by_type], dim=1) if len(x_by_type) > 1 else (x_BTC,)
        )
        x_by_type = [x + part for x, part in zip(x_by_type, parts, strict=True)]
        if self.cross is not None:
            if context is None or len(x_by_type) > 1:
                raise ValueError(
                    "a block with cross-attention needs a context, and tokens of one type."
                )
            ((k, v),) = context.keys_values
            read = self.cross(x_by_type[0], k, v, context.mask)
            x_by_type = [x_by_type[0] + self._drop(read)]
        modules = zip(self.mlp_norm, self.mlp_in, self.mlp_out, strict=True)
        return [
            x + self._drop(mlp_out(self._activate(mlp_in(norm(x)))))
            for x, (norm, mlp_in, mlp_out) in zip(x_by_type, modules, strict=False)
        ]

    def _activate(self, x: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, True) if self.training and self.dropout else x


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        num_layers, width, num_heads, mlp_ratio: its shape.
        num_types: 2 for an ADTransformer, 1 for an ordinary one.
        dropout: on residual branches, in training. Attention weights are not dropped: SDPA has no fast kernel that does so.
        options: what its blocks are made of.

    Attributes:
        gradient_checkpointing: blocks keep only their inputs for the way back and compute everything else again (arXiv 1604.06174).
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_types: int = 1,
        dropout: float = 0.0,
        options: BlockOptions | None = None,
    ):
        super().__init__()
        options = options or BlockOptions()
        self.num_heads = num_heads
        self.width = width
        self.gradient_checkpointing = False
        blocks = [
            Block(width, num_heads, mlp_ratio, num_types, dropout, options)
            for _ in range(num_layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.ModuleList(options.make_norm(width) for _ in range(num_types))
        # Unit gain (LeCun): the usual fixed 0.02 is a quarter of it at width 128, and costs a short run many steps.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        branches = 3 if options.cross_attention else 2
        with torch.no_grad():
            for block in blocks:
                # Keys start like queries: attention begins with tokens that are alike (arXiv 2305.09828).
                for linear in block.qkv:
                    assert isinstance(linear, nn.Linear)
                    query, key, _ = linear.weight.chunk(3)
                    key.add_(query).mul_(0.5**0.5)
                # Residual branches start small, so that depth does not change the scale of the sum (GPT-2's rule).
                outputs = [block.attention_out, *block.mlp_out]
                outputs += [block.cross.out] if block.cross is not None else []
                for linear in outputs:
                    assert isinstance(linear, nn.Linear)
                    linear.weight /= (branches * num_layers) ** 0.5

    def forward(
        self,
        x_BTC: Tensor,
        layout: SequenceLayout,
        cache: KVCache | None = None,
        *,
        rope_2TF: Tensor | None = None,
        key_mask: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """[B, T, C] -> [B, T, C] under `layout`; with a cache, of new positions only, whose keys and values it keeps.

        Args:
            rope_2TF: `rope_freqs` of these positions, where they are rotary.
            key_mask: bool [B, T], False for tokens that nobody attends to.
            context: what cross-attention reads, from `encode_context`.
        """
        lengths = [x_BTC.shape[1]] if cache is not None else layout.lengths(len(self.norm))
        x_by_type = list(x_BTC.split(lengths, dim=1))
        others: dict[str, Any] = {"rope_2TF": rope_2TF, "key_mask": key_mask}
        if cache is not None and key_mask is None:
            others["key_mask"] = cache.visible(x_BTC.shape[1])
        gradient_checkpointing = (
            self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        )
        for layer, block in enumerate(self.blocks):
            if (
                context is not None
            ):  # by itself: the graph of a compiled block would be one for every index
                others["context"] = Context([context.keys_values[layer]], context.mask)
            if gradient_checkpointing:
                x_by_type = checkpoint(
                    block, x_by_type, layout, None, layer, use_reentrant=False, **others
                )
            else:
                x_by_type = block(x_by_type, layout, cache, layer, **others)
        if cache is not None:
            cache.advance(x_BTC.shape[1])
        return _join([norm(x) for x, norm in zip(x_by_type, self.norm, strict=False)])

    def encode_context(self, context_BLC: Tensor, mask_BL: Tensor | None = None) -> Context:
        """Keys and values of a sequence [B, L, C] for the cross-attention of every layer, `mask_BL` True where it holds something."""
        readers = [cast(CrossAttention, cast(Block, block).cross) for block in self.blocks]
        return Context([reader.encode_context(context_BLC) for reader in readers], mask_BL)

    def new_cache(self, batch_size: int, capacity: int, static: bool | None = None) -> KVCache:
        """An empty cache for `capacity` positions of `batch_size` sequences, on the model's device and in its precision.

        Args:
            static: as for `KVCache`; None: on a GPU.
        """
        weight = cast(Block, self.blocks[0]).attention_out.weight
        shape = (
            len(self.blocks),
            batch_size,
            self.num_heads,
            capacity,
            self.width // self.num_heads,
        )
        static = weight.is_cuda if static is None else static
        return KVCache(*shape, static=static, device=weight.device, dtype=product_dtype(weight))


def _join(x_by_type: list[Tensor]) -> Tensor:
    """Streams [B, T_t, C] -> [B, T, C]."""
    return x_by_type[0] if len(x_by_type) == 1 else torch.cat(x_by_type, dim=1)
