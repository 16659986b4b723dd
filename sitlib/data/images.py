"""Images of one split of a data set, by position: WebDataset shards or image folders.

A data set is a folder and needs no code. Accepted are
- WebDataset shards: a folder of `<split>-*.tar`, one shard, or a brace or glob pattern. A shard
  belongs to the split that is a word of its file name (`imagenet-train-000012.tar`);
- images: `split/class/name.jpg`, `class/name.jpg` or `name.jpg` (no classes). The folder of a
  split may end in a year (`train2017`, as in MS-COCO).
Where nothing names splits, a hash of every key sends about 10 % of the images to "test". "val" (or
"valid", "validation") is taken for a "test" that is missing or has no classes, as in ImageNet.
"""

import hashlib
import os
import re
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braceexpand import braceexpand
from PIL import Image
from torch import Tensor

from sitlib.data.decode import IMAGE_SUFFIXES, ImageError, decode_rgb, rgb_to_tensor
from sitlib.data.index import DataError, Index, check_manifests, index_files, index_shards
from sitlib.data.loader import EpochOrder

SPLITS = ("train", "test", "val", "validation", "valid")
STAND_INS = {"test": ("val", "validation", "valid"), "val": ("validation", "valid", "test")}
TEST_PERCENT = 10  # of images that no folder or shard assigns to a split
DECODE_AT_OPENING = 5000  # images; larger splits are decoded on first use
CACHE_BYTES = 1_000_000_000  # of the images of a small split in memory
MAX_NAMED = 20  # unusable images that the warning names; ImageSource.skipped lists all


@dataclass(frozen=True)
class Record:
    """One image and what is known about it."""

    key: str
    image: Tensor  # uint8 RGB [3, H, W], 0..255
    label: int  # -1: no class
    class_name: str | None
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class ImageSource:
    """The usable images of one split, in a fixed order. Made by `open_images`.

    Splits of at most 5000 images are decoded when they are opened, and unusable images are left
    out. In a larger split they are found on first use: from then on, with a warning, the next
    usable image stands in, always the same one, with its own key and label.

    Attributes:
        rows: of the images in `index`.
        labels: int64 [len], -1 where an image has no class.
        class_names: name of every label; the same for all splits of a data set.
        where: name of the split in messages.
        unusable: reasons by row; shared by all subsets of a source, as is `cache`.
    """

    index: Index
    rows: np.ndarray
    labels: Tensor
    class_names: list[str]
    where: str
    cache: dict[int, Image.Image]
    unusable: dict[int, str]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"ImageSource({self.where}: {len(self)} images, {len(self.class_names)} classes)"

    def __getitem__(self, position: int) -> Record:
        position, image = self.picture(position)
        label = int(self.labels[position])
        class_name = self.class_names[label] if label >= 0 else None
        meta = self.index.record(int(self.rows[position]))
        return Record(self.key(position), rgb_to_tensor(image), label, class_name, meta)

    def key(self, position: int) -> str:
        """Key of an image: of the sample in its shard, or the path in the image folder."""
        return self.index.keys[self.rows[position]]

    @property
    def keys(self) -> list[str]:
        """Keys of all images."""
        return [self.index.keys[row] for row in self.rows]

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Position of every key; of one that occurs twice, the last."""
        return {key: position for position, key in enumerate(self.keys)}

    @cached_property
    def order(self) -> EpochOrder:
        """Order of the images in every epoch."""
        borders = np.flatnonzero(np.diff(self.index.spans[self.rows, 0])) + 1
        return EpochOrder(np.diff([0, *borders, len(self)]))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(name, reason) of every image found unusable so far."""
        unusable = ((self.index.name(row), reason) for row, reason in self.unusable.items())
        return [*self.index.problems, *unusable]

    def picture(self, position: int) -> tuple[int, Image.Image]:
        """Position and PIL image (RGB, read-only); of the next usable one if it is damaged."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"image {position} of {len(self)} in {self.where}")
        for ahead in range(len(self)):
            candidate = (position + ahead) % len(self)
            row = int(self.rows[candidate])
            if row in self.unusable:
                continue
            image = self.cache.get(row) or _decode(self.index, row)
            if isinstance(image, Image.Image):
                return candidate, image
            self.unusable[row] = image
            warnings.warn(f"skipped {self.index.name(row)}: {image}", stacklevel=2)
        raise DataError(f"None of the {len(self)} images of {self.where} can be used.")

    def split_off(self, share: float) -> tuple["ImageSource", "ImageSource"]:
        """Most images, and about `share` of them for validation, by a hash of every key."""
        hashes = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in self.keys]
        mask = np.array(hashes) / 16**8 < share
        if mask.all() or not mask.any():
            raise DataError(
                f"{share:.0%} of the {len(self)} images of {self.where} cannot be split off."
            )
        return self._subset(~mask), self._subset(mask)

    def labeled(self) -> "ImageSource":
        """The images that have a class. Raises DataError if there is none."""
        mask = (self.labels >= 0).numpy()
        if not mask.any():
            raise DataError(
                f"None of the {len(self)} images of {self.where} has a class: give shards with a "
                "'class' in their JSON records or .cls files, or images in folders named by class."
            )
        return self._subset(mask)

    def _subset(self, mask: np.ndarray) -> "ImageSource":
        return replace(self, rows=self.rows[mask], labels=self.labels[torch.from_numpy(mask)])


def open_images(source: str | Path, split: str = "train") -> ImageSource:
    """Open one split of a data source (folder, shard or pattern, see the top of this module).

    Labels number the sorted class names of all splits, or are the class numbers of the shards.
    One warning names the images that cannot be used.

    Raises:
        DataError: the source or the split is missing, or no image can be used.
    """
    index, classes = find_split(source, split)
    if classes and isinstance(classes[-1], int):
        classes = [str(number) for number in range(classes[-1] + 1)]
    return source_of(index, f"the split {split!r} of {source}", classes)


def source_of(index: Index, where: str, class_names: list[str]) -> ImageSource:
    """The usable images of an index, with one warning that names the others."""
    number_of = {name: number for number, name in enumerate(class_names)}
    labels = [-1 if c is None else number_of[str(c)] for c in index.class_of]
    cache, unusable, room = {}, {}, CACHE_BYTES
    # An epoch of a large split would fill any cache before an image is needed again.
    if len(index) <= DECODE_AT_OPENING:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for row, image in enumerate(pool.map(partial(_decode, index), range(len(index)))):
                if isinstance(image, str):
                    unusable[row] = image
                elif room > 0:
                    cache[row] = image
                    room -= 4 * image.width * image.height  # Pillow's RGB has four bytes a pixel
    rows = np.array([row for row in range(len(index)) if row not in unusable], np.int64)
    labels = torch.tensor(labels, dtype=torch.int64)[torch.from_numpy(rows)]
    images = ImageSource(index, rows, labels, class_names, where, cache, unusable)
    if skipped := images.skipped:
        names = "; ".join(f"{name}: {reason}" for name, reason in skipped[:MAX_NAMED])
        total = len(index) + len(index.problems)
        message = f"{len(skipped)} of {total} images of {where} are skipped: {names}"
        if not len(images):
            raise DataError(f"No image can be used: {message}")
        warnings.warn(message, stacklevel=3)
    return images


def _decode(index: Index, row: int) -> Image.Image | str:
    """The image, or the reason why it cannot be used."""
    try:
        return decode_rgb(index.content(row))
    except (ImageError, OSError) as error:
        return str(error)


# -- splits ------------------------------------------------------------------------------------


def find_split(source: str | Path, split: str) -> tuple[Index, list]:
    """Index of one split, and the classes of all splits (sorted names, or numbers).

    Raises:
        DataError: nothing there, no such split, or class names mixed with class numbers.
    """
    path = Path(source).expanduser().absolute()
    shards = _find_shards(path)
    splits = _shard_splits(shards, split) if shards else _folder_splits(path, split)
    names = [name for name in names_of(split) if name in splits]
    if not names:
        raise DataError(f"There is no split {split!r} in {path}, only {sorted(splits)}.")
    if names[0] == "test" and set(splits["test"].class_of) <= {None}:
        names = names[1:] or names
    index = splits[names[0]]
    if not len(index):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in index.problems[:3])
        raise DataError(f"The split {names[0]!r} of {path} has no usable image. {reasons}".strip())
    classes = {c for index in splits.values() for c in index.class_of if c is not None}
    if len({type(c) for c in classes}) > 1:
        examples = ", ".join(sorted(map(repr, classes))[:6])
        raise DataError(f"{path} mixes class names and class numbers ({examples}): use one kind.")
    return index, sorted(classes)


def names_of(split: str) -> tuple[str, ...]:
    """Names that the images of a split may have, the best first."""
    return split, *STAND_INS.get(split, ())


def _find_shards(path: Path) -> list[Path]:
    """Shards that a source stands for, sorted; none if it is a folder of images."""
    if path.is_dir():
        check_manifests(path)
        return sorted(path.glob("*.tar"))
    shards = []
    for pattern in braceexpand(str(path)):
        if not (matches := sorted(glob(pattern))):
            raise DataError(f"There are no images: neither a folder nor a shard is at {pattern}.")
        shards += map(Path, matches)
    return shards


def _shard_splits(shards: list[Path], split: str) -> dict[str, Index]:
    by_split = defaultdict(list)
    for shard in shards:
        words = re.split(r"[-_.]", shard.stem)
        by_split[next((w for w in words if w == split or w in SPLITS), "")].append(shard)
    if set(by_split) == {""}:
        return divide(index_shards(shards))
    return {name: index_shards(members) for name, members in by_split.items() if name}


def _folder_splits(root: Path, split: str) -> dict[str, Index]:
    if folders := split_folders(root, split):
        return {name: _index_folder(folder, root) for name, folder in folders.items()}
    index = _index_folder(root, root)
    if not len(index):
        raise DataError(
            f"{root} holds neither WebDataset shards (*.tar) nor images (split/class/name.jpg, "
            f"class/name.jpg or name.jpg); found there: {sorted(os.listdir(root))[:8]}."
        )
    return divide(index)


def split_folders(root: Path, split: str) -> dict[str, Path]:
    """Folders in `root` that hold splits (any of the usual names, and `split`), by split."""
    folders: dict[str, Path] = {}
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        name = folder.name if folder.name == split else re.sub(r"(?<=.)\d{4}$", "", folder.name)
        if name != split and name not in SPLITS:
            continue
        # "train" comes before "train2017" and is taken.
        if folders.setdefault(name, folder).name not in (name, folder.name):
            raise DataError(
                f"{root} has two folders of the split {name!r}, {folders[name].name} and "
                f"{folder.name}: leave one of them there."
            )
    return folders


def _index_folder(folder: Path, root: Path) -> Index:
    """All images below `folder`, sorted by path; the first folder on the way is the class."""
    paths = []
    for parent, children, names in os.walk(folder, followlinks=True):
        children[:] = [name for name in children if not name.startswith(".")]
        names = [n for n in names if n.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    paths.sort()
    steps = [path.relative_to(folder).parts for path in paths]
    class_of = [first if below else None for first, *below in steps]
    return index_files(paths, class_of, [path.relative_to(root).as_posix() for path in paths])


def divide(index: Index) -> dict[str, Index]:
    """Split by a hash of every key, so that adding an image never moves another one.

    A set so small that one side would be empty gives it the image that is nearest to the border.
    """
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in index.keys]
    values = [int.from_bytes(h) % 10_000 for h in hashes]
    border = 100 * TEST_PERCENT
    test = {row for row, value in enumerate(values) if value < border}
    if len(values) > 1 and len(test) in (0, len(values)):
        test ^= {min(range(len(index)), key=lambda r: (abs(values[r] - border), index.keys[r]))}
    rows = {"train": [r for r in range(len(index)) if r not in test], "test": sorted(test)}
    return {name: index.take(rows[name]) for name in rows if rows[name]}
