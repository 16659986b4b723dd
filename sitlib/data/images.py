"""Images of one split of a data set, by position: WebDataset shards or image folders.

A data set is a folder and needs no code. Accepted are
- WebDataset shards, `<split>-*.tar`: the split is a word of the name (`imagenet-train-000012.tar`);
- images: `split/class/name.jpg`, `class/name.jpg` or `name.jpg` (no classes). The folder of a
  split may end in a year (`train2017`, as in MS-COCO; of several, the last is taken).
Splits are written in any of the ways in `SPLITS`, in upper or lower case. Where nothing names them,
a hash of every key sends about 10 % of the images to "test". "val" is taken for a "test" that is
missing or has no classes, as in ImageNet.
"""

import hashlib
import json
import os
import re
import sys
import tarfile
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitlib.data.decode import (
    IMAGE_SUFFIXES,
    DataError,
    ImageError,
    decode_rgb,
    list_files,
    rgb_to_tensor,
)
from sitlib.data.loader import EpochOrder

SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation", "dev"),
}
SPLIT_OF = {name: split for split, names in SPLITS.items() for name in names}
STAND_INS = {"test": ("test", "val"), "val": ("val", "test")}  # the best first
TEST_PERCENT = 10  # of images that no folder or shard assigns to a split
DECODE_AT_OPENING = 5000  # images; larger splits are decoded on first use
CACHE_BYTES = 1_000_000_000  # of the images of a small split in memory
MAX_NAMED = 20  # unusable images that the warning names; ImageSource.unusable has all
THREADS = 16  # that read headers of shards, to hide the latency of a network file system
MANIFEST_SUFFIX = ".manifest.json"  # of the file that sitlib.data.convert writes beside its shards


class Sample(NamedTuple):
    """Where an image lies: a file, or byte ranges of a shard."""

    key: str  # of the sample in its shard, or the path in the image folder
    class_name: str | None  # a number as text
    path: Path
    offset: int = 0
    size: int = -1  # to the end of the file
    json_offset: int = 0
    json_size: int = 0

    def __str__(self) -> str:
        return str(self.path) if self.size < 0 else f"{self.path}: {self.key}"

    def read(self, offset: int, size: int) -> bytes:
        """Some bytes of the file."""
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def decode(self) -> Image.Image | str:
        """The image, or the reason why it cannot be used."""
        try:
            return decode_rgb(self.read(self.offset, self.size))
        except (ImageError, OSError) as error:
            return str(error)

    def record(self) -> dict[str, Any]:
        """JSON record; of a plain file `key` and `file`."""
        if not self.json_size:
            return {"key": self.key, "file": str(self.path)}
        return json.loads(self.read(self.json_offset, self.json_size))


class Record(NamedTuple):
    """One image and what is known about it."""

    key: str
    image: Tensor  # uint8 RGB [3, H, W], 0..255
    label: int  # -1: no class
    class_name: str | None
    meta: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ImageSource:
    """The usable images of one split, in a fixed order. Made by `open_images`.

    Splits of at most 5000 images are decoded when they are opened, and unusable images are left
    out. In a larger split they are found on first use: from then on, with a warning, the next
    usable image stands in, always the same one, with its own key and label.
    """

    samples: list[Sample]
    class_names: list[str]  # of every label; the same for all splits of a data set
    where: str  # name of the split in messages
    cache: dict[Sample, Image.Image]  # shared by all subsets of a source
    unusable: dict[Sample, str]  # reasons; shared as well

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Record:
        position, image = self.picture(position)
        sample, label = self.samples[position], int(self.labels[position])
        return Record(sample.key, rgb_to_tensor(image), label, sample.class_name, sample.record())

    @cached_property
    def labels(self) -> Tensor:
        """int64 [len], -1 where an image has no class."""
        label_of = {name: number for number, name in enumerate(self.class_names)}
        return torch.tensor([label_of.get(s.class_name or "", -1) for s in self.samples]).long()

    @cached_property
    def keys(self) -> list[str]:
        """Key of every image."""
        return [sample.key for sample in self.samples]

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Position of every key; of one that occurs twice, the last."""
        return {key: position for position, key in enumerate(self.keys)}

    @cached_property
    def order(self) -> EpochOrder:
        """Order of the images in every epoch."""
        paths = [id(sample.path) for sample in self.samples]  # one for all samples of a shard
        borders = np.flatnonzero(np.diff(paths)) + 1
        return EpochOrder(np.diff([0, *borders, len(self)]))

    def picture(self, position: int) -> tuple[int, Image.Image]:
        """Position and PIL image (RGB, read-only); of the next usable one if it is damaged."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"image {position} of {len(self)} in {self.where}")
        for ahead in range(len(self)):
            candidate = (position + ahead) % len(self)
            sample = self.samples[candidate]
            if sample in self.unusable:
                continue
            image = self.cache.get(sample) or sample.decode()
            if isinstance(image, Image.Image):
                return candidate, image
            self.unusable[sample] = image
            warnings.warn(f"skipped {sample}: {image}", stacklevel=2)
        raise DataError(f"None of the {len(self)} images of {self.where} can be used.")

    def labeled(self) -> "ImageSource":
        """The images that have a class. Raises DataError if there is none."""
        if samples := [sample for sample in self.samples if sample.class_name is not None]:
            return replace(self, samples=samples)
        raise DataError(
            f"None of the {len(self)} images of {self.where} has a class: put them into folders "
            "named by class, or 'class' into the JSON records of the shards."
        )


def open_images(source: str | Path, split: str = "train") -> ImageSource:
    """Open one split of a data set, a folder or one shard (see the top of this module).

    Labels number the sorted classes of all splits. One warning names the images that cannot be
    used; DataError is raised if there is none, or no such split.
    """
    return source_of(*find_split(source, split), where=f"the split {split!r} of {source}")


def source_of(samples: list[Sample], class_names: list[str], where: str) -> ImageSource:
    """The usable ones of some images, with one warning that names the others."""
    cache, unusable, room = {}, {}, CACHE_BYTES
    # An epoch of a large split would fill any cache before an image is needed again.
    if len(samples) <= DECODE_AT_OPENING:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for sample, image in zip(samples, pool.map(Sample.decode, samples), strict=True):
                if isinstance(image, str):
                    unusable[sample] = image
                elif room > 0:
                    cache[sample] = image
                    room -= 4 * image.width * image.height  # Pillow's RGB has four bytes a pixel
    usable = [sample for sample in samples if sample not in unusable]
    reasons = "; ".join(f"{s}: {reason}" for s, reason in list(unusable.items())[:MAX_NAMED])
    message = f"{len(unusable)} of {len(samples)} images of {where} are skipped: {reasons}"
    if not usable:
        raise DataError(f"No image can be used: {message}")
    if unusable:
        warnings.warn(message, stacklevel=3)
    return ImageSource(usable, class_names, where, cache, unusable)


# -- splits ------------------------------------------------------------------------------------


def find_split(source: str | Path, split: str) -> tuple[list[Sample], list[str]]:
    """Images of one split, and the classes of all splits. Raises DataError if nothing is there."""
    path = Path(source).expanduser().absolute()
    if not path.exists():
        raise DataError(f"There are no images: neither a folder nor a shard is at {path}.")
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if path.is_dir():
        check_manifests(path)
        if shards and (folders := split_folders(path)):
            raise DataError(
                f"{path} holds shards ({shards[0].name}) and folders of splits "
                f"({', '.join(folders)}): move one of the two elsewhere."
            )
    splits = _shard_splits(shards, split) if shards else _folder_splits(path, split)
    split = SPLIT_OF.get(split.lower(), split)
    names = [name for name in STAND_INS.get(split, (split,)) if name in splits]
    if not names:
        raise DataError(f"There is no split {split!r} in {path}, only {sorted(splits)}.")
    if names[0] == "test" and {s.class_name for s in splits["test"]} <= {None}:
        names = names[1:] or names
    classes = {s.class_name for s in chain(*splits.values()) if s.class_name is not None}
    # Numbers by value, names by letters
    return splits[names[0]], sorted(classes, key=lambda c: c.zfill(9) if c.isdigit() else c)


def _shard_splits(shards: list[Path], split: str) -> dict[str, list[Sample]]:
    by_split = defaultdict(list)
    for shard in shards:
        words = re.split(r"[-_.]", shard.stem)
        named = (w if w == split else SPLIT_OF.get(w.lower(), "") for w in words)
        by_split[next(filter(None, named), "")].append(shard)
    if set(by_split) == {""}:
        return divide(read_shards(shards))
    return {name: read_shards(members) for name, members in by_split.items() if name}


def _folder_splits(root: Path, split: str) -> dict[str, list[Sample]]:
    if folders := split_folders(root, split):
        return {name: _samples(folder, root) for name, folder in folders.items()}
    for child in filter(Path.is_dir, root.iterdir()):
        if len(below := split_folders(child)) > 1:  # a class may be called "train", not two
            raise DataError(f"{child} holds the splits {', '.join(below)}: give that folder.")
    if not (samples := _samples(root, root)):
        raise DataError(
            f"{root} holds neither WebDataset shards (*.tar) nor images (split/class/name.jpg, "
            f"class/name.jpg or name.jpg); found there: {sorted(os.listdir(root))[:8]}."
        )
    return divide(samples)


def split_folders(root: Path, split: str = "train") -> dict[str, Path]:
    """Folders in `root` that hold splits (of the usual names, and `split`), by split.

    Raises DataError if two spellings of one split are there.
    """
    folders: dict[str, Path] = {}
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        name = re.sub(r"(?<=.)\d{4}$", "", folder.name)
        if (key := name if name == split else SPLIT_OF.get(name.lower())) is None:
            continue
        other = folders.get(key, folder)
        if re.sub(r"(?<=.)\d{4}$", "", other.name) != name:
            raise DataError(f"{other} and {folder} are both of the split {key}: join or rename.")
        folders[key] = folder
    return folders


def _samples(folder: Path, root: Path) -> list[Sample]:
    """All images below `folder`, sorted by path; the first folder on the way is the class."""
    samples = []
    for path in list_files(folder):
        first, *below = path.relative_to(folder).parts
        key, class_name = path.relative_to(root).as_posix(), sys.intern(first) if below else None
        samples.append(Sample(key, class_name, path))
    return samples


def divide(samples: list[Sample]) -> dict[str, list[Sample]]:
    """Split by a hash of every key, so that adding an image never moves another one.

    A set so small that one side would be empty gives it the image that is nearest to the border.
    """
    hashes = [hashlib.blake2b(os.fsencode(s.key), digest_size=8).digest() for s in samples]
    values = [int.from_bytes(h) % 10_000 for h in hashes]
    border = 100 * TEST_PERCENT
    is_test = [value < border for value in values]
    if len(values) > 1 and len(set(is_test)) == 1:
        row = min(range(len(samples)), key=lambda r: (abs(values[r] - border), samples[r].key))
        is_test[row] = not is_test[row]
    splits = defaultdict(list)
    for sample, held_out in zip(samples, is_test, strict=True):
        splits["test" if held_out else "train"].append(sample)
    return splits


# -- WebDataset shards -------------------------------------------------------------------------


def read_shards(shards: list[Path]) -> list[Sample]:
    """Samples of shards, in their order. Warns of those without an image.

    They are read by offset, because webdataset only streams. A process walks over the headers of a
    shard once, unless it changes: about 90 us an image.
    """
    status = [shard.stat() for shard in shards]
    times, sizes = [s.st_mtime_ns for s in status], [s.st_size for s in status]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(chain(*pool.map(_read_headers, shards, times, sizes)))


@lru_cache(maxsize=8192)
def _read_headers(path: Path, mtime_ns: int, size: int) -> list[Sample]:
    problems, members_of = [], defaultdict(dict)
    try:
        # "r:" refuses compressed archives, which have no random access.
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                # Files of a sample share the path up to the first dot of the file name.
                match = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
                if member.isreg() and match:
                    members_of[match[1]][match[2].lower()] = member.offset_data, member.size
    except (tarfile.TarError, EOFError, OSError) as error:
        problems.append(f"it cannot be read to its end ({error}); is it cut off or compressed?")
    samples = []
    for key, members in members_of.items():
        images = [span for s, span in members.items() if s.rpartition(".")[2] in IMAGE_SUFFIXES]
        try:
            if not images:
                raise ValueError(f"no image among its files ({', '.join(sorted(members))})")
            sample = Sample(key, None, path, *images[0], *members.get("json", ()))
            samples.append(sample._replace(class_name=_class_of(sample, members.get("cls"))))
        except (ValueError, AttributeError) as error:
            problems.append(f"{key}: {error}")
    if problems:
        warnings.warn(
            f"{path} has unusable samples: {'; '.join(problems[:MAX_NAMED])}", stacklevel=2
        )
    return samples


def _class_of(sample: Sample, cls: tuple[int, int] | None) -> str | None:
    """Class of a sample: its .cls file, or `class`, `label` or `cls` of its JSON record."""
    record = {"cls": sample.read(*cls).decode(errors="replace")} if cls else sample.record()
    values = [record.get(name) for name in ("class", "label", "cls")]
    name = next((str(value).strip() for value in values if value is not None), "")
    # Negative numbers mean "unknown". A million images share a thousand names.
    return None if re.fullmatch(r"|-\d+", name) else sys.intern(name)


def check_manifests(folder: Path) -> list[dict[str, Any]]:
    """Shards of all manifests in `folder`: `name`, `images`, `bytes` and `sha256` of each.

    Raises DataError if one is not finished, or a shard is missing or has another size.
    """
    shards = []
    for file in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
        manifest = json.loads(file.read_bytes())
        if not manifest["finished"]:
            raise DataError(f"The conversion of {file} is not finished: give its command again.")
        for shard in manifest["shards"]:
            path = folder / shard["name"]
            if (actual := path.stat().st_size if path.exists() else 0) != shard["bytes"]:
                raise DataError(f"{path} has {actual} bytes, not {shard['bytes']}: copy it again.")
        shards += manifest["shards"]
    return shards
