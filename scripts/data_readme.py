"""Write data/README.md: what the sets are, and the source, licence and author of every image."""

import json
from collections import Counter
from pathlib import Path

import webdataset

README = """# Data

Generated, with the shards, by `python scripts/build_data.py --cache CACHE`: edit that script, not this file.

| set | images | train | test | MB | what | licence |
|---|---|---|---|---|---|---|
{summary}

Every set is a folder of [WebDataset](https://github.com/webdataset/webdataset) shards `<split>-NNNN.tar`. A
sample is an image (`<key>.webp` or `<key>.jpg`) and a record (`<key>.json`): `key`, `split`, `class` (name or
null), `package` and `file` it comes from, `licence`, `author`, `contact` (address or page of the author, as
the package gives it), `changes`, `size` (width, height). `sitlib.data.open_images("data/landscapes",
"train")` reads them.

The splits are fixed and do not depend on chance: by photograph (never by crop) for the landscapes, about
85/15 in every class, two pictures of one scene on one side; by `group` for the emoji, about 89/11 in every
category. A group is one thing in all genders and skin tones (COOK, MAN COOK, WOMAN COOK; all families; by
code points, `scripts/emoji_groups.py`), and all names that share one picture (flags of territories): none of
them leaks; by origin for `things`. `extra` is only held out.

## landscapes

Photographs from the Debian package `endless-sky-high-dpi` 0.9.8-1 (`images/land/`), resized from 1440x720 to
512x256 (Lanczos) and re-encoded as WebP, quality 92, which is a change in the sense of their licences. The
class is the first word of the file name: {words}; photographs named after an author, an archive or a unique
subject have none, nor has station0, an underground railway. The names are those of the package: some could
be disputed by eye. Licence and author are
those of the package's copyright file. Where its patterns overlap, a Creative Commons licence with a named
author is followed rather than "public domain".

**CC-BY-SA 3.0 and 4.0** ask for attribution (the table below), a note of changes (resized and re-encoded) and
share-alike: these resized versions are under the same licence and version as their originals
(https://creativecommons.org/licenses/by-sa/3.0/, https://creativecommons.org/licenses/by-sa/4.0/), whatever
the licence of the code.

{land_classes}

## emoji

Pictures: npm `@lobehub/fluent-emoji-3d` 1.1.0, which states the MIT licence and "Fluent Emoji are a
collection of familiar, friendly, and modern emoji from Microsoft"; copyright 2023 LobeHub. Names:
`emoji.json` of npm `emoji-datasource-google` 16.0.0, MIT licence, copyright 2013 Cal Henderson. Changes:
composited on white, resized from 256x256 to 128x128 (Lanczos), WebP quality 80. The records add `name` (with
skin tones), `base_name`, `group` (above), `short_names`, `category` (also the class) and `subcategory`. The
MIT licence is given below.

{emoji_classes}

## extra

Held-out photographs from the wheels of scikit-image 0.26.0 and scikit-learn 1.9.1, at most 0.5 megapixels
each. Not taken, because the package states no clear licence: the motorcycle pair and `ihc`. scikit-learn's
text names danielbuechele for both of its photographs, but links flower.jpg to vultilion's page; the page is
followed. CC BY 2.0: https://creativecommons.org/licenses/by/2.0/

{extra_table}

## things

Photographs of animals, buildings, tools and people from the Debian package `gcompris-qt-data` 3.1-2, the licence and
author of each from the README files inside, and from `lomiri-wallpapers-16.04` 20.04.0-2, from its copyright file;
paintings, drawings and pictures under the GPL are not taken. Held out are the animals of two activities of gcompris
and all of lomiri: origins of which nothing is in the training split. Those longer than 1,024 px are resized
(Lanczos) and re-encoded as WebP, quality 85; the CC-BY-SA ones stay under their licence and version.

{things_table}

## Attribution of every landscape

{land_table}

## MIT licence of the emoji

{mit}
"""


WHAT = {  # of every set: what it is, and its licence
    "landscapes": (
        "photographs, 512x256",
        "CC-BY-SA 3.0, CC-BY-SA 4.0 or public domain, per image",
    ),
    "emoji": ("renderings on white, 128x128, with names", "MIT"),
    "extra": ("held-out photographs", "CC0, public domain or CC BY 2.0, per image"),
    "things": (
        "photographs up to 1024 px, without classes",
        "public domain, CC0, CC BY or CC BY-SA, per image",
    ),
}


def table(columns: dict[str, str], records: list[dict]) -> str:
    """Rows of records: title of a column -> its key in them."""
    rows = [["" if r[key] is None else str(r[key]) for key in columns.values()] for r in records]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *rows])


def class_table(records: list[dict]) -> str:
    count = Counter((record["class"] or "(none)", record["split"]) for record in records)
    names = sorted({name for name, _ in count}, key=lambda name: (name == "(none)", name))
    splits = {split: split for split in ("train", "test")}
    rows = [{"class": name} | {split: count[name, split] for split in splits} for name in names]
    return table({"class": "class"} | splits, rows)


def write_readme(out: Path, words_of_class: dict[str, tuple[str, ...]], mit: str) -> None:
    """Write out/README.md from the records in the shards, so that it says what is there.

    Args:
        out: folder of the sets.
        words_of_class: the words in file names that make a class of the landscapes.
        mit: text of the licence of the emoji.
    """
    records, summary = {}, []
    for name, (what, licence) in WHAT.items():
        shards = sorted((out / name).glob("*.tar"))
        dataset = webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False)
        of_set = [json.loads(sample["json"]) for sample in dataset]
        records[name] = sorted(of_set, key=lambda record: record["key"])
        splits = Counter(record["split"] for record in of_set)
        megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
        sizes = [len(of_set), splits["train"], splits["test"], f"{megabytes:.1f}"]
        summary.append(f"| {' | '.join(map(str, [f'`{name}`', *sizes, what, licence]))} |")
    for record in records["extra"]:
        record["source"] = f"{record['package']}, {record['file']}"

    def columns(text: str) -> dict[str, str]:
        """Titles of columns, with " | " between them; most are the keys."""
        keys = {"image": "key", "page": "contact", "note in the package": "note"}
        return {title: keys.get(title, title) for title in text.split(" | ")}

    land = columns("image | class | split | licence | author | contact | note in the package")
    extra = columns("image | title | source | licence | author | page | changes")
    things = columns("image | split | licence | author | page | note in the package | changes")
    text = README.format(
        summary="\n".join(summary),
        words=", ".join(f"{name} ({', '.join(words)})" for name, words in words_of_class.items()),
        land_classes=class_table(records["landscapes"]),
        emoji_classes=class_table(records["emoji"]),
        extra_table=table(extra, records["extra"]),
        land_table=table(land, records["landscapes"]),
        things_table=table(things, records["things"]),
        mit=mit,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
