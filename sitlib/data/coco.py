"""MS-COCO's form of captions: an image folder, and a JSON that lists file names and captions."""

import json
from dataclasses import dataclass
from pathlib import Path

from sitlib.data.index import DataError, Index, index_images
from sitlib.data.layout import STAND_INS, find_split, split_folders
from sitlib.paths import resolve

EXAMPLES = 3  # named in a message


@dataclass(frozen=True)
class CocoImages:
    """The images of a split that have captions.

    Attributes:
        index: they, with their names in the JSON as keys and in its order.
        captions_of: of every image that the JSON lists.
        file: the JSON.
        left_out: what is said of the images that it lists and `index` has not; "" where there is none, or all are in other splits.
        num_left_out: how many these are.
    """

    index: Index
    captions_of: dict[str, list[str]]
    file: Path
    left_out: str
    num_left_out: int


def coco_images(source: str | Path, split: str, captions: str | Path) -> CocoImages:
    """Where the images of a split are and what is said of them; `{split}` in both paths is replaced as `open_captioned` says.

    Raises:
        DataError: folder or JSON is missing, or the JSON is no COCO captions file.
    """
    name, folder, file = _paths(str(source), split, str(captions))
    captions_of = _read(file)
    index, missing = _index(str(source), folder, name, str(captions), list(captions_of))
    silent = [key for key in index.keys if not captions_of[key]]
    left_out = [listed(missing, f"not in {folder}"), listed(silent, "without a caption")]
    index = index.take(row for row, key in enumerate(index.keys) if captions_of[key])
    return CocoImages(
        index, captions_of, file, "; ".join(filter(None, left_out)), len(missing) + len(silent)
    )


def listed(names: list[str], why: str) -> str:
    """A count and some examples; "" where there is nothing to say."""
    if not names:
        return ""
    return f"{len(names)} {why} ({', '.join(names[:EXAMPLES])}{', ...' if len(names) > EXAMPLES else ''})"


def _paths(source: str, split: str, captions: str) -> tuple[str, Path, Path]:
    """The name of the split here, its folder and its JSON; both are there."""
    missing = []
    for name in (split, *STAND_INS.get(split, ())):
        folder, file = (resolve(path.replace("{split}", name)) for path in (source, captions))
        if (
            folder.is_dir() and file.is_file()
        ):  # both: COCO has pictures of its "test" without captions
            return name, folder, file
        if not file.is_file():
            missing.append(f"no file {file}")
        if not folder.is_dir():
            missing.append(f"no folder {folder}")
    raise DataError(
        f"The split {split!r} of {source} has no captions: there is {'; '.join(dict.fromkeys(missing))}."
    )


def _index(
    source: str, folder: Path, split: str, captions: str, names: list[str]
) -> tuple[Index, list[str]]:
    """The images of a split with their names in the JSON as keys, in its order; and the names that are in no split of the folder."""
    splits = split_folders(folder, split)
    has_splits = any(name in splits for name in (split, *STAND_INS.get(split, ())))
    if "{split}" in source or ("{split}" in captions and not has_splits):
        # The JSON alone says what is in the split.
        is_there = [(folder / name).is_file() for name in names]
        there = [name for name, found in zip(names, is_there, strict=True) if found]
        missing = [name for name, found in zip(names, is_there, strict=True) if not found]
        return index_images([folder / name for name in there], [None] * len(there), there), missing
    index, _ = find_split(folder, split, exact=True)
    row_of = {key: row for row, key in enumerate(index.keys)}
    rows, there, missing = [], [], []
    for name in names:
        paths = [name, *(f"{part.name}/{name}" for part in splits.values())]
        row = next((row_of[path] for path in paths if path in row_of), None)
        if row is not None:
            rows.append(row)
            there.append(name)
        elif not any((folder / path).is_file() for path in paths):  # else it is in another split
            missing.append(name)
    index = index.take(rows)
    return Index(index.files, there, index.suffixes, [None] * len(rows), index.spans), missing


def _read(file: Path) -> dict[str, list[str]]:
    """File name of every image of a COCO captions file -> its captions, in the order of the file."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} cannot be read as JSON ({error}).") from None
    if not isinstance(content, dict):
        raise DataError(
            f"{file} is not a COCO captions file: it holds no object with 'images' and 'annotations'."
        )
    wanted = {
        "images": {"id": int | str, "file_name": str},
        "annotations": {"image_id": int | str, "caption": str},
    }
    for part, keys in wanted.items():
        if not isinstance(content.get(part), list):
            raise DataError(f"{file} is not a COCO captions file: it has no list {part!r}.")
        for key, kind in keys.items():
            if not all(
                isinstance(item, dict) and isinstance(item.get(key), kind) for item in content[part]
            ):
                raise DataError(
                    f"{file} is not a COCO captions file: not all of its {part!r} have a {key!r}"
                    + (
                        " (files named instances or person_keypoints have none)."
                        if key == "caption"
                        else "."
                    )
                )
    captions_of = {image["file_name"]: [] for image in content["images"]}
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    for item in content["annotations"]:
        text = " ".join(item["caption"].split())  # some end in a line break
        if text and item["image_id"] in name_of:
            captions_of[name_of[item["image_id"]]].append(text)
    return captions_of
