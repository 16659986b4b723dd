"""The transformer block that encoder, decoder and autoregressive model share.

Pre-norm blocks over one sequence. Two things vary: which tokens attend to which (`SequenceLayout.attention`), and which tokens share
parameters. In an ADTransformer (SIT, arXiv 2412.09607, section 4) the norms, the q, k, v embeddings and the MLP of every block exist
twice, for approximation and for detail tokens, while attention itself is joint; the attention's output projection is shared. Tokens of a
type are contiguous, so a sequence is split once into one stream for each type; the streams meet only in attention, and typed parameters
cost two matrix products instead of one, of together as many operations. Knows nothing of images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class KeyValueCache:
    """Keys and values of all positions seen so far, in memory allocated once.

    Args:
        num_layers, batch_size, num_heads, capacity, head_dim: shape of the store, [layers, 2, B, H, capacity, D].
    """

    def __init__(self, num_layers, batch_size, num_heads, capacity, head_dim, *, device=None, dtype=None):
        self.store = torch.zeros(
            num_layers, 2, batch_size, num_heads, capacity, head_dim, device=device, dtype=dtype
        )
        self.length = 0  # positions filled by every layer; advanced by the transformer after its last layer

    @property
    def capacity(self) -> int:
        return self.store.shape[4]

    def update(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values of new positions and returns those of all positions, views of the store."""
        stop = self.length + k_BHTD.shape[2]
        if stop > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions, position {stop} was asked for: allocate a larger one."
            )
        k, v = self.store[layer]
        k[:, :, self.length : stop] = k_BHTD
        v[:, :, self.length : stop] = v_BHTD
        return k[:, :, :stop], v[:, :, :stop]


def attend(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, layout: SequenceLayout, dropout: float = 0.0
) -> Tensor:
    """Softmax attention [B, H, T, D] under a layout, without a mask: SDPA may then choose its fastest kernel.

    Scale-causal attention is one call per scale: its queries against the keys of its own and coarser scales. That is exact, because
    inside a scale attention is full.
    """
    if layout.attention == "scale_causal" and layout.num_scales > 1:
        n, parts = layout.tokens_per_scale, []
        for scale, q_BHND in enumerate(q_BHTD.split(n, dim=2), 1):
            k, v = k_BHTD[:, :, : scale * n], v_BHTD[:, :, : scale * n]
            parts.append(F.scaled_dot_product_attention(q_BHND, k, v, dropout_p=dropout).transpose(1, 2))
        # Joined as the kernel leaves them, a token's heads side by side: the output projection then copies nothing.
        return torch.cat(parts, dim=1).transpose(1, 2)
    is_causal = layout.attention == "causal" and q_BHTD.shape[2] > 1
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, is_causal=is_causal)


class Block(nn.Module):
    """Pre-norm attention and MLP, with one set of typed parameters for each type of token."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, num_types: int = 1, dropout: float = 0.0
    ):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.num_heads = num_heads
        self.attention_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_types))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(num_types))
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_types))
        self.mlp_in = nn.ModuleList(nn.Linear(width, hidden) for _ in range(num_types))
        self.mlp_out = nn.ModuleList(nn.Linear(hidden, width) for _ in range(num_types))
        self.dropout = dropout

    def forward(
        self,
        streams: list[Tensor],
        layout: SequenceLayout,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> list[Tensor]:
        """Streams [B, T_t, C] of the types present, in the order of their positions -> the same shapes.

        With a cache, the one stream holds only the new positions (all of one type, causal attention).
        """
        modules = zip(self.attention_norm, self.qkv, strict=True)
        qkv = _join([linear(norm(x)) for x, (norm, linear) in zip(streams, modules, strict=False)])
        heads = (self.num_heads, -1)
        q, k, v = (part.unflatten(-1, heads).transpose(1, 2) for part in qkv.chunk(3, dim=-1))  # [B, H, T, D]
        if cache is not None:
            if q.shape[2] > 1 and cache.length > 0:
                raise ValueError(
                    "several positions at once can only be the first ones of a cache: is_causal aligns at the top left."
                )
            k, v = cache.update(layer, k, v)
        x_BHTD = attend(q, k, v, layout, self.dropout if self.training else 0.0)
        x_BTC = self._drop(self.attention_out(x_BHTD.transpose(1, 2).flatten(2)))
        parts = x_BTC.split([x.shape[1] for x in streams], dim=1)
        streams = [x + part for x, part in zip(streams, parts, strict=True)]
        modules = zip(self.mlp_norm, self.mlp_in, self.mlp_out, strict=True)
        return [
            x + self._drop(mlp_out(F.gelu(mlp_in(norm(x)))))
            for x, (norm, mlp_in, mlp_out) in zip(streams, modules, strict=False)
        ]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """A stack of blocks and a final norm.

    Args:
        num_layers, width, num_heads, mlp_ratio: its shape.
        num_types: 2 for an ADTransformer, 1 for an ordinary one.
        dropout: on attention weights and residual branches, in training.
    """

    def __init__(self, num_layers, width, num_heads, mlp_ratio=4.0, num_types: int = 1, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.width = width
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, num_types, dropout) for _ in range(num_layers)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(num_types))
        # Unit gain (LeCun): the usual fixed 0.02 is a quarter of it at width 128, and costs a short run many steps.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                for linear in (
                    block.qkv
                ):  # keys start like queries: attention begins with tokens that are alike (arXiv 2305.09828)
                    query, key, _ = linear.weight.chunk(3)
                    key.add_(query).mul_(0.5**0.5)
                # Residual branches start small, so that depth does not change the scale of the sum (GPT-2's rule).
                for linear in (block.attention_out, *block.mlp_out):
                    linear.weight /= (2 * num_layers) ** 0.5

    def forward(self, x_BTC: Tensor, layout: SequenceLayout, cache: KeyValueCache | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C] under `layout`; with a cache, of new positions only, whose keys and values it keeps."""
        lengths = [x_BTC.shape[1]] if cache is not None else layout.lengths(len(self.norm))
        streams = list(x_BTC.split(lengths, dim=1))
        for layer, block in enumerate(self.blocks):
            streams = block(streams, layout, cache, layer)
        if cache is not None:
            cache.length += x_BTC.shape[1]
        return _join([norm(x) for x, norm in zip(streams, self.norm, strict=False)])

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty cache for `capacity` positions of `batch_size` sequences, on the model's device and in its precision."""
        weight = self.blocks[0].attention_out.weight
        shape = (len(self.blocks), batch_size, self.num_heads, capacity, self.width // self.num_heads)
        return KeyValueCache(*shape, device=weight.device, dtype=weight.dtype)


def _join(streams: list[Tensor]) -> Tensor:
    """Streams [B, T_t, C] -> [B, T, C]."""
    return streams[0] if len(streams) == 1 else torch.cat(streams, dim=1)
