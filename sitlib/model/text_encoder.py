"""A bidirectional transformer over the tokens of a text: what a text-conditional model reads, and half of a dual encoder.

Trained jointly with what uses it (Parti, arXiv 2206.10789). Knows nothing of words: see `sitlib.model.text`.
"""

import torch
from torch import Tensor, nn

from sitlib.model.transformer import BlockOptions, SequenceLayout, Transformer


class TextEncoder(nn.Module):
    """Token ids -> features of every token.

    Args:
        vocabulary: number of token ids; id 0 is padding.
        max_tokens: longest text, L.
        num_layers, width, num_heads, mlp_ratio, dropout, options: as for `Transformer`.
    """

    def __init__(
        self,
        vocabulary: int,
        max_tokens: int,
        num_layers: int,
        width: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        options: BlockOptions | None = None,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(max_tokens, width)
        self.transformer = Transformer(
            num_layers, width, num_heads, mlp_ratio, dropout=dropout, options=options
        )
        nn.init.normal_(self.token_embedding.weight)  # features of deviation 1, as everywhere
        nn.init.normal_(self.position_embedding.weight, std=0.3)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [B, L] int64, 0 where a text has ended -> features [B, L, C] and a mask [B, L], True where there is a token.

        Every text has at least one token. Padding is seen by nobody, so that a text's features depend neither on it nor on other texts.
        """
        mask_BL, length = tokens_BL != 0, tokens_BL.shape[1]
        position = torch.arange(length, device=tokens_BL.device)
        x_BLC = self.token_embedding(tokens_BL) + self.position_embedding(position)
        layout = SequenceLayout(1, length, "full")
        return self.transformer(x_BLC, layout, key_mask=mask_BL), mask_BL
