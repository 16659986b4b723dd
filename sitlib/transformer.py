"""The transformer block that encoder, decoder and autoregressive model share.

Pre-norm blocks over one sequence. Two things vary: which tokens attend to which (`SequenceLayout.attention`), and which tokens share
parameters. In an ADTransformer (SIT, arXiv 2412.09607, section 4) the norms, the q, k, v embeddings and the MLP of every block exist
twice, for approximation and for detail tokens, while attention itself is joint; the attention's output projection is shared. Tokens of a
type are contiguous, so typed parameters cost two matrix products instead of one and no gather. Knows nothing of images.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Types of tokens in an ADTransformer; a model without typed parameters has only type 0.
APPROXIMATION, DETAIL = 0, 1


@dataclass(frozen=True)
class SequenceLayout:
    """What the positions of a sequence are: `num_scales` runs of `tokens_per_scale` tokens, and who attends to whom.

    attention: "full"; "scale_causal": a token sees its own and all coarser scales; "causal": itself and earlier positions.
    """

    num_scales: int
    tokens_per_scale: int
    attention: Literal["full", "scale_causal", "causal"] = "full"

    def runs(self, num_types: int) -> list[tuple[int, int, int]]:
        """Contiguous (start, stop, type) with their own parameters: the first scale, then all others."""
        first, stop = self.tokens_per_scale, self.num_scales * self.tokens_per_scale
        if num_types == 1 or self.num_scales == 1:
            return [(0, stop, APPROXIMATION)]
        return [(0, first, APPROXIMATION), (first, stop, DETAIL)]


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
        n = layout.tokens_per_scale
        parts = [
            F.scaled_dot_product_attention(
                q_BHTD[:, :, start : start + n],
                k_BHTD[:, :, : start + n],
                v_BHTD[:, :, : start + n],
                dropout_p=dropout,
            )
            for start in range(0, q_BHTD.shape[2], n)
        ]
        return torch.cat(parts, dim=2)
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
        self, x_BTC: Tensor, layout: SequenceLayout, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """[B, T, C] -> [B, T, C]. With a cache, x holds only the new positions (all of one type, causal attention)."""
        batch, length, width = x_BTC.shape
        runs = layout.runs(len(self.qkv)) if cache is None else [(0, length, APPROXIMATION)]

        def per_type(function, x):
            if len(runs) == 1:
                return function(x, runs[0][2])
            return torch.cat([function(x[:, start:stop], kind) for start, stop, kind in runs], dim=1)

        qkv = per_type(lambda x, kind: self.qkv[kind](self.attention_norm[kind](x)), x_BTC)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        if cache is not None:
            if length > 1 and cache.length > 0:
                raise ValueError(
                    "several positions at once can only be the first ones of a cache: is_causal aligns at the top left."
                )
            k, v = cache.update(layer, k, v)
        x = attend(q, k, v, layout, self.dropout if self.training else 0.0)
        x = self.attention_out(x.transpose(1, 2).reshape(batch, length, width))
        x_BTC = x_BTC + F.dropout(x, self.dropout, self.training)

        def mlp(x, kind):
            return self.mlp_out[kind](F.gelu(self.mlp_in[kind](self.mlp_norm[kind](x)), approximate="tanh"))

        return x_BTC + F.dropout(per_type(mlp, x_BTC), self.dropout, self.training)


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
        for layer, block in enumerate(self.blocks):
            x_BTC = block(x_BTC, layout, cache, layer)
        if cache is not None:
            cache.length += x_BTC.shape[1]
            return self.norm[APPROXIMATION](x_BTC)
        return torch.cat(
            [self.norm[kind](x_BTC[:, a:b]) for a, b, kind in layout.runs(len(self.norm))], dim=1
        )

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty cache for `capacity` positions of `batch_size` sequences, on the model's device and in its precision."""
        weight = self.blocks[0].attention_out.weight
        shape = (len(self.blocks), batch_size, self.num_heads, capacity, self.width // self.num_heads)
        return KeyValueCache(*shape, device=weight.device, dtype=weight.dtype)
