"""Texts as token ids, by byte-level BPE (Sennrich et al., arXiv 1508.07909), and their encoder."""

import json
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from sitlib.model.sequence import Transformer
from sitlib.strict import require

_SPECIAL = 2  # ids of padding and end come first; `tokenizers` knows nothing of them


class TextTokenizer:
    """Captions <-> token ids, made by `train` or `from_json`; `end` follows every text, then `pad`.

    Texts are normalized: compatible forms made one (NFKC), lower case, single spaces.
    """

    pad = 0
    end = 1

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocab_size = tokenizer.get_vocab_size() + _SPECIAL

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, max_tokens: int) -> "TextTokenizer":
        """Learn the merges from captions; a function of the captions and their order.

        Of the ids, at least 258 are needed: all bytes, so that any text can be encoded, padding and
        end. Fewer than `vocab_size` are made if there is no more to merge.
        """
        texts = [text for text in map(_normalize, captions) if text]
        require(bool(texts), "there is no caption with a word in it to learn tokens from.")
        tokenizer = Tokenizer(models.BPE())
        # A space before the first word, too: a word has the same tokens wherever it stands.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - _SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, max_tokens)

    @classmethod
    def of_size(cls, vocab_size: int, max_tokens: int) -> "TextTokenizer":
        """A stand-in with that many ids, for models whose size or speed is measured."""
        ids = {f"<{number}>": number for number in range(vocab_size - _SPECIAL)}
        return cls(Tokenizer(models.BPE(ids, [])), max_tokens)

    def to_json(self) -> str:
        """The tokenizer as text, for a checkpoint."""
        content = {"max_tokens": self.max_tokens, "tokenizer": json.loads(self._tokenizer.to_str())}
        return json.dumps(content, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The tokenizer that `to_json` wrote."""
        content = json.loads(text)
        return cls(Tokenizer.from_str(json.dumps(content["tokenizer"])), content["max_tokens"])

    def encode(self, captions: Sequence[str], truncate: bool = False) -> Tensor:
        """Captions -> token ids int64 [B, max_tokens]: the text, then `end`, then `pad`."""
        if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
            raise ValueError("captions must be a list of texts, one for each image.")
        rows = torch.full((len(captions), self.max_tokens), self.pad, dtype=torch.int64)
        room = self.max_tokens - 1
        for row, caption in zip(rows, captions, strict=True):
            text = _normalize(caption)
            require(bool(text), f"the caption {caption!r} is empty; write what the image shows.")
            ids = [number + _SPECIAL for number in self._tokenizer.encode(text).ids]
            many = f"the caption {text[:60]!r} has {len(ids)} tokens, at most {room} are allowed"
            require(truncate or len(ids) <= room, f"{many}: shorten it.")
            ids = [*ids[:room], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """One row of ids [L] -> its normalized text; a cut character becomes a replacement mark."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        text = self._tokenizer.decode([number - _SPECIAL for number in ids if number != self.pad])
        return text.removeprefix(" ")


def _normalize(text: str) -> str:
    # Not by `tokenizers`, which follows another version of Unicode. Half a surrogate pair, as
    # broken JSON has, becomes "?".
    text = text.encode("utf-8", "replace").decode()
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


class TextEncoder(nn.Module):
    """Bidirectional `Transformer` over token ids, trained jointly with what uses it (Parti)."""

    def __init__(self, vocab_size: int, max_tokens: int, layers: int, width: int, *shape, **other):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_tokens, width)
        self.transformer = Transformer(layers, width, *shape, **other)
        nn.init.normal_(self.token_embedding.weight)
        nn.init.normal_(self.position_embedding.weight, std=0.3)

    def forward(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, L], 0 where a text has ended -> features [B, L, C], mask [B, L] of its tokens.

        Every text has a token. Padding is masked: features depend neither on it nor on other texts.
        """
        mask_BL = tokens_BL != 0
        position = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
        x_BLC = self.token_embedding(tokens_BL) + self.position_embedding(position)
        return self.transformer(x_BLC, mask_BT=mask_BL), mask_BL
