"""Texts as token ids: byte-level byte pair encoding (Sennrich et al., arXiv 1508.07909), learned from captions."""

import json
import unicodedata
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

_SPECIAL = 2  # ids before those of `tokenizers`, to which pad and end are unknown: no text can contain them
SMALLEST_VOCABULARY = _SPECIAL + 256  # every byte has an id, so that any text can be encoded


class TextTokenizer:
    """Captions <-> token ids. Made by `train` or `from_json`; two are equal if they give the same ids for all texts.

    Texts are normalized first: compatible forms of a character made one (NFKC), lower case, single spaces.

    Attributes:
        vocabulary: number of ids, `pad` and `end` included.
        max_tokens: length of a row of ids, L.
        pad: id after the end of a text, 0.
        end: id at the end of every text, 1.
    """

    pad = 0
    end = 1

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        if max_tokens < 2:
            raise ValueError(f"max_tokens is {max_tokens}; a text and its end need at least 2.")
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.vocabulary = tokenizer.get_vocab_size() + _SPECIAL

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextTokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        return f"TextTokenizer({self.vocabulary} ids, at most {self.max_tokens} tokens)"

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int, max_tokens: int) -> "TextTokenizer":
        """Learn the tokens from captions; the same ones in the same order give the same tokenizer.

        Args:
            captions: what is typical of the texts to come. Others can be encoded too, with more tokens.
            vocabulary: number of ids, at least 258; fewer are made if the captions have not as many different parts.
            max_tokens: longest text, its end included, at least 2.

        Raises:
            ValueError: no caption with a word in it, or a number that is too small.
        """
        if vocabulary < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocabulary is {vocabulary}; it must be at least {SMALLEST_VOCABULARY}: all bytes, padding and end."
            )
        texts = [text for text in map(_normalized, captions) if text]
        if not texts:
            raise ValueError("there is no caption with a word in it to learn tokens from.")
        tokenizer = Tokenizer(models.BPE())
        # With a space before the first word, so that a word has the same tokens wherever it stands.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - _SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, max_tokens)

    @classmethod
    def of_size(cls, vocabulary: int, max_tokens: int) -> "TextTokenizer":
        """One that has learned nothing, with as many ids: for models that are only measured."""
        ids = {f"<{number}>": number for number in range(vocabulary - _SPECIAL)}
        return cls(Tokenizer(models.BPE(ids, [])), max_tokens)

    def to_json(self) -> str:
        """All of it as text, for a checkpoint; `from_json` takes it back."""
        tokenizer = json.loads(self._tokenizer.to_str())
        return json.dumps(
            {"max_tokens": self.max_tokens, "tokenizer": tokenizer}, ensure_ascii=False
        )

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """The tokenizer that `to_json` described.

        Raises:
            ValueError: the text is not from `to_json`.
        """
        try:
            content = json.loads(text)
            return cls(Tokenizer.from_str(json.dumps(content["tokenizer"])), content["max_tokens"])
        except Exception as error:  # `tokenizers` raises plain Exception
            raise ValueError(
                f"this is not a text tokenizer that to_json has written ({error})."
            ) from None

    def encode(self, captions: Sequence[str], truncate: bool = False) -> Tensor:
        """Token ids int64 [B, max_tokens] of captions: the ids of a text, then `end`, then `pad`.

        Args:
            captions: B texts of any characters, each with something else than blanks.
            truncate: cut what is too long, in place of an error.

        Raises:
            ValueError: a caption is empty, or has more than max_tokens - 1 tokens.
        """
        if isinstance(captions, str):
            raise ValueError("captions are a list of texts, not one text.")
        rows = torch.full((len(captions), self.max_tokens), self.pad, dtype=torch.int64)
        room = self.max_tokens - 1
        for row, caption in zip(rows, captions, strict=True):
            text = _normalized(caption)
            if not text:
                raise ValueError(f"the caption {caption!r} is empty; write what the image shows.")
            ids = [number + _SPECIAL for number in self._tokenizer.encode(text).ids]
            if len(ids) > room and not truncate:
                raise ValueError(
                    f"the caption {text[:60] + '...' if len(text) > 60 else text!r} has {len(ids)} tokens, at most {room} are allowed: "
                    "shorten it."
                )
            ids = [*ids[:room], self.end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def no_text(self, batch: int) -> Tensor:
        """Ids int64 [batch, max_tokens] of the text without words: `end`, then `pad`. For classifier-free guidance."""
        rows = torch.full((batch, self.max_tokens), self.pad, dtype=torch.int64)
        rows[:, 0] = self.end
        return rows

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The normalized text of one row of ids [L], up to its end; a character that was cut in two shows as a question mark."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.end in ids:
            ids = ids[: ids.index(self.end)]
        text = self._tokenizer.decode([number - _SPECIAL for number in ids if number != self.pad])
        return text.removeprefix(" ")


def _normalized(text: str) -> str:
    # In Python, because `tokenizers` follows another version of Unicode. Half a surrogate pair, as broken JSON has, becomes "?".
    text = text.encode("utf-8", "replace").decode()
    return " ".join(unicodedata.normalize("NFKC", text).lower().split())
