"""Transformer over one sequence of tokens: generator and text encoder."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sitlib.model.block import (
    VIT,
    Block,
    BlockOptions,
    CrossAttention,
    KVCache,
    Sight,
    init_blocks,
)

# Another sequence, for cross-attention: keys and values [B, H, L, D] of every layer, and a mask
# [B, L], False for padding; None: there is none.
Context = list[tuple[Tensor, Tensor, Tensor | None]]


class Transformer(nn.Module):
    """Blocks and a final norm."""

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
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

        Arguments as for `Block.forward`, but rotary positions of all tokens with a cache, and the
        context of all layers; `sight` is for use without a cache.
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
                (x,) = checkpoint(block, [x], causal, use_reentrant=False, **options)
            else:
                (x,) = block([x], causal, cache, layer, **options)
        if cache is not None:
            cache.length += count
            if cache.position is not None:
                cache.position += count
        return self.norm(x)

    def encode_context(self, context_BLC: Tensor, mask_BL: Tensor | None = None) -> Context:
        """Keys and values of a sequence for every layer's cross-attention; mask False: padding."""
        readers = [cast(CrossAttention, block.cross) for block in self.blocks]
        return [(*reader.encode_context(context_BLC), mask_BL) for reader in readers]
