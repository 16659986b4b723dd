"""The transformer block of all models here, and what it is made of.

Pre-norm attention and MLP as in ViT; for the tokenizer with parameters of their own for two types
of tokens, for generators and texts with RMSNorm, SwiGLU, rotary positions, cross-attention and a
cache of keys and values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Gradients of cuDNN's attention with a mask can be NaN on Hopper GPUs (pytorch issue 196678), and
# it prepares itself for every new shape. Flash and memory-efficient attention remain.
torch.backends.cuda.enable_cudnn_sdp(False)

# Who sees whom: runs of queries, in order, each with the runs of keys that it sees.
Sight = list[tuple[slice, list[slice]]]


def scale_causal(num_scales: int, tokens_per_scale: int) -> Sight:
    """A token sees its own scale and coarser ones."""
    ends = range(tokens_per_scale, (num_scales + 1) * tokens_per_scale, tokens_per_scale)
    return [(slice(end - tokens_per_scale, end), [slice(0, end)]) for end in ends]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention of [B, H, T, D]; on a CPU in float32, also under autocast."""
    # In bf16 the backward pass took eight times as long (torch 2.14, Xeon with AMX).
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)
    return F.scaled_dot_product_attention(q, k, v, **options)


def attend(q: Tensor, k: Tensor, v: Tensor, sight: Sight | None = None, **options) -> Tensor:
    """Softmax attention of [B, H, T, D]: all see all, or as `sight` says, or by options of `sdpa`.

    With a sight it is a call for each run of queries: exact, and the fastest kernels take no mask.
    """
    if sight is None:
        return sdpa(q, k, v, **options)
    outputs = []
    for rows, runs in sight:
        keys, values = (
            x[:, :, runs[0]] if len(runs) == 1 else torch.cat([x[:, :, run] for run in runs], dim=2)
            for x in (k, v)
        )
        y = sdpa(q[:, :, rows], keys, values)
        outputs.append(y.transpose(1, 2))  # [B, N, H, D], as the kernel leaves it: no copy
    return torch.cat(outputs, dim=1).transpose(1, 2)


@dataclass(frozen=True)
class BlockOptions:
    """Parts of a block. Defaults are ViT-VQGAN's; LlamaGen has "rms", "swiglu" and no biases."""

    norm: Literal["layer", "rms"] = "layer"  # RMSNorm: arXiv 1910.07467
    mlp: Literal["gelu", "swiglu"] = "gelu"  # SwiGLU (arXiv 2002.05202): half as many weights again
    bias: bool = True  # of linear layers and LayerNorm
    qk_norm: bool = False  # of each head, so that attention cannot saturate (arXiv 2302.05442)
    cross_attention: bool = False  # a second attention before the MLP, which reads another sequence

    def make_norm(self, dim: int) -> nn.Module:
        return nn.LayerNorm(dim, bias=self.bias) if self.norm == "layer" else nn.RMSNorm(dim)


VIT = BlockOptions()


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


class CrossAttention(nn.Module):
    """Pre-norm attention of tokens to another sequence, of which keys and values are given."""

    def __init__(self, dim: int, num_heads: int, options: BlockOptions):
        super().__init__()
        self.num_heads = num_heads
        self.norm = options.make_norm(dim)
        self.query = nn.Linear(dim, dim, bias=options.bias)
        self.key_value = nn.Linear(dim, 2 * dim, bias=options.bias)
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
    """Pre-norm self-attention, optional cross-attention, MLP.

    Of `num_types` types of tokens each has its own norms and MLP, and of `qkv_types` its own
    queries, keys and values (1: all share them). Attention is joint, and so is `attention_out`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,  # of residual branches: SDPA's fast kernels have none of weights
        options: BlockOptions = VIT,
        num_types: int = 1,
        qkv_types: int = 1,
    ):
        super().__init__()
        hidden, bias, types = int(dim * mlp_ratio), options.bias, range(num_types)
        self.num_heads, self.dropout, self.gated = num_heads, dropout, options.mlp == "swiglu"
        wide = 2 * hidden if self.gated else hidden
        self.attention_norm = nn.ModuleList(options.make_norm(dim) for _ in types[:qkv_types])
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim, bias=bias) for _ in types[:qkv_types])
        self.attention_out = nn.Linear(dim, dim, bias=bias)
        self.mlp_norm = nn.ModuleList(options.make_norm(dim) for _ in types)
        self.mlp_in = nn.ModuleList(nn.Linear(dim, wide, bias=bias) for _ in types)
        self.mlp_out = nn.ModuleList(nn.Linear(hidden, dim, bias=bias) for _ in types)
        norms = nn.ModuleList(nn.RMSNorm(dim // num_heads) for _ in range(2))
        self.qk_norm = norms if options.qk_norm else None
        self.cross = CrossAttention(dim, num_heads, options) if options.cross_attention else None

    def forward(
        self,
        x_by_type: list[Tensor],
        causal: bool = False,
        cache: KVCache | None = None,
        layer: int = 0,
        *,
        sight: Sight | None = None,
        rope_2TF: Tensor | None = None,
        mask_BT: Tensor | None = None,
        context: tuple[Tensor, Tensor, Tensor | None] | None = None,
    ) -> list[Tensor]:
        """Tokens [B, T_t, C] of each type that is present -> the same shapes.

        Args:
            causal, sight: who sees whom, one of them; default: all see all.
            cache, layer: where keys and values of earlier tokens are, and these are stored.
            rope_2TF: `rope_freqs` of these tokens.
            mask_BT: False for padding, which no token sees (with neither of the two).
            context: keys and values of another sequence, and a mask of it, for cross-attention.
        """
        count = len(x_by_type)
        modules = zip(x_by_type, [*self.attention_norm] * count, [*self.qkv] * count, strict=False)
        parts = [linear(norm(x)) for x, norm, linear in modules]
        qkv = torch.cat(parts, dim=1) if count > 1 else parts[0]  # [B, T, 3C]
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, T, D]
            for x in qkv.chunk(3, dim=-1)
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
        y = attend(q, k, v, sight, attn_mask=mask, is_causal=is_causal)
        y = self._dropped(self.attention_out(y.transpose(1, 2).flatten(2)))
        y_by_type = y.split([x.shape[1] for x in x_by_type], dim=1)
        x_by_type = [x + y for x, y in zip(x_by_type, y_by_type, strict=True)]
        if self.cross is not None:
            assert context is not None
            x_by_type = [x + self._dropped(self.cross(x, *context)) for x in x_by_type]
        return [x + self._dropped(self._mlp(kind, x)) for kind, x in enumerate(x_by_type)]

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def _mlp(self, kind: int, x: Tensor) -> Tensor:
        """The MLP of a type of tokens, its norm included."""
        hidden = self.mlp_in[kind](self.mlp_norm[kind](x))
        if self.gated:
            gate, value = hidden.chunk(2, dim=-1)
            return self.mlp_out[kind](F.silu(gate) * value)
        return self.mlp_out[kind](F.gelu(hidden))


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
