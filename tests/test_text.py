"""Token ids of texts: against byte pair encoding done by hand, and as properties of any text."""

import copy
import json
import pickle
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sitlib.model.text import SMALLEST_VOCABULARY, TextTokenizer

CAPTIONS = ["a cat on a mat", "the cat sat", "A hat, a bat", "that fat rat"]
TOKENIZER = TextTokenizer.train(CAPTIONS, 280, 24)
LONG = TextTokenizer.train(CAPTIONS, 280, 400)
SPACE = "Ġ"  # how byte-level encodings write a space


def merges(tokenizer: TextTokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.to_json())["tokenizer"]["model"]["merges"]]


def ids_of_parts(tokenizer: TextTokenizer) -> dict[str, int]:
    return json.loads(tokenizer.to_json())["tokenizer"]["model"]["vocab"]


def words(caption: str) -> list[str]:
    """What is merged inside: for lower-case ASCII letters and single spaces, the words with the space before each."""
    return [SPACE + word for word in caption.split()]


def joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """One pass from left to right; a part that was just made takes in no third one."""
    result, place = [], 0
    while place < len(parts):
        length = 2 if tuple(parts[place : place + 2]) == pair else 1
        result.append("".join(parts[place : place + length]))
        place += length
    return result


def learned_by_hand(captions: list[str], count: int) -> list[tuple[str, str]]:
    """Textbook byte pair encoding: merge the most frequent pair, of equals the one with the lowest ids."""
    frequency = Counter(word for caption in captions for word in words(caption))
    parts_of = {word: list(word) for word in frequency}
    alphabet = sorted(SPACE + "abcdefghijklmnopqrstuvwxyz")  # ids follow the order of characters
    number_of = {letter: number for number, letter in enumerate(alphabet)}
    found = []
    while len(found) < count:
        pairs = Counter()
        for word, times in frequency.items():
            for pair in pairwise(parts_of[word]):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], number_of[pair[0]], number_of[pair[1]]))
        found.append(best)
        number_of.setdefault("".join(best), len(number_of))
        parts_of = {word: joined(parts, best) for word, parts in parts_of.items()}
    return found


class TestLearning:
    def test_three_merges_done_by_hand(self):
        """Words " ab" x 3 and " b" x 1: "ab" and " a" are equally frequent, and a comes before the space's sign."""
        tokenizer = TextTokenizer.train(["ab ab", "ab b"], SMALLEST_VOCABULARY + 3, 8)
        assert merges(tokenizer) == [("a", "b"), (SPACE, "ab"), (SPACE, "b")]
        assert tokenizer.vocabulary == SMALLEST_VOCABULARY + 3
        new = SMALLEST_VOCABULARY  # the ids after all bytes, in the order of learning
        assert tokenizer.encode(["b ab", "AB"]).tolist() == [
            [new + 2, new + 1, 1] + [0] * 5,
            [new + 1, 1] + [0] * 6,
        ]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.text("abc ", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=6)
    )
    def test_merges_and_ids_are_those_of_textbook_bpe(self, captions):
        tokenizer = TextTokenizer.train(captions, SMALLEST_VOCABULARY + 6, 200)
        by_hand = learned_by_hand(captions, 6)
        assert merges(tokenizer) == by_hand and tokenizer.vocabulary == SMALLEST_VOCABULARY + len(
            by_hand
        )
        number_of = {part: number + 2 for part, number in ids_of_parts(tokenizer).items()}
        for caption in captions:
            expected = []
            for word in words(caption):
                parts = list(word)
                for pair in by_hand:
                    parts = joined(parts, pair)
                expected += [number_of[part] for part in parts]
            assert tokenizer.encode([caption])[0, : len(expected) + 1].tolist() == [*expected, 1]

    def test_same_captions_same_tokenizer(self):
        again = TextTokenizer.train((text for text in CAPTIONS), 280, 24)
        assert (
            again == TOKENIZER
            and hash(again) == hash(TOKENIZER)
            and again.to_json() == TOKENIZER.to_json()
        )
        assert TextTokenizer.train(CAPTIONS[:2], 280, 24) != TOKENIZER and LONG != TOKENIZER

    def test_no_more_ids_than_the_captions_have_parts(self):
        small = TextTokenizer.train(["ab"], 5000, 8)
        assert (
            small.vocabulary == SMALLEST_VOCABULARY + 2
            and repr(small) == "TextTokenizer(260 ids, at most 8 tokens)"
        )

    def test_wrong_arguments(self):
        with pytest.raises(ValueError, match="vocabulary is 257; it must be at least 258"):
            TextTokenizer.train(CAPTIONS, 257, 8)
        with pytest.raises(ValueError, match="max_tokens is 1"):
            TextTokenizer.train(CAPTIONS, 300, 1)
        for nothing in ([], ["", "  "]):
            with pytest.raises(ValueError, match="no caption with a word in it"):
                TextTokenizer.train(nothing, 300, 8)


class TestCodes:
    def test_rows_of_one_length(self):
        rows = TOKENIZER.encode(["cat", "the fat cat sat on a mat"])
        assert rows.shape == (2, 24) and rows.dtype == torch.int64
        assert TOKENIZER.encode([]).shape == (0, 24)
        assert torch.equal(rows[:1], TOKENIZER.encode(["cat"]))  # other texts make no difference

    @settings(max_examples=60, deadline=None)
    @given(st.text(max_size=30))
    def test_any_text_comes_back_normalized_with_end_and_padding(self, text):
        expected = " ".join(unicodedata.normalize("NFKC", text).lower().split())
        if not expected:
            with pytest.raises(ValueError, match="is empty"):
                LONG.encode([text])
            return
        (row,) = LONG.encode([text])
        length = int((row != LONG.pad).sum())
        assert row[length - 1] == LONG.end and not row[length:].any()
        assert row[: length - 1].min() > LONG.end and row.max() < LONG.vocabulary
        assert (
            LONG.decode(row)
            == LONG.decode(row.tolist())
            == LONG.decode(row[: length - 1])
            == expected
        )

    @pytest.mark.parametrize(
        "text", ["<pad> <end>", "[unk]", "\x00", "漢字 ñ 👍🏽", "\u200d", "end pad"]
    )
    def test_no_characters_are_special(self, text):
        (row,) = TOKENIZER.encode([text])
        assert (row == TOKENIZER.end).sum() == 1 and TOKENIZER.decode(row) == text

    def test_case_blanks_and_compatible_forms_make_no_difference(self):
        rows = TOKENIZER.encode(["a cat, é", " A\n Cat,  É ", "ａ ｃａｔ, e\u0301"])
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])

    def test_half_a_surrogate_pair_is_a_question_mark(self):
        assert TOKENIZER.decode(TOKENIZER.encode(["cat \ud83d"])[0]) == "cat ?"

    def test_what_is_too_long_is_refused_or_cut(self):
        text = "q" * 24
        assert (
            int((TOKENIZER.encode([text[:22]]) != 0).sum()) == 24
        )  # the space before it, 22 letters, the end
        with pytest.raises(ValueError, match="'q{24}' has 25 tokens, at most 23 are allowed"):
            TOKENIZER.encode(["cat", text])
        with pytest.raises(ValueError, match=r"'q{60}\.\.\.' has 101 tokens"):
            TOKENIZER.encode(["q" * 100])
        cut = TOKENIZER.encode(["cat", text], truncate=True)
        assert (
            cut.shape == (2, 24)
            and cut[1, -1] == TOKENIZER.end
            and TOKENIZER.decode(cut[1]) == "q" * 22
        )
        assert torch.equal(cut[:1], TOKENIZER.encode(["cat"]))
        whole = LONG.encode([text])[0]
        assert torch.equal(cut[1, :-1], whole[:23])

    def test_a_cut_character_is_shown_as_such(self):
        small = TextTokenizer.train(CAPTIONS, 280, 3)
        assert small.decode(small.encode(["漢"], truncate=True)[0]) == "\ufffd"

    @pytest.mark.parametrize("blank", ["", " ", "\n\t", "\u3000"])
    def test_blank_captions_are_refused(self, blank):
        for truncate in (False, True):
            with pytest.raises(ValueError, match="is empty; write what the image shows"):
                TOKENIZER.encode(["cat", blank], truncate=truncate)

    def test_one_text_is_not_a_list(self):
        with pytest.raises(ValueError, match="a list of texts, not one text"):
            TOKENIZER.encode("cat")

    def test_no_text(self):
        rows = TOKENIZER.no_text(3)
        assert rows.tolist() == [[1] + [0] * 23] * 3 and rows.dtype == torch.int64
        assert TOKENIZER.decode(rows[0]) == ""


class TestStoring:
    def test_json_holds_everything(self):
        again = TextTokenizer.from_json(TOKENIZER.to_json())
        assert again == TOKENIZER and again.to_json() == TOKENIZER.to_json()
        assert (again.vocabulary, again.max_tokens, again.pad, again.end) == (280, 24, 0, 1)
        texts = [*CAPTIONS, "something ñew 漢"]
        assert torch.equal(again.encode(texts), TOKENIZER.encode(texts))

    def test_a_model_that_holds_one_can_be_copied(self):
        assert copy.deepcopy(TOKENIZER) == TOKENIZER == pickle.loads(pickle.dumps(TOKENIZER))

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"max_tokens": 8, "tokenizer": {}}'])
    def test_other_text_is_refused(self, text):
        with pytest.raises(ValueError, match="not a text tokenizer that to_json has written"):
            TextTokenizer.from_json(text)
