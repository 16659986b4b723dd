"""A next-code transformer over the codes of a tokenizer, conditioned on a class (SIT, arXiv 2412.09607, section 5).

The sequence is the class, then all codes, coarsest scale first and row-major inside a scale. Approximation and detail codes are different
vocabularies: each has its own embeddings and its own output head, so no probability goes to codes that cannot occur. With one scale it is
the second stage of ViT-VQGAN (arXiv 2110.04627). Knows nothing of sampling.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.checkpoint import load_model, save_model
from sitlib.config import AutoregressiveConfig
from sitlib.transformer import KeyValueCache, SequenceLayout, Transformer


@dataclass(frozen=True)
class CodeModelConfig:
    """An `AutoregressiveConfig` together with what its tokenizer and its data fix: stored in the checkpoint."""

    shape: AutoregressiveConfig
    num_scales: int
    tokens_per_scale: int
    num_codes: int
    classes: list[str]

    def __post_init__(self):
        if not self.classes:
            raise ValueError("a class-conditional model needs at least one class name")


class AutoregressiveModel(nn.Module):
    """Decoder-only transformer over codes [B, S, N] with a class prefix.

    Attributes:
        config: its configuration.
        num_tokens: length T = S N of a code sequence.
        no_class: the class id that stands for "no class given", for classifier-free guidance (arXiv 2207.12598).
    """

    def __init__(self, config: CodeModelConfig):
        super().__init__()
        self.config = config
        shape = config.shape
        self.num_tokens = config.num_scales * config.tokens_per_scale
        self.no_class = len(config.classes)
        num_vocabularies = min(2, config.num_scales)
        self.class_embedding = nn.Embedding(len(config.classes) + 1, shape.width)
        self.code_embedding = nn.ModuleList(
            nn.Embedding(config.num_codes, shape.width) for _ in range(num_vocabularies)
        )
        self.scale_embedding = nn.Embedding(config.num_scales, shape.width)
        self.position_embedding = nn.Embedding(config.tokens_per_scale, shape.width)
        self.transformer = Transformer(
            shape.layers, shape.width, shape.heads, shape.mlp_ratio, dropout=shape.dropout
        )
        self.heads = nn.ModuleList(nn.Linear(shape.width, config.num_codes) for _ in range(num_vocabularies))
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for head in self.heads:  # the first predictions are uniform
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, S, N, K] of every code given the class and all codes before it.

        Args:
            codes: [B, S, N] int64.
            labels: [B] int64 class ids; `no_class` hides the class.
        """
        codes_BT = codes.flatten(1)
        x_BTC = torch.cat([self.embed_class(labels), self.embed_codes(codes_BT[:, :-1], 0)], dim=1)
        x_BTC = F.dropout(x_BTC, self.config.shape.dropout, self.training)
        x_BTC = self.transformer(x_BTC, SequenceLayout(1, self.num_tokens, "causal"))
        first = self.config.tokens_per_scale
        parts = [x_BTC] if len(self.heads) == 1 else [x_BTC[:, :first], x_BTC[:, first:]]
        logits = torch.cat([head(part) for head, part in zip(self.heads, parts, strict=True)], dim=1)
        return logits.unflatten(1, codes.shape[1:])

    def nats_per_token(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood [S] by scale, in nats, a mean over batch and positions."""
        logits = self(codes, labels)
        return (
            F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
            .view(codes.shape)
            .mean(dim=(0, 2))
        )

    def next_logits(self, x_BTC: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, K] of the code after the last embedded position, using and extending the cache."""
        x_BTC = self.transformer(x_BTC, SequenceLayout(1, x_BTC.shape[1], "causal"), cache)
        return self.heads[self._vocabulary(cache.length - 1)](x_BTC[:, -1])

    def embed_class(self, labels: Tensor) -> Tensor:
        """Class ids [B] -> [B, 1, C]."""
        return self.class_embedding(labels)[:, None]

    def embed_codes(self, codes_BT: Tensor, start: int) -> Tensor:
        """Codes [B, T'] at positions start ... start + T' of the sequence -> [B, T', C], positions and scales added."""
        n = self.config.tokens_per_scale
        position = torch.arange(start, start + codes_BT.shape[1], device=codes_BT.device)
        boundary = max(0, n - start) if len(self.code_embedding) > 1 else codes_BT.shape[1]
        parts = [self.code_embedding[0](codes_BT[:, :boundary])]
        if boundary < codes_BT.shape[1]:
            parts.append(self.code_embedding[1](codes_BT[:, boundary:]))
        return (
            torch.cat(parts, dim=1)
            + self.scale_embedding(position // n)
            + self.position_embedding(position % n)
        )

    def _vocabulary(self, position: int) -> int:
        """Which vocabulary the code at `position` comes from: 0 for the approximation, 1 for details."""
        return 0 if position < self.config.tokens_per_scale else len(self.heads) - 1

    def save(self, path: str | Path, **about: str) -> None:
        """Writes weights and configuration to one safetensors file."""
        save_model(path, self, self.config, about)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "AutoregressiveModel":
        """The model in a file that `save` wrote, in evaluation mode."""
        return load_model(path, cls, CodeModelConfig)
