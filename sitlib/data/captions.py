"""Images with captions: built from the names in the records, written in them, or a COCO file."""

import json
import re
import unicodedata
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from sitlib.data.images import (
    STAND_INS,
    ImageSource,
    divide,
    open_images,
    source_of,
    split_folders,
)
from sitlib.data.index import DataError, Index, index_files

Phrasing = Literal["training", "new"]


def _templates(table: str) -> list[str]:
    return [template.strip() for line in table.strip().split("\n") for template in line.split("|")]


# The phrasings that training sees and the new ones of test prompts share no sentence, so that new
# words for a known thing can be told from known words. Every template has the name, so that
# captions of different things differ, and at least seven of each phrasing need nothing else.
TEMPLATES = {
    "training": _templates("""
        {name} | emoji: {name} | an emoji of {name} | a picture of {name}
        an icon that shows {name} | a 3d emoji, {name} | {name}, on a white background
        {category}: {name} | {subcategory}: {name}
        {name}, also called {keyword} | {keyword}, that is {name}"""),
    "new": _templates("""
        draw {name} | please show me {name} | a small drawing of {name} | a sticker of {name}
        a glossy 3d rendering of {name} | i would like to see {name}
        white all around, in the middle {name}
        something from {category}, namely {name} | of the kind {subcategory}, one image of {name}
        {name}, or in other words {keyword}"""),
}
# For training, where more captions of an image are asked for than there are templates above.
MORE = _templates("""
    the {name} symbol | an image with {name} in it | this is {name} | here is {name}
    {name} as an icon | {name} in the style of an emoji | a colourful {name} | a simple {name}
    a cute little {name} | a shiny {name} in 3d | {name}, isolated | {name}, and nothing else
    a photo of {name} | what {name} looks like | you can find {name} here
    we are looking at {name} | one of the emoji: {name} | a digital illustration of {name}
    high quality clip art of {name} | the object in this picture is {name}
    it depicts {name} and has no background | the emoji that people use for {name}
    {name}, seen from the front | create {name} for me
    an example of {category}: {name} | {name} belongs to {category}
    among {subcategory} there is {name} | {name}, a sort of {subcategory}
    {name} or {keyword} | {keyword} and {name} mean the same
    some call it {keyword}, others {name} | {name}; {keyword}""")


@dataclass
class CaptionedImages:
    """Images of one split and their captions, in the same order."""

    images: ImageSource
    captions: list[list[str]]  # at least one for every image
    names: list[str]  # of what each image shows; captions of one name are of the same thing


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
        captions: "records": the `captions` of the shards' records, as `sitlib.data.convert` writes
            them. "names": built from the records, see `emoji_captions`. Otherwise the path of a
            COCO captions file, whose `file_name`s are paths in the folder.
        phrasing, seed, count: for `emoji_captions`.

    In both paths `{split}` stands for the name of the split, or of its stand-in ("val" for "test").
    Images of a COCO file have no classes; one that is missing, unreadable or has no caption is left
    out, with one warning for all.

    Raises:
        DataError: source, split or JSON is missing, the JSON is not a COCO captions file, no image
            with a caption can be used, or a record has no name or no captions.
        ValueError: unknown phrasing, or a count below 1.
    """
    _check(phrasing, count)  # also where it has no effect: a misspelling should not wait
    if str(captions) not in ("names", "records"):
        index, captions_of = coco_split(source, split, captions)
        images = source_of(index, f"the split {split!r} of {source}", [])
        if skipped := images.skipped:
            examples = "; ".join(f"{Path(name).name}: {reason}" for name, reason in skipped[:3])
            message = f"{len(skipped)} images of {images.where} are skipped: {examples}"
            if not len(images):
                raise DataError(f"No image can be used: {message}")
            warnings.warn(message, stacklevel=2)
        return CaptionedImages(images, [captions_of[key] for key in images.keys], images.keys)
    images = open_images(source, split)
    records = [{**images.index.record(row), "key": images.index.keys[row]} for row in images.rows]
    if str(captions) == "names":
        try:
            texts = [emoji_captions(record, phrasing, seed, count) for record in records]
        except DataError as error:
            raise DataError(
                f"{images.where} has no names to build captions from: {error}"
            ) from None
        names = [record.get("base_name", record["name"]) for record in records]
        return CaptionedImages(images, texts, names)
    for record in records:
        texts = record.get("captions")
        if not texts or not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise DataError(
                f"The record of {record['key']!r} in {images.where} has no list `captions` of "
                "texts: convert the images with their captions (python -m sitlib.data.convert), or "
                "name a COCO captions file."
            )
    return CaptionedImages(images, [record["captions"] for record in records], images.keys)


# -- captions from names -----------------------------------------------------------------------


def emoji_captions(
    record: dict[str, Any], phrasing: Phrasing = "training", seed: int = 0, count: int = 4
) -> list[str]:
    """Captions of an image by its record: `key`, `name`, where it has them `short_names`,
    `category`, `subcategory`.

    Lower case; skin tones are kept, because they are visible. Templates and their order are a pure
    function of `seed` and `key`, and a smaller count begins a larger one.

    Returns:
        `count` different captions, or fewer where the phrasing has not as many templates for this
        record (seven and more; training takes `MORE` where it needs more than eleven).

    Raises:
        DataError: the record has no name.
        ValueError: unknown phrasing, or a count below 1.
    """
    _check(phrasing, count)
    name = _normalize(record.get("name"))
    if not name:
        raise DataError(
            f"the record of {record.get('key')!r} has no `name` with a letter or digit."
        )
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


def _check(phrasing: str, count: int) -> None:
    if phrasing not in TEMPLATES:
        raise ValueError(
            f"There is no phrasing {phrasing!r}: choose {' or '.join(map(repr, TEMPLATES))}."
        )
    if count < 1:
        raise ValueError(f"count is {count}; every image needs at least one caption.")


def _normalize(text: Any) -> str:
    """A name as said in a sentence: lower case, of punctuation only what words and lists need."""
    if not isinstance(text, str):
        return ""
    text = unicodedata.normalize("NFC", text).lower()
    # A character is visible in the picture, its number is not.
    text = re.sub(
        r"\bideograph-([0-9a-f]{4,5})\b", lambda m: f"ideograph {chr(int(m[1], 16))}", text
    )
    replacements = {"keycap: *": "keycap asterisk", ":": ",", "&": " and ", "’": "'", ".": ""}
    for written, said in replacements.items():
        text = text.replace(written, said)
    # Symbols, control characters and other punctuation
    text = "".join(
        c if c in "',-" or unicodedata.category(c)[0] not in "PSC" else " " for c in text
    )
    text = re.sub(r"(?<!\w)-|-(?!\w)", " ", text)  # a dash between words, not the hyphen of one
    items = [item for item in (" ".join(item.split()) for item in text.split(",")) if item]
    # Two persons of one skin tone: saying it once is enough.
    if len(items) > 1 and items[-1] == items[-2] and items[-1].endswith("skin tone"):
        items.pop()
    text = ", ".join(items)
    return text if any(c.isalnum() for c in text) else ""


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


# -- MS-COCO -----------------------------------------------------------------------------------


def coco_split(
    source: str | Path, split: str, captions: str | Path
) -> tuple[Index, dict[str, list[str]]]:
    """Images of a split that have captions, their names in the JSON as keys and in its order; and
    the captions of every name.

    `{split}` in both paths is replaced as `open_captioned` says. Where neither has it, the split
    consists of the same images as for `open_images`. Warns of images that are left out.

    Raises:
        DataError: folder or JSON is missing, no image is there, or the JSON is no captions file.
    """
    split, folder, file = _coco_paths(str(source), split, str(captions))
    captions_of = _read_coco(file)
    folders = split_folders(folder, split)
    inside = next((n for n in (split, *STAND_INS.get(split, ())) if n in folders), None)
    candidates = [folders.pop(inside), folder] if inside else [folder]
    path_of, missing = {}, []
    for name in captions_of:
        path = next((f / name for f in candidates if (f / name).is_file()), None)
        if path is None:
            missing += [name] * (not any((f / name).is_file() for f in folders.values()))
        elif not any(f in path.parents for f in folders.values()):  # else it is in another split
            path_of[name] = path
    if "{split}" not in f"{source}{captions}" and len(candidates) == 1:  # nothing names the split
        index = index_files(list(path_of.values()), [None] * len(path_of), list(path_of))
        part = divide(index).get(split, index.take([]))
        path_of = {name: path_of[name] for name in part.keys}
    silent = [name for name in path_of if not captions_of[name]]
    names = [name for name in path_of if captions_of[name]]
    left_out = [
        f"{len(group)} {why} ({', '.join(group[:3])}{', ...' if len(group) > 3 else ''})"
        for group, why in ((missing, f"not in {folder}"), (silent, "without a caption"))
        if group
    ]
    if not names:
        reasons = "; ".join(left_out) or "all are in other splits"
        raise DataError(
            f"None of the {len(captions_of)} images that {file} lists can be used for the split "
            f"{split!r} of {source}: {reasons}."
        )
    if left_out:
        warnings.warn(
            f"{len(missing) + len(silent)} of the {len(captions_of)} images that {file} lists are "
            f"left out: {'; '.join(left_out)}",
            stacklevel=3,
        )
    return index_files([path_of[name] for name in names], [None] * len(names), names), captions_of


def _coco_paths(source: str, split: str, captions: str) -> tuple[str, Path, Path]:
    """Name of the split in this set, its folder and its JSON."""
    missing = []
    for name in (split, *STAND_INS.get(split, ())):
        folder, file = (Path(p.replace("{split}", name)).expanduser() for p in (source, captions))
        # Both, because COCO has pictures of its "test" without captions.
        if folder.is_dir() and file.is_file():
            return name, folder, file
        missing += [f"no file {file}"] * (not file.is_file())
        missing += [f"no folder {folder}"] * (not folder.is_dir())
    raise DataError(
        f"The split {split!r} of {source} has no captions: there is "
        f"{'; '.join(dict.fromkeys(missing))}."
    )


def _read_coco(file: Path) -> dict[str, list[str]]:
    """File name of every image of a COCO captions file -> its captions, in the order of the file."""
    try:
        content = json.loads(file.read_bytes())
        name_of = {image["id"]: image["file_name"] for image in content["images"]}
        captions_of = {image["file_name"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            text = " ".join(annotation["caption"].split())  # some end in a line break
            if text and annotation["image_id"] in name_of:
                captions_of[name_of[annotation["image_id"]]].append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not a COCO captions file: it needs 'images' with id and file_name, and "
            "'annotations' with image_id and caption, which files named instances or "
            f"person_keypoints do not have ({type(error).__name__}: {error})."
        ) from None
    return captions_of
