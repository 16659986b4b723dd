"""Images of one split of a data set, by position: WebDataset shards or image folders.

A data set is a folder and needs no code. Accepted are
- WebDataset shards, `<split>-*.tar`: the split is a word of the name (`imagenet-train-000012.tar`);
- images: `split/class/name.jpg`, `class/name.jpg` or `name.jpg` (no classes). The folder of a
  split may end in a year (`train2017`, as in MS-COCO; of several, the last is taken).
Splits are written in any of the ways in `SPLITS`, in upper or lower case. Where nothing names them,
a hash of every key sends about 10 % of the images to "test", and "all" are all of them. "val" is
taken for a "test" that is missing or has no classes, as in ImageNet.
"""

import json
import os
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sitlib.data.decode import (
    MAX_NAMED,
    PROFILE,
    DataError,
    Sample,
    list_files,
    read_shards,
    rgb_to_tensor,
)

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
WINDOW = 32_768  # items that are shuffled together; smaller sets are shuffled whole
MANIFEST_SUFFIX = ".manifest.json"  # of the file that sitlib.data.convert writes beside its shards


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

    In splits of more than 5000 images unusable ones are found on first use: from then on, with a
    warning, the next usable image stands in, always the same one, with its own key and label.
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
    def order(self) -> "EpochOrder":
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
            if isinstance(image, str):
                self.unusable[sample] = image
                warnings.warn(f"skipped {sample}: {image}", stacklevel=2)
                continue
            if PROFILE in image.info:  # Python shows equal warnings once
                warnings.warn(f"{self.where} has images with broken color profiles", stacklevel=2)
            return candidate, image
        raise DataError(f"None of the {len(self)} images of {self.where} can be used.")

    def labeled(self) -> "ImageSource":
        """The images that have a class. Raises DataError if there is none."""
        if samples := [sample for sample in self.samples if sample.class_name is not None]:
            return replace(self, samples=samples)
        none = f"None of the {len(self)} images of {self.where} has a class"
        raise DataError(f"{none}: name folders by class, or add 'class' to the records of shards.")


def mixed(sources: Sequence[ImageSource], times: Sequence[int]) -> ImageSource:
    """Several sources as one, in which the images of each come so many times in an epoch."""
    pairs = list(zip(sources, times, strict=True))
    samples = [sample for source, count in pairs for sample in source.samples * count]
    names = sorted({name for source in sources for name in source.class_names})
    cache = {sample: image for source in sources for sample, image in source.cache.items()}
    unusable = {sample: reason for source in sources for sample, reason in source.unusable.items()}
    return ImageSource(samples, names, " and ".join(s.where for s in sources), cache, unusable)


class EpochOrder:
    """Permutations of items that lie in shards one after the other.

    Item `i` of a run is element `i % n` of the permutation of epoch `i // n`. A set larger than
    `window` items has its shards shuffled, neighbors gathered in windows of whole shards, and each
    window shuffled: reads touch a few shards at a time, which stay in the page cache.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, window: int = WINDOW):
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._sizes, self._count, self._window = sizes[sizes > 0], int(sizes.sum()), window
        # A batch may lie in two epochs, and training and evaluation alternate.
        self.permutation = lru_cache(maxsize=3)(self._permutation)

    def __len__(self) -> int:
        return self._count

    def _permutation(self, *counters: int) -> np.ndarray:
        """Order of an epoch by seed, purpose and number: int64 [n], read-only by convention."""
        generator = random_generator(*counters)
        if len(self) <= self._window:
            return generator.permutation(len(self))
        shards = generator.permutation(len(self._sizes))
        starts, sizes = np.cumsum(self._sizes) - self._sizes, self._sizes[shards]
        ends = np.cumsum(sizes)
        items = np.repeat(starts[shards] - (ends - sizes), sizes) + np.arange(len(self))
        begin = 0
        while begin < len(self):
            # The shard that fills the window is its last.
            last = np.searchsorted(ends, min(begin + self._window, len(self)))
            generator.shuffle(items[begin : ends[last]])
            begin = int(ends[last])
        return items


def random_generator(*counters: int) -> np.random.Generator:
    """Independent random numbers for every combination of counters."""
    return np.random.default_rng(np.random.SeedSequence(counters))


# -- opening -----------------------------------------------------------------------------------


def open_images(source: str | Path, split: str = "train") -> ImageSource:
    """Open one split of a data set, a folder or one shard (see the top of this module).

    Labels number the sorted classes of all splits. One warning names images that cannot be used.
    """
    return source_of(*find_split(source, split), where=f"the split {split!r} of {source}")


def source_of(samples: list[Sample], class_names: list[str], where: str) -> ImageSource:
    """The usable ones of some images; warnings count the others, and broken color profiles."""
    cache, unusable, odd, room = {}, {}, [], CACHE_BYTES
    # An epoch of a large split would fill any cache before an image is needed again.
    if len(samples) <= DECODE_AT_OPENING:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for sample, image in zip(samples, pool.map(Sample.decode, samples), strict=True):
                if isinstance(image, str):
                    unusable[sample] = image
                    continue
                if image.info.pop(PROFILE, None):
                    odd.append(str(sample))
                if room > 0:
                    cache[sample] = image
                    room -= 4 * image.width * image.height  # Pillow's RGB has four bytes a pixel
    usable = [sample for sample in samples if sample not in unusable]
    reasons = [f"{sample}: {reason}" for sample, reason in unusable.items()]
    for names, what in ((reasons, "are skipped"), (odd, "have broken color profiles")):
        message = f"{len(names)} of {len(samples)} images of {where} {what}: "
        message += "; ".join(names[:MAX_NAMED])
        if not usable:
            raise DataError(f"No image can be used: {message}")
        if names:
            warnings.warn(message, stacklevel=3)
    return ImageSource(usable, class_names, where, cache, unusable)


def has_splits(source: str | Path) -> bool:
    """False where nothing names splits, so that a hash divides the images; raises DataError."""
    return "all" not in _splits(source, "test")


def find_split(source: str | Path, split: str) -> tuple[list[Sample], list[str]]:
    """Images of one split, and the classes of all splits; DataError if nothing is there."""
    splits, split = _splits(source, split), SPLIT_OF.get(split.lower(), split)
    names = [name for name in STAND_INS.get(split, (split,)) if name in splits]
    if not names:
        raise DataError(f"There is no split {split!r} in {source}, only {sorted(splits)}.")
    if names[0] == "test" and {s.class_name for s in splits["test"]} <= {None}:
        names = names[1:] or names
    classes = {s.class_name for s in chain(*splits.values()) if s.class_name is not None}
    # Numbers by value, names by letters
    return splits[names[0]], sorted(classes, key=lambda c: c.zfill(9) if c.isdigit() else c)


def _splits(source: str | Path, split: str) -> dict[str, list[Sample]]:
    """Images of all splits: as names of shards or folders say, or divided by a hash, and "all"."""
    path = Path(source).expanduser().absolute()
    if not str(source).strip() or not path.exists():  # an unset variable of a shell
        raise DataError(f"There are no images: neither a folder nor a shard is at {str(source)!r}.")
    check_manifests(path)
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    folders = split_folders(path, split) if path.is_dir() else {}
    if shards and folders:
        both = f"{path} holds shards and folders of splits ({', '.join(folders)})"
        raise DataError(f"{both}: move one of the two elsewhere.")
    if folders:
        return {name: _samples(folder, path) for name, folder in folders.items()}
    if not shards:
        for child in filter(Path.is_dir, path.iterdir()):
            if len(below := split_folders(child)) > 1:  # a class may be called "train", not two
                raise DataError(f"{child} holds the splits {', '.join(below)}: give that folder.")
        if samples := _samples(path, path):
            return divide(samples) | {"all": samples}
        kinds = "shards (*.tar) nor images (split/class/name.jpg, class/name.jpg or name.jpg)"
        raise DataError(f"{path} holds neither {kinds}, only {sorted(os.listdir(path))[:8]}.")
    shards_of = defaultdict(list)
    for shard in shards:
        words = re.split(r"[-_.]", shard.stem)
        named = (word if word == split else SPLIT_OF.get(word.lower()) for word in words)
        shards_of[next(filter(None, named), "")].append(shard)
    if set(shards_of) == {""}:
        samples = read_shards(shards)
        return divide(samples) | {"all": samples}
    if unnamed := shards_of[""]:
        warnings.warn(f"{path} has shards of no split, which are not read: {unnamed}", stacklevel=2)
    return {name: read_shards(members) for name, members in shards_of.items() if name}


def split_folders(root: Path, split: str = "train") -> dict[str, Path]:
    """Folders in `root` that hold splits (of the usual names, and `split`), by split."""
    folders: dict[str, Path] = {}
    for folder in sorted(filter(Path.is_dir, root.iterdir())):
        name = re.sub(r"(?<=.)\d{4}$", "", folder.name)
        if key := name if name == split else SPLIT_OF.get(name.lower()):
            other = folders.get(key, folder)
            if re.sub(r"(?<=.)\d{4}$", "", other.name) != name:
                raise DataError(f"{other} and {folder} are both of the split {key}: join them.")
            folders[key] = folder  # the last year
    return folders


def _samples(folder: Path, root: Path) -> list[Sample]:
    """All images below `folder`, sorted by path; the first folder on the way is the class."""
    samples = []
    for path in list_files(folder):
        first, *below = path.relative_to(folder).parts
        class_name = sys.intern(first) if below else None
        samples.append(Sample(path.relative_to(root).as_posix(), class_name, path))
    return samples


def hold_back(source: ImageSource, percent: int) -> tuple[ImageSource, ImageSource]:
    """Images to train on, and some that are kept apart from them to choose settings by."""
    parts = divide(source.samples, percent, b"validation")
    return replace(source, samples=parts["train"]), replace(source, samples=parts["test"])


def divide(
    samples: list[Sample], percent: int = TEST_PERCENT, key: bytes = b""
) -> dict[str, list[Sample]]:
    """Split by a hash of every key, so that adding an image never moves another one.

    A set so small that one side would be empty gives it the image that is nearest to the border.
    """
    hashes = [blake2b(os.fsencode(s.key), digest_size=8, key=key).digest() for s in samples]
    above = [int.from_bytes(h) % 10_000 - 100 * percent for h in hashes]  # the border
    is_test = [distance < 0 for distance in above]
    if len(samples) > 1 and len(set(is_test)) == 1:
        row = min(range(len(samples)), key=lambda r: (abs(above[r]), samples[r].key))
        is_test[row] = not is_test[row]
    splits = defaultdict(list)
    for sample, held_out in zip(samples, is_test, strict=True):
        splits["test" if held_out else "train"].append(sample)
    return splits


def check_manifests(folder: Path) -> list[dict[str, Any]]:
    """Entries of the shards in all manifests of `folder`; DataError if one is not whole."""
    shards = []
    for file in sorted(folder.glob(f"*{MANIFEST_SUFFIX}")):
        try:
            manifest = json.loads(file.read_bytes())
            entries = [(folder / shard["name"], shard["bytes"]) for shard in manifest["shards"]]
            is_finished = manifest["finished"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file} is damaged ({error!r}): copy it again.") from None
        if not is_finished:
            raise DataError(f"The conversion of {file} is not finished: give its command again.")
        for path, size in entries:
            if (actual := path.stat().st_size if path.exists() else 0) != size:
                raise DataError(f"{path} has {actual} bytes, not {size}: copy it again.")
        shards += manifest["shards"]
    return shards
