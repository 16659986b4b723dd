"""Autoregressive transformer over the codes of a tokenizer (SIT, arXiv 2412.09607, section 5).

The sequence is one prefix token, then all codes: coarsest scale first, row-major inside a scale.
Drawing codes from the predicted probabilities is the work of `sitlib.sample.generate`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sitlib.model.generator_config import AutoregressiveConfig, SamplingConfig
from sitlib.model.sequence import BlockOptions, Context, KVCache, Transformer, rope_freqs
from sitlib.model.text import TextEncoder, TextTokenizer
from sitlib.model.transformer import in_weight_dtype

EMBEDDING_STD = 0.5  # of every embedding: the size of what the first block adds to it


@dataclass(frozen=True)
class CodeModelConfig:
    """All that a checkpoint stores besides weights: transformer, codes, condition, sampling."""

    transformer: AutoregressiveConfig
    num_scales: int
    tokens_per_scale: int
    num_codes: int
    num_codebooks: int
    classes: list[str]  # names of the classes; empty in a text-conditional model
    text_tokenizer: str | None  # `TextTokenizer.to_json()`; None in a class-conditional model
    sampling: SamplingConfig | None = None  # what `generate` does by default

    def __post_init__(self):
        is_text = self.transformer.text is not None
        if not is_text and not self.classes:
            raise ValueError("a class-conditional model needs at least one class name")
        if is_text != (self.text_tokenizer is not None):
            raise ValueError("a text-conditional model, and no other, needs a text tokenizer")


@dataclass
class DecodeState:
    """Everything that decoding one token after another keeps between two steps."""

    cache: KVCache
    context: Context | None  # keys and values of the text
    pos_emb_TC: Tensor  # added to the input at each position: 0 for the prefix
    rope_2TF: Tensor | None


class AutoregressiveModel(nn.Module):
    """Transformer over codes [B, S, N], conditioned on class ids [B] or token ids of texts [B, L].

    A class is the prefix token (VIM, arXiv 2110.04627; LlamaGen, arXiv 2406.06525). A text is read
    by cross-attention (Parti, arXiv 2206.10789), and the prefix is a learned start token. Each
    codebook is a vocabulary with its own embedding and head, so that no probability goes to codes
    that cannot occur. With one scale this is the second stage of ViT-VQGAN.

    Attributes:
        num_tokens: length T = S N of a code sequence.
        no_class: class id that means "no class", for classifier-free guidance (arXiv 2207.12598).
        text_tokenizer: of a text-conditional model, else None.
    """

    def __init__(self, config: CodeModelConfig):
        super().__init__()
        self.config, c = config, config.transformer
        self.num_tokens = config.num_scales * config.tokens_per_scale
        self.no_class = len(config.classes)
        # Codebook b is that of scale b, the last one that of all finer scales, too.
        num_codebooks = min(config.num_codebooks, config.num_scales)
        # A span is the positions (start, end) in the sequence whose codes are of one codebook.
        first_scales = [*range(num_codebooks), config.num_scales]
        self._codebook_spans = list(
            pairwise(scale * config.tokens_per_scale for scale in first_scales)
        )
        self._codebook_at = [
            min(t // config.tokens_per_scale, num_codebooks - 1) for t in range(self.num_tokens)
        ]

        # -- embeddings: condition, codes, scales, places in the grid
        self.text_tokenizer = None
        if config.text_tokenizer is not None:
            self.text_tokenizer = TextTokenizer.from_json(config.text_tokenizer)
            self.start = nn.Parameter(torch.randn(c.width) * EMBEDDING_STD)
        else:
            self.class_embedding = nn.Embedding(len(config.classes) + 1, c.width)
        self.code_embedding = nn.ModuleList(
            nn.Embedding(config.num_codes, c.width) for _ in range(num_codebooks)
        )
        self.scale_embedding = nn.Embedding(config.num_scales, c.width)
        self.position_embedding = (
            nn.Embedding(config.tokens_per_scale, c.width) if c.pos_emb == "learned" else None
        )
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)

        # -- transformer, text encoder of the same blocks, one head for each codebook
        size = (c.width, c.heads, c.mlp_ratio, c.dropout)
        blocks = BlockOptions(c.norm, c.mlp, c.bias, c.qk_norm)
        reading = replace(blocks, cross_attention=c.text is not None)
        self.transformer = Transformer(c.layers, *size, reading)
        self.text_encoder = None
        if self.text_tokenizer is not None and c.text is not None:
            vocab_size = self.text_tokenizer.vocab_size
            self.text_encoder = TextEncoder(
                vocab_size, c.text.max_tokens, c.text.layers, *size, blocks
            )
        # Output heads: c.heads above counts those of the attention.
        self.heads = nn.ModuleList(
            nn.Linear(c.width, config.num_codes, bias=c.bias) for _ in range(num_codebooks)
        )
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)  # the first predictions are uniform

    # -- likelihood ---------------------------------------------------------------------------

    def forward(self, codes: Tensor, cond: Tensor) -> Tensor:
        """Logits [B, S, N, K] of every code, given the condition and all codes before it.

        Args:
            codes: [B, S, N] int64.
            cond: class ids [B] int64, some of which may be `no_class`; or token ids of texts
                [B, L], 0 where a text has ended.
        """
        prefix_B1C, context = self._embed_condition(cond)
        x_BTC = torch.cat([prefix_B1C, self._embed_codes(codes.flatten(1)[:, :-1])], dim=1)
        x_BTC = F.dropout(x_BTC, self.config.transformer.dropout, self.training)
        rope_2TF = self._rope(x_BTC.device)
        x_BTC = self.transformer(x_BTC, True, rope_2TF=rope_2TF, context=context)
        logits = [
            head(x_BTC[:, start:end])
            for head, (start, end) in zip(self.heads, self._codebook_spans, strict=True)
        ]
        return torch.cat(logits, dim=1).unflatten(1, codes.shape[1:])

    def nats_per_token(self, codes: Tensor, cond: Tensor) -> Tensor:
        """Negative log-likelihood [S] by scale, in nats, the mean over batch and places."""
        return code_nats(self(codes, cond), codes).mean(dim=(0, 2))

    # -- decoding, one token after another ----------------------------------------------------

    def prefill(
        self,
        cond: Tensor,
        max_tokens: int | None = None,
        codes_Bt: Tensor | None = None,
        static: bool | None = None,
    ) -> tuple[DecodeState, Tensor]:
        """Pass the condition and the first codes at once -> state, logits [B, K] of the next code.

        Args:
            cond: as for `forward`.
            max_tokens: codes that the sequence may get, the given ones included; T by default.
            codes_Bt: the first t < max_tokens codes of every sequence, if they are given.
            static: use a cache for CUDA graphs (see `KVCache`); by default on a GPU.
        """
        x_BTC, context = self._embed_condition(cond)
        if codes_Bt is not None:
            x_BTC = torch.cat([x_BTC, self._embed_codes(codes_Bt)], dim=1)
        cache = self.transformer.new_cache(len(cond), max_tokens or self.num_tokens, static)
        pos_emb_TC = F.pad(self._pos_emb()[:-1], (0, 0, 1, 0))
        state = DecodeState(cache, context, pos_emb_TC, self._rope(x_BTC.device))
        return state, self._next_logits(state, x_BTC)

    def decode_one_token(self, state: DecodeState, codes_B: Tensor) -> Tensor:
        """Append one code [B] to every sequence -> logits [B, K] of the code after it."""
        codebook = self._codebook_at[state.cache.length - 1]  # the prefix is in the cache, too
        x_B1C = self.code_embedding[codebook](codes_B)[:, None]
        return self._next_logits(state, x_B1C + state.pos_emb_TC[state.cache.rows(1)])

    def graph_key(self, state: DecodeState) -> tuple[int, int, int]:
        """The next `decode_one_token` runs the same kernels as any other with the same key.

        Codebook of the code that it takes and of the one that it predicts, and positions that
        attention reads.
        """
        length = state.cache.length
        return self._codebook_at[length - 1], self._codebook_at[length], state.cache.reach(1)

    def _next_logits(self, state: DecodeState, x_BTC: Tensor) -> Tensor:
        rope_2TF, count = state.rope_2TF, x_BTC.shape[1]
        if rope_2TF is not None:
            rope_2TF = rope_2TF[:, state.cache.rows(count)]
        x_BTC = self.transformer(x_BTC, True, state.cache, rope_2TF=rope_2TF, context=state.context)
        return in_weight_dtype(self.heads[self._codebook_at[state.cache.length - 1]], x_BTC[:, -1])

    # -- inputs -------------------------------------------------------------------------------

    def unconditional(self, cond: Tensor) -> Tensor:
        """The empty condition of the same shape: no class, or texts without words."""
        if self.text_tokenizer is None:
            return torch.full_like(cond, self.no_class)
        return self.text_tokenizer.no_text(len(cond))[:, : cond.shape[1]].to(cond.device)

    def _embed_condition(self, cond: Tensor) -> tuple[Tensor, Context | None]:
        """Prefix token [B, 1, C], and keys and values for cross-attention."""
        if self.text_encoder is None:
            return self.class_embedding(cond)[:, None], None
        context = self.transformer.encode_context(*self.text_encoder(cond))
        return self.start.expand(len(cond), 1, -1), context

    def _embed_codes(self, codes_Bt: Tensor) -> Tensor:
        """The first t codes of sequences -> [B, t, C], scales and places added."""
        x = [
            embedding(codes_Bt[:, start:end])
            for embedding, (start, end) in zip(
                self.code_embedding, self._codebook_spans, strict=True
            )
        ]
        return torch.cat(x, dim=1) + self._pos_emb()[: codes_Bt.shape[1]]

    def _pos_emb(self) -> Tensor:
        """Embedding [T, C] of the scale of every code and, if learned, of its place in the grid."""
        n = self.config.tokens_per_scale
        pos_emb_SNC = self.scale_embedding.weight[:, None].expand(-1, n, -1)
        if self.position_embedding is not None:
            pos_emb_SNC = pos_emb_SNC + self.position_embedding.weight
        return pos_emb_SNC.flatten(0, 1)

    def _rope(self, device: torch.device) -> Tensor | None:
        """Rotary frequencies of all inputs: the prefix at (0, 0), then the grid from (1, 1) on."""
        c, n = self.config.transformer, self.config.tokens_per_scale
        if c.pos_emb == "learned":
            return None
        side = round(n**0.5)
        index = torch.arange(self.num_tokens - 1, device=device) % n
        places_TP = torch.stack([index // side, index % side], dim=1) + 1
        places_TP = torch.cat([places_TP.new_zeros(1, 2), places_TP])
        return rope_freqs(places_TP.float(), c.width // c.heads)


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy [B, S, N] in nats of codes [B, S, N] under logits [B, S, N, K]."""
    nats = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
    return nats.view(codes.shape)
