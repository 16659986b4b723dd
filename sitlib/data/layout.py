"""What a data source is made of: shards or an image folder, its splits, its classes.

Accepted sources:
- a folder of WebDataset shards `<split>-*.tar`, one shard, or a brace or glob pattern over shards. A shard
  belongs to the split whose name is one of the words of its file name (`imagenet-train-000012.tar`);
- a folder of images: `split/class/name.jpg`, `class/name.jpg` or `name.jpg` (images without classes); a split's folder may end in a year
  (`train2017`, as those of MS-COCO do).
Where neither shards nor folders name splits, a hash of every key (or relative path) sends about 10 % of the
images to "test", whatever other images there are. A set that has "val" (or "valid", "validation") and no
"test" is accepted for "test". "val" is also taken where "test" has no classes: what ImageNet and MS-COCO
call "test" are images of which nobody is told what they show.
"""

import os
import re
from collections import defaultdict
from glob import glob
from hashlib import blake2b
from pathlib import Path

from braceexpand import braceexpand

from sitlib.data.decoding import IMAGE_SUFFIXES
from sitlib.data.index import DataError, Index, index_images
from sitlib.data.index_cache import index_shards
from sitlib.data.manifest import check_shards
from sitlib.paths import resolve

SPLIT_NAMES = ("train", "test", "val", "validation", "valid")
STAND_INS = {
    "test": ("val", "validation", "valid"),
    "val": ("validation", "valid", "test"),
}  # asked for: also good
TEST_PERCENT = 10


def find_split(
    source: str | Path, split: str, exact: bool = False
) -> tuple[Index, list[str | int]]:
    """Index of one split of a data source, and the classes of all its splits (sorted names, or numbers).

    Args:
        exact: not "val" instead of a "test" without classes.

    Raises:
        DataError: nothing there, no such split, or class names mixed with class numbers.
    """
    shards = _shards(source)
    splits = _shard_splits(shards, split) if shards else _folder_splits(resolve(source), split)
    names = [name for name in (split, *STAND_INS.get(split, ())) if name in splits]
    if not exact and names[:1] == ["test"] and set(splits["test"].class_of) <= {None}:
        names = names[1:] or names  # those of "val" are known as well, or better
    chosen = next(iter(names), None)
    if chosen is None:
        raise DataError(
            f"There is no split {split!r} in {resolve(source)}; found the splits {sorted(splits)}. Looked "
            f"for shards named '{split}-*.tar', or for images in a folder '{split}'."
        )
    index = splits[chosen]
    if not len(index):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in index.problems[:3])
        raise DataError(
            f"The split {chosen!r} of {resolve(source)} has no usable image"
            + (f" ({reasons})." if reasons else ".")
        )
    return index, _classes(splits, source)


def _classes(splits: dict[str, Index], source: str | Path) -> list[str | int]:
    found = {value for index in splits.values() for value in index.class_of if value is not None}
    if len({type(value) for value in found}) > 1:
        examples = sorted(map(repr, found))[:6]
        raise DataError(
            f"{resolve(source)} mixes class names and class numbers ({', '.join(examples)}): use one kind."
        )
    return sorted(found)


def _shards(source: str | Path) -> list[Path] | None:
    """The shards a source stands for, sorted; None if it is a folder without shards."""
    path = resolve(source)
    if path.is_dir():
        if shards := sorted(path.glob("*.tar")):
            check_shards(path)
        return shards or None
    if path.is_file():
        return [path]
    if not re.search(r"[{*?\[]", str(source)):
        raise DataError(
            f"There is no data source {str(source)!r}: looked for a folder or a .tar shard at {path}."
        )
    shards = []
    for pattern in braceexpand(str(path)):
        matches = sorted(glob(pattern))
        if not matches:
            raise DataError(f"The data source {str(source)!r} matches nothing at {pattern}.")
        shards += map(Path, matches)
    return shards


def _shard_splits(shards: list[Path], split: str) -> dict[str, Index]:
    by_split = defaultdict(list)
    for shard in shards:
        words = re.split(r"[-_.]", shard.stem)
        by_split[
            next((word for word in words if word == split or word in SPLIT_NAMES), None)
        ].append(shard)
    if set(by_split) == {None}:
        index = index_shards(shards)
        return _divide(index, index.keys)
    return {name: index_shards(members) for name, members in by_split.items() if name}


def _folder_splits(root: Path, split: str) -> dict[str, Index]:
    if folders := split_folders(root, split):
        return {name: _images(folder, root) for name, folder in folders.items()}
    index = _images(root, root)
    if not len(index):
        content = sorted(child.name for child in root.iterdir())[:8]
        raise DataError(
            f"{root} holds neither WebDataset shards (*.tar) nor images (split/class/name.jpg, "
            f"class/name.jpg or name.jpg); found there: {', '.join(content) or 'nothing'}."
        )
    return _divide(index, index.keys)


def split_folders(root: Path, split: str) -> dict[str, Path]:
    """The folders in `root` that hold splits, by the split's name: any of the usual names, and `split`.

    Raises:
        DataError: two folders of one split that differ in the year only.
    """
    found: dict[str, Path] = {}
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        match = re.fullmatch(r"(.+?)(\d{4})?", folder.name)
        assert match is not None
        name = folder.name if folder.name == split else match[1]
        if name != split and name not in SPLIT_NAMES:
            continue
        if name in found and found[name].name != name:
            raise DataError(
                f"{root} has two folders of the split {name!r}, {found[name].name} and {folder.name}: leave one of them there."
            )
        found.setdefault(name, folder)  # "train" comes before "train2017" and is taken
    return found


def _images(folder: Path, root: Path) -> Index:
    """Every image below `folder`, sorted by path; the first folder on the way is the class."""
    paths, seen = [], set()
    for parent, children, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:  # a link to a folder above
            children.clear()
            continue
        seen.add(os.path.realpath(parent))
        children[:] = [name for name in children if not name.startswith(".")]
        paths += [
            Path(parent, name)
            for name in names
            if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
        ]
    paths = sorted(path for path in paths if not path.name.startswith("."))
    below = [path.relative_to(folder).parts for path in paths]
    classes = [parts[0] if len(parts) > 1 else None for parts in below]
    return index_images(paths, classes, [path.relative_to(root).as_posix() for path in paths])


def _divide(index: Index, names: list[str]) -> dict[str, Index]:
    """Split by a hash of every name, so that adding an image never moves another one.

    A set so small that one side would be empty gives it the image that is nearest to the border.
    """
    values = [
        int.from_bytes(blake2b(name.encode(), digest_size=8).digest()) % 10_000 for name in names
    ]
    test = {row for row, value in enumerate(values) if value < 100 * TEST_PERCENT}
    if len(values) > 1 and len(test) in (0, len(values)):
        nearest = min(
            range(len(values)), key=lambda row: (abs(values[row] - 100 * TEST_PERCENT), names[row])
        )
        test ^= {nearest}
    parts = {"train": [row for row in range(len(values)) if row not in test], "test": sorted(test)}
    return {name: index.take(rows) for name, rows in parts.items() if rows}
