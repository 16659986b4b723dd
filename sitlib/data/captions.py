"""Images with captions: sentences built from the names in the records, or a COCO captions file.

A caption from names is short and says what the picture shows. The phrasings that training sees ("training") and those that only test
prompts use ("new") share no sentence, so that new words for a known thing can be told from known words.
"""

import re
import unicodedata
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

from sitlib.data.coco import coco_images, listed
from sitlib.data.index import DataError
from sitlib.data.layout import find_split
from sitlib.data.sources import ImageSource, open_images, unlabelled

Phrasing = Literal["training", "new"]
# Every template has the name, so that captions of different things differ. At least seven of each kind need nothing else.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "training": (
        "{name}",
        "emoji: {name}",
        "an emoji of {name}",
        "a picture of {name}",
        "an icon that shows {name}",
        "a 3d emoji, {name}",
        "{name}, on a white background",
        "{category}: {name}",
        "{subcategory}: {name}",
        "{name}, also called {keyword}",
        "{keyword}, that is {name}",
    ),
    "new": (
        "draw {name}",
        "please show me {name}",
        "a small drawing of {name}",
        "a sticker of {name}",
        "a glossy 3d rendering of {name}",
        "i would like to see {name}",
        "white all around, in the middle {name}",
        "something from {category}, namely {name}",
        "of the kind {subcategory}, one image of {name}",
        "{name}, or in other words {keyword}",
    ),
}
# More of them for training, used where more captions of an image are asked for than there are templates above.
MORE = (
    "the {name} symbol",
    "an image with {name} in it",
    "this is {name}",
    "here is {name}",
    "{name} as an icon",
    "{name} in the style of an emoji",
    "a colourful {name}",
    "a simple {name}",
    "a cute little {name}",
    "a shiny {name} in 3d",
    "{name}, isolated",
    "{name}, and nothing else",
    "a photo of {name}",
    "what {name} looks like",
    "you can find {name} here",
    "we are looking at {name}",
    "one of the emoji: {name}",
    "a digital illustration of {name}",
    "high quality clip art of {name}",
    "the object in this picture is {name}",
    "it depicts {name} and has no background",
    "the emoji that people use for {name}",
    "{name}, seen from the front",
    "create {name} for me",
    "an example of {category}: {name}",
    "{name} belongs to {category}",
    "among {subcategory} there is {name}",
    "{name}, a sort of {subcategory}",
    "{name} or {keyword}",
    "{keyword} and {name} mean the same",
    "some call it {keyword}, others {name}",
    "{name}; {keyword}",
)


@dataclass
class CaptionedImages:
    """The images of one split and what is said of each; all three are in the same order.

    `names` says what each image is of (for emoji the base name, for COCO the image's key), by which captions of one thing are known as
    such.
    """

    images: ImageSource
    captions: list[list[str]]  # at least one for every image
    names: list[str]


def open_captioned(
    source: str | Path,
    split: str,
    captions: str | Path,
    *,
    phrasing: Phrasing = "training",
    seed: int = 0,
    count: int = 4,
) -> CaptionedImages:
    """Open one split of a data source together with its captions.

    Args:
        source: as for `open_images`; for a COCO file an image folder.
        split: name of the split.
        captions: "records": the `captions` of the shards' records, as `sitlib.data.convert` writes them. "names": built from the records
            (`name`, and where they have them `base_name`, `short_names`, `category`, `subcategory`), see `emoji_captions`. Otherwise the
            path of a COCO captions file, whose `file_name`s are paths in the folder.
        phrasing, seed, count: for `emoji_captions`; the others have their own captions.

    `{split}` in `source` and `captions` is replaced by the split's name, and where that does not exist by one that stands in for it:
    "test" is also "val" (`data/coco` with `data/coco/annotations/captions_{split}2017.json`). Where the source has no `{split}`, the split
    consists of the same images as for `open_images`, unless only the JSONs are separate. Images of a COCO file have no classes; one that is
    not in the folder, cannot be read or has no caption is left out, with one warning for all of them.

    Raises:
        DataError: source, split, folder or JSON is missing, the JSON is not a COCO captions file, no image with a caption can be used, or
            a record has no name or no captions.
        ValueError: unknown phrasing, or a count below 1.
    """
    _check(
        phrasing, count
    )  # also where it has no effect: a misspelt setting should not wait for the next data set
    if str(captions) not in ("names", "records"):
        return _open_coco(source, split, captions)
    images = open_images(source, split)
    index, _ = find_split(source, split)  # has the records without decoding the images
    record_of = {key: {**index.record(row), "key": key} for row, key in enumerate(index.keys)}
    records = [record_of[key] for key in images.keys]
    if str(captions) == "records":
        return CaptionedImages(images, _written_captions(images, records), images.keys)
    try:
        texts = [emoji_captions(record, phrasing, seed, count) for record in records]
    except DataError as error:
        raise DataError(f"{images.where} has no names to build captions from: {error}") from None
    return CaptionedImages(
        images, texts, [record.get("base_name", record["name"]) for record in records]
    )


def _written_captions(images: ImageSource, records: list[dict[str, Any]]) -> list[list[str]]:
    texts = [record.get("captions") for record in records]
    for record, captions in zip(records, texts, strict=True):
        if (
            not isinstance(captions, list)
            or not captions
            or not all(isinstance(text, str) for text in captions)
        ):
            raise DataError(
                f"The record of {record['key']!r} in {images.where} has no list `captions` of texts: convert the images with their "
                "captions (python -m sitlib.data.convert), or name a COCO captions file."
            )
    return cast(list[list[str]], texts)


def emoji_captions(
    record: dict[str, Any], phrasing: Phrasing = "training", seed: int = 0, count: int = 4
) -> list[str]:
    """Captions of an image by its record: `key` and `name`, and where it has them `short_names`, `category`, `subcategory`.

    Lower case; the skin tones in `name` are kept, because they are visible. Which templates are used, and in which order, is a pure
    function of `seed` and the record's `key`. A smaller count begins a larger one.

    Returns:
        `count` different captions, or fewer where the phrasing has not as many templates for this record (seven and more).
        Training has more than eleven if more are asked for.

    Raises:
        DataError: the record has no name.
        ValueError: unknown phrasing, or a count below 1.
    """
    _check(phrasing, count)
    name = _spoken(record.get("name"))
    if not name:
        raise DataError(
            f"the record of {record.get('key')!r} has no `name` with a letter or digit."
        )
    values = {
        "name": name,
        "keyword": _keyword(name, record.get("short_names") or []),
        "category": _spoken(record.get("category")),
        "subcategory": _spoken(record.get("subcategory")).replace("-", " "),
    }

    def is_usable(template: str) -> bool:
        return all(value or f"{{{field}}}" not in template for field, value in values.items())

    def place(template: str) -> bytes:
        words = f"{seed}\n{record.get('key')}\n{template}"
        return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    templates = sorted(TEMPLATES[phrasing], key=place)
    if phrasing == "training" and count > len(templates):
        templates += sorted(MORE, key=place)
    texts = (template.format(**values) for template in templates if is_usable(template))
    return list(dict.fromkeys(texts))[:count]


def _check(phrasing: str, count: int) -> None:
    if phrasing not in TEMPLATES:
        raise ValueError(
            f"There is no phrasing {phrasing!r}: choose {' or '.join(map(repr, TEMPLATES))}."
        )
    if count < 1:
        raise ValueError(f"count is {count}; every image needs at least one caption.")


def _spoken(text: Any) -> str:
    """A name as it is said in a sentence: lower case, letters, digits, and of punctuation only what words and lists need."""
    if not isinstance(text, str):
        return ""
    text = unicodedata.normalize("NFC", text).lower()
    # A character is visible in the picture, its number is not.
    text = re.sub(
        r"\bideograph-([0-9a-f]{4,5})\b", lambda found: f"ideograph {chr(int(found[1], 16))}", text
    )
    replacements = {"keycap: *": "keycap asterisk", ":": ",", "&": " and ", "’": "'", ".": ""}
    for written, said in replacements.items():
        text = text.replace(written, said)
    text = "".join(
        c if c in "',-" or unicodedata.category(c)[0] not in "PSC" else " " for c in text
    )
    text = re.sub(r"(?<!\w)-|-(?!\w)", " ", text)  # a dash between words, not the hyphen of one
    # Two persons of one skin tone: saying it once is enough.
    parts = [part for part in (" ".join(part.split()) for part in text.split(",")) if part]
    if len(parts) > 1 and parts[-1] == parts[-2] and parts[-1].endswith("skin tone"):
        parts.pop()
    text = ", ".join(parts)
    return text if any(c.isalnum() for c in text) else ""


def _keyword(name: str, short_names: list[str]) -> str:
    """The first short name that says more than the name, with spaces; "" if there is none.

    Codes say nothing: numbered ones ("cat2", "clock230", "+1"), and those that add no word of three letters ("flag-so", "x").
    """
    known = set(re.findall(r"\w+", name))
    for short in short_names:
        words = re.sub(r"[_-]+", " ", str(short).lower()).split()
        if all(word.isalpha() for word in words) and any(
            len(word) > 2 and word not in known for word in words
        ):
            return " ".join(words)
    return ""


def _open_coco(source: str | Path, split: str, captions: str | Path) -> CaptionedImages:
    found = coco_images(source, split, captions)
    images = unlabelled(found.index, f"the split {split!r} of {source}")
    damaged = [f"{Path(name).name}: {reason}" for name, reason in images.skipped]
    left_out = "; ".join(filter(None, [found.left_out, listed(damaged, "unreadable")]))
    if not len(images):
        raise DataError(
            f"None of the {len(found.captions_of)} images that {found.file} lists can be used for the split {split!r} of {source}"
            + (f": {left_out}." if left_out else ".")
        )
    if left_out:
        number = found.num_left_out + len(damaged)
        warnings.warn(
            f"{number} of the {len(found.captions_of)} images that {found.file} lists are left out: {left_out}",
            stacklevel=3,
        )
    return CaptionedImages(images, [found.captions_of[name] for name in images.keys], images.keys)
