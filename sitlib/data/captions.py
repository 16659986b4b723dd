"""Images with captions: built from the names in the records, written in them, or a COCO file."""

import json
import re
import unicodedata
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from sitlib.data.decode import DataError, Sample
from sitlib.data.images import (
    SPLIT_OF,
    SPLITS,
    STAND_INS,
    ImageSource,
    open_images,
    source_of,
    split_folders,
)

Phrasing = Literal["training", "new"]


def _templates(table: str) -> list[str]:
    return [template.strip() for template in table.replace("\n", "|").split("|")]


# The phrasings that training sees and the new ones of test prompts share no sentence, so that new
# words for a known thing can be told from known words. Every template has the name, so that
# captions of different things differ, and at least seven of each phrasing need nothing else.
TEMPLATES = {
    "training": _templates("""{name} | emoji: {name} | an emoji of {name} | a picture of {name}
        an icon that shows {name} | a 3d emoji, {name} | {name}, on a white background
        {category}: {name} | {subcategory}: {name}
        {name}, also called {keyword} | {keyword}, that is {name}"""),
    "new": _templates("""draw {name} | please show me {name} | a small drawing of {name}
        a sticker of {name} | a glossy 3d rendering of {name} | i would like to see {name}
        white all around, in the middle {name} | something from {category}, namely {name}
        of the kind {subcategory}, one image of {name} | {name}, or in other words {keyword}"""),
}
# For training, where more captions of an image are asked for than there are templates above.
MORE = _templates("""the {name} symbol | an image with {name} in it | this is {name}
    here is {name} | {name} as an icon | {name} in the style of an emoji | a colourful {name}
    a simple {name} | a cute little {name} | a shiny {name} in 3d | {name}, isolated
    {name}, and nothing else | a photo of {name} | what {name} looks like
    you can find {name} here | we are looking at {name} | one of the emoji: {name}
    a digital illustration of {name} | high quality clip art of {name}
    the object in this picture is {name} | it depicts {name} and has no background
    the emoji that people use for {name} | {name}, seen from the front | create {name} for me
    an example of {category}: {name} | {name} belongs to {category}
    among {subcategory} there is {name} | {name}, a sort of {subcategory} | {name} or {keyword}
    {keyword} and {name} mean the same | some call it {keyword}, others {name}
    {name}; {keyword}""")


@dataclass
class CaptionedImages:
    """Images of one split and their captions, in the same order."""

    images: ImageSource
    captions: list[list[str]]  # at least one for every image
    names: list[str]  # of what each image shows; captions of one name are of the same thing
    groups: list[str]  # the same in no particular gender (COOK of MAN COOK), or the names


def open_captioned(
    source: str | Path,
    split: str,
    captions: str | Path,
    *,
    phrasing: Phrasing = "training",
    seed: int = 0,
    count: int = 4,
) -> CaptionedImages:
    """Open one split of a data source (see `open_images`) together with its captions.

    `captions` is "records": those in the shards' records, as `sitlib.data.convert` writes them;
    "names": built by `emoji_captions`; or the path of a COCO captions file, see `coco_split`.
    """
    if str(captions) not in ("names", "records"):
        samples, captions_of = coco_split(source, split, captions)
        images = source_of(samples, [], where=f"the split {split!r} of {source}")
        texts = [captions_of[key] for key in images.keys]
        return CaptionedImages(images, texts, images.keys, images.keys)
    images = open_images(source, split)
    records: list[dict[str, Any]] = [{**s.record(), "key": s.key} for s in images.samples]
    if str(captions) == "names":
        texts = [emoji_captions(record, phrasing, seed, count) for record in records]
        names = [record.get("base_name", record["name"]) for record in records]
        groups = [record.get("group", name) for record, name in zip(records, names, strict=True)]
        return CaptionedImages(images, texts, names, groups)
    if silent := [r["key"] for r in records if not _are_texts(r.get("captions"))]:
        lacks = f"The record of {silent[0]!r} in {images.where} has no list `captions` of texts"
        raise DataError(f"{lacks}: convert the images with them, or name a COCO captions file.")
    texts = [record["captions"] for record in records]
    return CaptionedImages(images, texts, images.keys, images.keys)


def _are_texts(captions: Any) -> bool:
    is_list = isinstance(captions, list) and captions != []
    return is_list and all(isinstance(text, str) and text.strip() for text in captions)


def emoji_captions(
    record: dict[str, Any], phrasing: Phrasing = "training", seed: int = 0, count: int = 4
) -> list[str]:
    """`count` different captions of an image by its record: `key`, `name`, where it has them
    `short_names`, `category`, `subcategory`.

    Lower case, with skin tones, which are visible; in an order that is a pure function of `seed`
    and `key`; fewer where the phrasing has not as many templates for this record.
    """
    if not (name := _normalize(record.get("name"))):
        raise DataError(f"The record of {record.get('key')!r} has no `name` for captions.")
    values = {
        "name": name,
        "keyword": _keyword(name, record.get("short_names") or []),
        "category": _normalize(record.get("category")),
        "subcategory": _normalize(record.get("subcategory")).replace("-", " "),
    }

    def place(template: str) -> bytes:
        text = f"{seed}\n{record.get('key')}\n{template}"
        return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()

    templates = sorted(TEMPLATES[phrasing], key=place)
    if phrasing == "training" and count > len(templates):
        templates += sorted(MORE, key=place)
    lacking = [f"{{{field}}}" for field, value in values.items() if not value]
    usable = (t for t in templates if not any(field in t for field in lacking))
    return list(dict.fromkeys(template.format(**values) for template in usable))[:count]


def _normalize(text: Any) -> str:
    """A name as said in a sentence: lower case, of punctuation only what words and lists need."""
    if not isinstance(text, str):
        return ""
    text = unicodedata.normalize("NFC", text).lower()
    # A character is visible in the picture, its number is not.
    code = r"\bideograph-([0-9a-f]{4,5})\b"
    text = re.sub(code, lambda match: "ideograph " + chr(int(match[1], 16)), text)
    replacements = {"keycap: *": "keycap asterisk", ":": ",", "&": " and ", "’": "'", ".": ""}
    for written, said in replacements.items():
        text = text.replace(written, said)
    # Punctuation, symbols and control characters
    drop = {c for c in text if unicodedata.category(c)[0] in "PSC"} - set("',-")
    text = "".join(" " if c in drop else c for c in text)
    text = re.sub(r"(?<!\w)-|-(?!\w)", " ", text)  # a dash between words, not the hyphen of one
    items = [item for item in (" ".join(item.split()) for item in text.split(",")) if item]
    # Two persons of one skin tone: saying it once is enough.
    if len(items) > 1 and items[-1] == items[-2] and items[-1].endswith("skin tone"):
        items.pop()
    return ", ".join(items) if any(c.isalnum() for c in text) else ""


def _keyword(name: str, short_names: list[str]) -> str:
    """The first short name that says more than the name; "" if there is none.

    Codes say nothing: numbered ones ("cat2", "clock230", "+1"), and those that add no word of three
    letters ("flag-so", "x").
    """
    known = set(re.findall(r"\w+", name))
    for short in short_names:
        words = re.sub(r"[_-]+", " ", str(short).lower()).split()
        says_more = any(len(word) > 2 and word not in known for word in words)
        if says_more and all(word.isalpha() for word in words):
            return " ".join(words)
    return ""


def coco_split(
    source: str | Path, split: str, captions: str | Path
) -> tuple[list[Sample], dict[str, list[str]]]:
    """Images of a split of MS-COCO that have captions, in the order of the JSON; and the captions
    of every name in it. Others are left out, with a warning.

    `captions` has `{split}` for the name of the split or of its stand-in ("val" for "test", which
    has no captions in COCO): `captions_{split}2017.json`.
    """
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"There is no folder {root} of images.")
    names = [name for s in STAND_INS.get(split, (split,)) for name in SPLITS.get(s, (s,))]
    files = {name: Path(str(captions).replace("{split}", name)).expanduser() for name in names}
    found = next((name for name in names if files[name].is_file()), None)
    if found is None or "{split}" not in str(captions):
        lacking = f"There are no captions: no file {' or '.join(map(str, files.values()))}"
        raise DataError(f"{lacking}. Name one file for each split, with {{split}} for its name.")
    file = files[found]
    folder = split_folders(root, split).get(SPLIT_OF.get(found, found), root)
    captions_of = _read_coco(file)
    names = [n for n, texts in captions_of.items() if texts and (folder / n).is_file()]
    left_out = sorted(captions_of.keys() - set(names))
    message = f"{len(left_out)} of the {len(captions_of)} images in {file} are not in {folder}"
    message += f" or have no caption: {', '.join(left_out[:9])}"
    if not names:
        raise DataError(message)
    if left_out:
        warnings.warn(message, stacklevel=3)
    return [Sample(name, None, folder / name) for name in names], captions_of


def _read_coco(file: Path) -> dict[str, list[str]]:
    """File name of every image of a COCO captions file -> its captions, in the file's order."""
    try:
        content = json.loads(file.read_bytes())
        name_of = {image["id"]: image["file_name"] for image in content["images"]}
        captions_of = {name: [] for name in name_of.values()}
        for annotation in content["annotations"]:
            text = " ".join(annotation["caption"].split())  # some end in a line break
            if text and annotation["image_id"] in name_of:
                captions_of[name_of[annotation["image_id"]]].append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        parts = "'images' (id, file_name) and 'annotations' (image_id, caption)"
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is not a COCO captions file with {parts}: {what}.") from None
    return captions_of
