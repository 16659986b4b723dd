"""Autoregressive transformer over the codes of a tokenizer (SIT, arXiv 2412.09607, section 5).

The sequence is one prefix token, then all codes: coarsest scale first, row-major inside a scale, or
in another `order`, which only the sequence has; all codes and logits that come and go are [B, S, N].
A model knows which code comes next from the scale and place of the one that it reads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from sitlib.model.block import BlockOptions, KVCache, Sight, rope_freqs
from sitlib.model.config import STRICT, AutoregressiveConfig, SamplingConfig
from sitlib.model.pretrained import Pretrained
from sitlib.model.sequence import Transformer
from sitlib.model.text import TextEncoder, TextTokenizer
from sitlib.strict import require

EMBEDDING_STD = 0.5  # of every embedding: the size of what the first block adds to it


@dataclass(frozen=True, config=STRICT)
class CodeModelConfig:
    """All that a checkpoint stores besides weights: transformer, codes, condition, sampling."""

    transformer: AutoregressiveConfig
    num_scales: int
    tokens_per_scale: int
    codebook_sizes: list[int]  # of each scale
    num_codebooks: int
    classes: list[str]  # names of the classes; empty in a text-conditional model
    text_tokenizer: str | None  # `TextTokenizer.to_json()`; None in a class-conditional model
    sampling: SamplingConfig | None = None  # what `generate` does by default
    code_dim: int = 0  # of the vectors of codes; 0: each code has an embedding of its own

    def __post_init__(self):
        is_both = (self.text_tokenizer is None) == (self.transformer.text is None)
        require(is_both, "text_tokenizer and transformer.text go together: give both or neither")


class VectorEmbedding(nn.Module):
    """Embeddings [..., C] of codes, linear in their vectors, the rows of `vectors` [K, D].

    So what is learned of a code holds for codes like it, of which little data shows few each (the
    embedding is VAR's, arXiv 2404.02905; scores in the same way are ours).
    """

    vectors: Tensor

    def __init__(self, num_codes: int, code_dim: int, width: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(num_codes, code_dim))  # `set_codebooks`
        self.embed = nn.Linear(code_dim, width, bias=False)
        self.score = nn.Linear(width, code_dim, bias=False)
        nn.init.normal_(self.embed.weight, std=EMBEDDING_STD / code_dim**0.5)
        nn.init.zeros_(self.score.weight)

    def forward(self, codes: Tensor) -> Tensor:
        return self.embed(F.embedding(codes, self.vectors))

    def scores(self, x: Tensor) -> Tensor:
        """What [..., C] adds to the logits [..., K] of codes."""
        return self.score(x) @ self.vectors.to(x.dtype).T


@dataclasses.dataclass
class DecodeState:
    """Everything that decoding one token after another keeps between two steps."""

    cache: KVCache
    reading: dict[str, Any]  # rotary positions and the text, for the transformer
    pos_emb_TC: Tensor  # added to the input at each position: 0 for the prefix


class AutoregressiveModel(Pretrained):
    """Transformer over codes [B, S, N], conditioned on class ids [B] or token ids of texts [B, L].

    A class is the prefix token (VIM, arXiv 2110.04627; LlamaGen, arXiv 2406.06525), `no_class`
    means none. A text is read by cross-attention (Parti, arXiv 2206.10789), and the prefix is a
    learned start token. Each codebook is a vocabulary with its own embedding and head, so that no
    probability goes to codes that cannot occur. With one scale this is ViT-VQGAN's second stage.

    A `masked` one does not write code after code but scale after scale: see the methods for it.
    """

    order: Tensor  # [T]: where in codes [S N] each one of the sequence stands

    def __init__(self, config: CodeModelConfig):
        super().__init__()
        self.config, c, n = config, config.transformer, config.tokens_per_scale
        self.num_tokens = config.num_scales * n  # T
        self.no_class = len(config.classes)  # for classifier-free guidance (arXiv 2207.12598)
        # Codebook b is that of scale b, the last one that of all finer scales, too.
        book_sizes = config.codebook_sizes[: config.num_codebooks]
        # Positions where the next one begins.
        self._book_edges = [book * n for book in range(1, len(book_sizes))]
        natural = np.arange(self.num_tokens).reshape(-1, n)
        orders = {"coarse_to_fine": natural, "fine_to_coarse": natural[::-1], "by_place": natural.T}
        orders["random"] = np.random.default_rng(0).permutation(self.num_tokens)
        order = orders[c.order].flatten()
        self.register_buffer("order", torch.tensor(order), persistent=False)
        # Index of the codebook of each code of the sequence.
        self.codebook_of = np.minimum(order // n, len(book_sizes) - 1).tolist()

        # -- embeddings: condition, codes, scales, places in the grid
        self.text_tokenizer = self.text_encoder = None
        if config.text_tokenizer is not None:
            self.text_tokenizer = TextTokenizer.from_json(config.text_tokenizer)
            self.start = nn.Parameter(torch.randn(c.width) * EMBEDDING_STD)
        else:
            if not config.classes:
                raise ValueError("a class-conditional model needs at least one class name.")
            self.class_embedding = nn.Embedding(self.no_class + 1, c.width)
        embedding = partial(VectorEmbedding, code_dim=config.code_dim, width=c.width)
        if not config.code_dim:
            embedding = partial(nn.Embedding, embedding_dim=c.width)
        self.code_embedding = nn.ModuleList(map(embedding, book_sizes))
        self.scale_embedding = nn.Embedding(config.num_scales, c.width)
        self.position_embedding = nn.Embedding(n, c.width) if c.pos_emb == "learned" else None
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
        self.hidden = None  # stands for a code that is not known yet
        if c.masked:
            self.hidden = nn.Parameter(torch.randn(c.width) * EMBEDDING_STD)

        # -- transformer, text encoder of the same blocks, one output head for each codebook
        size = (c.width, c.heads, c.mlp_ratio, c.dropout)
        blocks = BlockOptions(c.norm, c.mlp, c.bias, c.qk_norm)
        reading = replace(blocks, cross_attention=c.text is not None)
        self.transformer = Transformer(c.layers, *size, reading)
        if self.text_tokenizer is not None and c.text is not None:
            vocab_size, text = self.text_tokenizer.vocab_size, c.text
            self.text_encoder = TextEncoder(vocab_size, text.max_tokens, text.layers, *size, blocks)
        self.heads = nn.ModuleList(nn.Linear(c.width, K, bias=c.bias) for K in book_sizes)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)  # the first predictions are uniform

    @torch.no_grad()
    def set_codebooks(self, codebooks: Sequence[Tensor]) -> None:
        """Take the vectors [K, D] of all codes from the codebooks of the tokenizer.

        A new model with `code_dim` needs them; checkpoints hold them. Raises ValueError for others.
        """
        kept = [book.vectors for book in self.code_embedding if isinstance(book, VectorEmbedding)]
        shapes, given = ([tuple(x.shape) for x in vectors] for vectors in (kept, codebooks))
        require(shapes == given, f"the model needs codebooks of shapes {shapes}, not {given}.")
        for vectors, codebook in zip(kept, codebooks, strict=True):
            vectors.copy_(codebook / codebook.square().mean().sqrt())

    # -- likelihood ---------------------------------------------------------------------------

    def forward(self, codes: Tensor, cond: Tensor, is_hidden: Tensor | None = None) -> Tensor:
        """Logits [B, S, N, K] of codes [B, S, N], given the condition and all codes before each.

        Of a masked model: given all coarser scales, and the codes of its own that are not hidden,
        bool [B, S, N] (by default all are: the likelihood of a scale in one pass).
        """
        prefix_B1C, reading = self._embed_condition(cond)
        if self.hidden is None:
            order = self.order
            x_BTC = self._embed_codes(codes.flatten(1))[:, order] + self._pos_emb()
            x_BTC = x_BTC[:, :-1]
            places = self.order[:-1]
        else:
            order = torch.arange(self.num_tokens, device=codes.device)
            if is_hidden is None:
                is_hidden = torch.ones_like(codes, dtype=torch.bool)
            x_BTC, reading["sight"] = self._two_streams(codes, is_hidden)
            places = torch.cat([order[: -self.config.tokens_per_scale], order])
        x_BTC = torch.cat([prefix_B1C, x_BTC], dim=1)
        x_BTC = F.dropout(x_BTC, self.config.transformer.dropout, self.training)
        x_BTC = self.transformer(x_BTC, self.hidden is None, **reading, **self._rotary(places))
        x_BTC = x_BTC[:, -self.num_tokens :].index_select(1, order.argsort())  # of codes [S N]
        parts = enumerate(x_BTC.tensor_split(self._book_edges, dim=1))
        logits = [self._padded(self._logits(book, x)) for book, x in parts]
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

        `codes_Bt` are the first t < max_tokens codes of every sequence, in its order, of which
        there may be up to `max_tokens`, by default T. `static`: a cache for CUDA graphs
        (`KVCache`), by default on a GPU.
        """
        codes_Bt = cond.new_zeros(len(cond), 0) if codes_Bt is None else codes_Bt
        x_BTC, reading = self._embed(cond, codes_Bt)
        static = x_BTC.is_cuda if static is None else static
        cache = KVCache(max_tokens or self.num_tokens, x_BTC.device if static else None)
        state = DecodeState(cache, reading, F.pad(self._pos_emb()[:-1], (0, 0, 1, 0)))
        return state, self._next_logits(state, x_BTC)

    def decode_one_token(self, state: DecodeState, codes_B: Tensor) -> Tensor:
        """Append one code [B] to every sequence -> logits [B, K] of the code after it."""
        # The prefix is in the cache, too: the code is that of the position before.
        x_B1C = self.code_embedding[self.codebook_of[state.cache.length - 1]](codes_B)[:, None]
        return self._next_logits(state, x_B1C + state.pos_emb_TC[state.cache.span(1)[0]])

    # -- writing a scale at a time -------------------------------------------------------------

    def _two_streams(self, codes: Tensor, is_hidden: Tensor) -> tuple[Tensor, Sight]:
        """Inputs of a masked model behind the prefix, and who sees whom.

        First all scales but the finest as they are, each of which sees itself and coarser ones;
        then every scale with hidden codes, which sees itself and coarser ones of the first kind. So
        all scales are learned in one pass, and what is read of a finished scale can be cached.
        """
        assert self.hidden is not None
        n, pos_TC = self.config.tokens_per_scale, self._pos_emb()
        codes_BTC = self._embed_codes(codes.flatten(1))
        clean_BtC = (codes_BTC + pos_TC)[:, :-n]
        hidden_BTC = torch.where(is_hidden.flatten(1)[:, :, None], self.hidden, codes_BTC) + pos_TC
        sight: Sight = [(slice(0, 1), [slice(0, 1)])]
        ends = range(1, 1 + self.num_tokens, n)  # of what is coarser than each scale
        sight += [(slice(end, end + n), [slice(0, end + n)]) for end in ends[:-1]]
        first = 1 + clean_BtC.shape[1]
        for scale, end in enumerate(ends):
            own = slice(first + scale * n, first + scale * n + n)
            sight.append((own, [slice(0, end), own]))
        return torch.cat([clean_BtC, hidden_BTC], dim=1), sight

    def start_scales(self, cond: Tensor) -> DecodeState:
        """Pass the condition -> the state from which `read_scale` goes on."""
        prefix_B1C, reading = self._embed_condition(cond)
        reading |= self._rotary(torch.arange(self.num_tokens, device=cond.device))
        state = DecodeState(KVCache(1 + self.num_tokens), reading, self._pos_emb())
        self.transformer(prefix_B1C, False, state.cache, **reading)
        return state

    def read_scale(
        self, state: DecodeState, codes: Tensor, is_hidden: Tensor | None = None
    ) -> Tensor:
        """Logits [B, N, K_s] of codes [B, N] of the next scale, some of them hidden, bool [B, N].

        Without hidden ones the scale is finished: the state then stands at the one after it.
        """
        n, cache = self.config.tokens_per_scale, state.cache
        scale = (cache.length - 1) // n
        book = min(scale, len(self.heads) - 1)
        x_BNC = self.code_embedding[book](codes)
        if is_hidden is not None:
            assert self.hidden is not None
            x_BNC = torch.where(is_hidden[:, :, None], self.hidden, x_BNC)
        x_BNC = x_BNC + state.pos_emb_TC[scale * n : scale * n + n]
        x_BNC = self.transformer(x_BNC, False, cache, **state.reading)
        if is_hidden is not None:
            cache.length -= n  # the next pass writes over what this one stored
        return self._exact_logits(book, x_BNC)

    def _next_logits(self, state: DecodeState, x_BTC: Tensor) -> Tensor:
        x_BTC = self.transformer(x_BTC, True, state.cache, **state.reading)
        book = self.codebook_of[state.cache.length - 1]
        return self._padded(self._exact_logits(book, x_BTC[:, -1]))

    def _logits(self, book: int, x: Tensor) -> Tensor:
        """Logits [..., K_s] of the codes of a codebook."""
        logits, embedding = self.heads[book](x), self.code_embedding[book]
        return logits + embedding.scores(x) if isinstance(embedding, VectorEmbedding) else logits

    def _exact_logits(self, book: int, x: Tensor) -> Tensor:
        """The same without autocast: no later layer mends the rounding of the last one."""
        with torch.autocast(x.device.type, enabled=False):
            return self._logits(book, x.to(self.scale_embedding.weight.dtype))

    def _padded(self, logits: Tensor) -> Tensor:
        """Logits [..., K_s] of a codebook as those of the largest, whose other codes never occur.

        Not by -inf: guidance subtracts logits.
        """
        missing = max(self.config.codebook_sizes) - logits.shape[-1]
        return F.pad(logits, (0, missing), value=torch.finfo(logits.dtype).min)

    # -- inputs -------------------------------------------------------------------------------

    def unconditional(self, cond: Tensor) -> Tensor:
        """The empty condition of the same shape: no class, or texts of their end alone."""
        if self.text_tokenizer is None:
            return torch.full_like(cond, self.no_class)
        empty = torch.full_like(cond, self.text_tokenizer.pad)
        empty[:, 0] = self.text_tokenizer.end
        return empty

    def _embed(self, cond: Tensor, codes_Bt: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Condition and first codes -> inputs [B, 1 + t, C]; a text, and rotary positions of all T."""
        order = self.order[: codes_Bt.shape[1]]
        codes_BT = codes_Bt.new_zeros(len(cond), self.num_tokens).index_copy(1, order, codes_Bt)
        codes_BtC = self._embed_codes(codes_BT)[:, order] + self._pos_emb()[: len(order)]
        prefix_B1C, reading = self._embed_condition(cond)
        return torch.cat([prefix_B1C, codes_BtC], dim=1), reading | self._rotary(self.order[:-1])

    def _embed_codes(self, codes_BT: Tensor) -> Tensor:
        """Embeddings [B, T, C] of the codes of all scales."""
        parts = zip(self.code_embedding, codes_BT.tensor_split(self._book_edges, 1), strict=True)
        return torch.cat([embedding(codes) for embedding, codes in parts], dim=1)

    def _embed_condition(self, cond: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The prefix [B, 1, C], and a text as the transformer reads it."""
        if self.text_encoder is None:
            return self.class_embedding(cond)[:, None], {}
        context = self.transformer.encode_context(*self.text_encoder(cond))
        return self.start.expand(len(cond), 1, -1), {"context": context}

    def _rotary(self, places: Tensor) -> dict[str, Tensor]:
        """Rotary positions, if the model has them, of the prefix and of codes at places in [S N]."""
        c, n = self.config.transformer, self.config.tokens_per_scale
        if c.pos_emb != "rotary":
            return {}
        index, side = places % n, round(n**0.5)
        # The prefix is at (0, 0), the grid begins at (1, 1).
        places_TP = F.pad(torch.stack([index // side, index % side], dim=1) + 1, (0, 0, 1, 0))
        return {"rope_2TF": rope_freqs(places_TP.float(), c.width // c.heads)}

    def _pos_emb(self) -> Tensor:
        """Embedding [T, C] of the scale of each code in the sequence and, if learned, its place."""
        n = self.config.tokens_per_scale
        pos_emb_SNC = self.scale_embedding.weight[:, None].expand(-1, n, -1)
        if self.position_embedding is not None:
            pos_emb_SNC = pos_emb_SNC + self.position_embedding.weight
        return pos_emb_SNC.flatten(0, 1)[self.order]


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy [B, S, N] in nats of codes [B, S, N] under logits [B, S, N, K]."""
    nats = F.cross_entropy(logits.flatten(0, 2), codes.flatten(), reduction="none")
    return nats.view(codes.shape)
