"""Transformers of approximation and details apart, joined by cross-attention: SIT rejected them."""

import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.model.sequence import Block, BlockOptions
from sitlib.model.transformer import SequenceLayout


class SeparateBlocks(nn.ModuleList):
    """Tokens attend to their own type, then to the other as it comes in here; nothing is shared."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, num_types: int):
        shape, options = (dim, num_heads, mlp_ratio), BlockOptions(cross_attention=True)
        super().__init__(Block(*shape, options=options) for _ in range(num_types))

    def forward(self, x_by_type: list[Tensor], layout: SequenceLayout) -> list[Tensor]:
        """Tokens [B, T_t, C] of both types, with full attention -> the same shapes."""
        outputs = []
        for block, x, other in zip(self, x_by_type, reversed(x_by_type), strict=True):
            normed = F.layer_norm(other, other.shape[-1:])  # gain and bias: in the linear layer
            kv = block.cross.encode_context(normed)  # pyrefly: ignore[missing-attribute]
            outputs.append(block(x, causal=False, context=(*kv, None)))
        return outputs
