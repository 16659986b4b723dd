"""A next-code transformer over the codes of a tokenizer, conditioned on a class or on a text (SIT, arXiv 2412.09607, section 5).

The sequence is a prefix, then all codes, coarsest scale first and row-major inside a scale. The prefix is the class (VIM, arXiv 2110.04627;
LlamaGen, arXiv 2406.06525); or, for texts, a learned start, and every block reads a text encoder by cross-attention (Parti, arXiv
2206.10789). Codes of different codebooks are different vocabularies: each has its own embeddings and its own output head, so no
probability goes to codes that cannot occur. With one scale it is the second stage of ViT-VQGAN. Knows nothing of drawing codes.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.files import load_model, save_model
from sitlib.model.config import AutoregressiveConfig
from sitlib.model.precision import precisely
from sitlib.model.text import TextTokenizer
from sitlib.model.text_encoder import TextEncoder
from sitlib.model.transformer import (
    BlockOptions,
    Context,
    KVCache,
    SequenceLayout,
    Transformer,
    rope_freqs,
)

EMBEDDING_DEVIATION = 0.5


@dataclass(frozen=True)
class CodeModelConfig:
    """An `AutoregressiveConfig` together with what its tokenizer and its data fix: stored in the checkpoint."""

    shape: AutoregressiveConfig
    num_scales: int
    tokens_per_scale: int
    num_codes: int
    num_codebooks: int
    classes: list[str]  # of a class-conditional model
    text_tokenizer: str | None  # of a text-conditional model: `TextTokenizer.to_json()`

    def __post_init__(self):
        if self.shape.text is None and not self.classes:
            raise ValueError("a class-conditional model needs at least one class name")
        if (self.shape.text is None) != (self.text_tokenizer is None):
            raise ValueError("a text-conditional model, and no other, needs a text tokenizer")


@dataclass
class Writing:
    """What is kept while codes are written one after another: nothing of it is computed twice."""

    cache: KVCache
    context: Context | None
    places_TC: Tensor  # what is added to every input: embeddings of scale and position of its code, nothing to the prefix
    rope_2TF: Tensor | None


class AutoregressiveModel(nn.Module):
    """Transformer over codes [B, S, N], given a condition: class ids [B], or token ids of texts [B, L].

    Attributes:
        config: its configuration.
        num_tokens: length T = S N of a code sequence.
        no_class: the class id that stands for "no class given", for classifier-free guidance (arXiv 2207.12598).
        text_tokenizer: makes token ids of texts; None in a class-conditional model.
    """

    def __init__(self, config: CodeModelConfig):
        super().__init__()
        self.config, shape = config, config.shape
        self.num_tokens = config.num_scales * config.tokens_per_scale
        self.no_class = len(config.classes)
        books = min(config.num_codebooks, config.num_scales)
        # Positions at which the codebook changes: all scales share one; or the first and the others; or each has its own.
        edges = [*range(books), config.num_scales]
        self._spans = list(pairwise(edge * config.tokens_per_scale for edge in edges))
        self._vocabulary = [
            book for book, (start, stop) in enumerate(self._spans) for _ in range(start, stop)
        ]

        options = {
            "norm": shape.norm,
            "mlp": shape.mlp,
            "bias": shape.bias,
            "qk_norm": shape.qk_norm,
        }
        size = (shape.width, shape.heads, shape.mlp_ratio)
        is_text = config.text_tokenizer is not None
        self.text_tokenizer = (
            TextTokenizer.from_json(config.text_tokenizer)
            if config.text_tokenizer is not None
            else None
        )
        if is_text:
            self.start = nn.Parameter(torch.randn(shape.width) * EMBEDDING_DEVIATION)
        else:
            self.class_embedding = nn.Embedding(len(config.classes) + 1, shape.width)
        self.code_embedding = nn.ModuleList(
            nn.Embedding(config.num_codes, shape.width) for _ in range(books)
        )
        self.scale_embedding = nn.Embedding(config.num_scales, shape.width)
        is_learned = shape.positions == "learned"
        self.position_embedding = (
            nn.Embedding(config.tokens_per_scale, shape.width) if is_learned else None
        )
        for module in self.modules():
            if isinstance(module, nn.Embedding):  # of the size of what the first block adds to it
                nn.init.normal_(module.weight, std=EMBEDDING_DEVIATION)
        self.transformer = Transformer(
            shape.layers,
            *size,
            dropout=shape.dropout,
            options=BlockOptions(**options, cross_attention=is_text),
        )
        self.text_encoder = (
            TextEncoder(
                self.text_tokenizer.vocabulary,
                shape.text.max_tokens,
                shape.text.layers,
                *size,
                dropout=shape.dropout,
                options=BlockOptions(**options),
            )
            if self.text_tokenizer is not None and shape.text is not None
            else None
        )
        self.heads = nn.ModuleList(
            nn.Linear(shape.width, config.num_codes, bias=shape.bias) for _ in range(books)
        )
        for head in self.heads:  # the first predictions are uniform
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    # -- conditions ----------------------------------------------------------------------------------------------------------------

    def unconditional(self, condition: Tensor) -> Tensor:
        """The condition of the same shape that says nothing: no class, or texts without words."""
        if self.text_tokenizer is None:
            return torch.full_like(condition, self.no_class)
        return self.text_tokenizer.no_text(len(condition))[:, : condition.shape[1]].to(
            condition.device
        )

    def _prefix(self, condition: Tensor) -> tuple[Tensor, Context | None]:
        """Embedding [B, 1, C] before the first code, and what cross-attention reads."""
        if self.text_encoder is None:
            return self.class_embedding(condition)[:, None], None
        return self.start.expand(len(condition), 1, -1), self.transformer.encode_context(
            *self.text_encoder(condition)
        )

    # -- likelihood ----------------------------------------------------------------------------------------------------------------

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Logits [B, S, N, K] of every code given the condition and all codes before it.

        Args:
            codes: [B, S, N] int64.
            condition: class ids [B] int64, of which `no_class` hides the class; or token ids of texts [B, L], 0 where a text has ended.
        """
        codes_BT = codes.flatten(1)
        prefix_B1C, context = self._prefix(condition)
        x_BTC = torch.cat([prefix_B1C, self._embed(codes_BT[:, :-1], 0, self._places())], dim=1)
        x_BTC = F.dropout(x_BTC, self.config.shape.dropout, self.training)
        layout = SequenceLayout(1, self.num_tokens, "causal")
        x_BTC = self.transformer(
            x_BTC, layout, rope_2TF=self._rotation(x_BTC.device), context=context
        )
        logits = [
            head(x_BTC[:, start:stop])
            for head, (start, stop) in zip(self.heads, self._spans, strict=True)
        ]
        return torch.cat(logits, dim=1).unflatten(1, codes.shape[1:])

    def nats_per_token(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Negative log-likelihood [S] by scale, in nats, a mean over batch and positions."""
        return code_nats(self(codes, condition), codes).mean(dim=(0, 2))

    # -- writing one code after another --------------------------------------------------------------------------------------------

    def begin(
        self,
        condition: Tensor,
        length: int | None = None,
        codes_BT: Tensor | None = None,
        static: bool | None = None,
    ) -> tuple[Writing, Tensor]:
        """Starts a sequence: what to keep, and logits [B, K] of the first code, or of the one after the given codes.

        Args:
            condition: as for `forward`.
            length: how many codes will be written, the given ones included; all T by default.
            codes_BT: codes that the sequence starts with, [B, t] with t < length.
            static: whether the steps of one kind (`kind_of_step`) are the same operations on the same memory; by default on a GPU.
        """
        length = self.num_tokens if length is None else length
        x_BTC, context = self._prefix(condition)
        places_TC = self._places()
        if codes_BT is not None:
            x_BTC = torch.cat([x_BTC, self._embed(codes_BT, 0, places_TC)], dim=1)
        cache = self.transformer.new_cache(len(condition), length, static)
        places_TC = F.pad(places_TC[:-1], (0, 0, 1, 0))
        writing = Writing(cache, context, places_TC, self._rotation(x_BTC.device))
        return writing, self._next_logits(writing, x_BTC)

    def proceed(self, writing: Writing, codes_B: Tensor) -> Tensor:
        """Takes the code [B] that was chosen for the next position, and returns logits [B, K] of the one after it."""
        position = writing.cache.length - 1  # of this code; the prefix is in the cache too
        x_B1C = self.code_embedding[self._vocabulary[position]](codes_B)[:, None]
        return self._next_logits(writing, x_B1C + writing.places_TC[writing.cache.rows(1)])

    def kind_of_step(self, writing: Writing) -> tuple[int, int, int]:
        """Of the next `proceed`: the codebooks of the code that it takes and of the one that it predicts, and how far attention reads."""
        length = writing.cache.length
        return self._vocabulary[length - 1], self._vocabulary[length], writing.cache.reach(1)

    def _next_logits(self, writing: Writing, x_BTC: Tensor) -> Tensor:
        layout = SequenceLayout(1, x_BTC.shape[1], "causal")
        turned = writing.rope_2TF
        if turned is not None:
            turned = turned[:, writing.cache.rows(x_BTC.shape[1])]
        x_BTC = self.transformer(
            x_BTC, layout, writing.cache, rope_2TF=turned, context=writing.context
        )
        return precisely(self.heads[self._vocabulary[writing.cache.length - 1]], x_BTC[:, -1])

    # -- embeddings ----------------------------------------------------------------------------------------------------------------

    def _embed(self, codes_BT: Tensor, start: int, places_TC: Tensor) -> Tensor:
        """Codes [B, t] at positions start ... start + t of the sequence -> [B, t, C], positions and scales added."""
        stop = start + codes_BT.shape[1]
        parts = [
            embedding(codes_BT[:, max(first, start) - start : max(min(last, stop) - start, 0)])
            for embedding, (first, last) in zip(self.code_embedding, self._spans, strict=True)
        ]
        return torch.cat(parts, dim=1) + places_TC[start:stop]

    def _places(self) -> Tensor:
        """Embeddings [T, C] of the scale of every code and, where they are learned, of its place."""
        places_SNC = self.scale_embedding.weight[:, None].expand(
            -1, self.config.tokens_per_scale, -1
        )
        if self.position_embedding is not None:
            places_SNC = places_SNC + self.position_embedding.weight
        return places_SNC.flatten(0, 1)

    def _rotation(self, device: torch.device) -> Tensor | None:
        """Rotary positions of the inputs: the prefix at row and column 0, then every code but the last at its place in the grid."""
        if self.config.shape.positions == "learned":
            return None
        side = round(self.config.tokens_per_scale**0.5)
        index = torch.arange(self.num_tokens - 1, device=device) % self.config.tokens_per_scale
        places_TP = torch.stack([index // side, index % side], dim=1) + 1
        places_TP = torch.cat([places_TP.new_zeros(1, 2), places_TP])
        return rope_freqs(places_TP.float(), self.config.shape.width // self.config.shape.heads)

    # -- files ---------------------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path, **about: str) -> None:
        """Writes weights and configuration, the text tokenizer included, to one safetensors file."""
        save_model(path, self, **about)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "AutoregressiveModel":
        """The model in a file that `save` wrote, in evaluation mode."""
        return load_model(path, cls)


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Negative log-likelihood [B, S, N], in nats, of codes [B, S, N] under logits [B, S, N, K]."""
    return F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none").view(
        codes.shape
    )
