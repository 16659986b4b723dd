"""Random access to the images of a split: records, labels, a bounded cache of decoded images."""

import hashlib
import os
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import cast

import numpy as np
import torch
from PIL import Image

from sitlib.data.decoding import ImageError, decode_rgb, rgb_to_tensor
from sitlib.data.index import DataError, Index
from sitlib.data.layout import find_split
from sitlib.data.order import EpochOrder

CHECK_AT_MOST = 5000  # images; splits up to this size are decoded when they are opened, larger ones on first use
CACHE_BYTES = 1_000_000_000
NAMED_WARNINGS = (
    20  # unusable images that get a warning each at opening; all of them are in ImageSource.skipped
)


@dataclass(frozen=True)
class Record:
    """One image with what is known about it."""

    key: str
    image: torch.Tensor  # uint8 RGB [3, H, W], 0..255
    label: int  # -1: no class
    class_name: str | None
    meta: dict


class _Store:
    """Decoded images of an index, shared by all views of a source and safe to use from several threads."""

    def __init__(self, index: Index, cache_bytes: int):
        self.index = index
        self.unusable: set[int] = set()
        self.skipped: list[tuple[str, str]] = []
        self.told_upsampling = False
        self._cache: OrderedDict[int, Image.Image] = OrderedDict()
        self._room = cache_bytes
        self._lock = Lock()

    def decode(self, row: int) -> Image.Image:
        with self._lock:
            if row in self._cache:
                self._cache.move_to_end(row)
                return self._cache[row]
        try:
            image = decode_rgb(self.index.content(row))
        except OSError as error:
            raise ImageError(f"it cannot be read ({error})") from error
        with self._lock:
            if row not in self._cache:
                self._cache[row] = image
                self._room -= _bytes(image)
                while self._room < 0 and self._cache:
                    self._room += _bytes(self._cache.popitem(last=False)[1])
        return image

    def reject(self, row: int, reason: str) -> bool:
        """Mark an image as unusable; False if it was already."""
        with self._lock:
            if row in self.unusable:
                return False
            self.unusable.add(row)
            self.skipped.append((self.index.name(row), reason))
            return True


def _bytes(image: Image.Image) -> int:
    return 4 * image.width * image.height  # Pillow stores RGB in four bytes a pixel


class ImageSource:
    """The usable images of one split, in a fixed order. Made by `open_images`.

    Attributes:
        class_names: name of every label; the same for all splits of a data set.
        labels: int64 [len], -1 where an image has no class.
        keys: name of every image: of the sample in its shard, or the path in the image folder.
        skipped: (name, reason) of every image found unusable so far.
        order: of the images in every epoch.

    Splits of at most 5000 images are decoded when they are opened, and what cannot be used is left out. In a
    larger split an unusable image is found on first use: from then on, with a warning, the next usable one
    stands in for it, always the same one, with its own key and label.
    """

    def __init__(
        self,
        store: _Store,
        rows: np.ndarray,
        labels: torch.Tensor,
        class_names: list[str],
        where: str,
    ):
        self._store = store
        self._rows = rows
        self.labels = labels
        self.class_names = class_names
        self.where = where
        self.order = EpochOrder.of_shards(store.index.spans[rows, 0])

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ImageSource({self.where}: {len(self)} images, {len(self.class_names)} classes)"

    @property
    def keys(self) -> list[str]:
        return [self._store.index.keys[row] for row in self._rows]

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Where the image of a key is; of a key that occurs twice, the last."""
        return {key: position for position, key in enumerate(self.keys)}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return self._store.skipped

    def __getitem__(self, position: int) -> Record:
        position, image = self.picture(position)
        label = int(self.labels[position])
        return Record(
            key=self.key(position),
            image=rgb_to_tensor(image),
            label=label,
            class_name=self.class_names[label] if label >= 0 else None,
            meta=self._store.index.record(int(self._rows[position])),
        )

    def key(self, position: int) -> str:
        return self._store.index.keys[self._rows[position]]

    def picture(self, position: int) -> tuple[int, Image.Image]:
        """Position and PIL image (mode RGB, not to be changed); of the next usable one if it is damaged."""
        if not -len(self) <= position < len(self):
            raise IndexError(f"image {position} of {len(self)} in {self.where}")
        for ahead in range(len(self)):
            candidate = (position + ahead) % len(self)
            row = int(self._rows[candidate])
            if row in self._store.unusable:
                continue
            try:
                return candidate, self._store.decode(row)
            except ImageError as error:
                if self._store.reject(row, str(error)):
                    warnings.warn(f"skipped {self._store.index.name(row)}: {error}", stacklevel=2)
        raise DataError(f"None of the {len(self)} images of {self.where} can be used.")

    def tell_upsampling(self, image: Image.Image, size: int) -> None:
        """Warn, once for this source and its restrictions, that views are larger than what they show."""
        if not self._store.told_upsampling:
            self._store.told_upsampling = True
            warnings.warn(
                f"{self.where} has images as small as {image.width}x{image.height} pixels; they are enlarged "
                f"to views of {size}x{size}",
                stacklevel=2,
            )

    def split_off(self, share: float) -> tuple["ImageSource", "ImageSource"]:
        """Most of the images, and about `share` of them for validation, chosen by a hash of each image's key.

        Raises:
            DataError: one of the two would be empty.
        """
        values = [
            int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8 for key in self.keys
        ]
        chosen = np.array(values) < share
        if chosen.all() or not chosen.any():
            raise DataError(
                f"{share:.0%} of the {len(self)} images of {self.where} cannot be split off."
            )
        return self._where(~chosen), self._where(chosen)

    def labelled(self) -> "ImageSource":
        """The images that have a class.

        Raises:
            DataError: there is none.
        """
        mask = (self.labels >= 0).numpy()
        if not mask.any():
            raise DataError(
                f"None of the {len(self)} images of {self.where} has a class: give shards with a 'class' in "
                "their JSON records or .cls files, or images in folders named by class."
            )
        return self._where(mask)

    def _where(self, mask: np.ndarray) -> "ImageSource":
        labels = self.labels[torch.from_numpy(mask)]
        return ImageSource(self._store, self._rows[mask], labels, self.class_names, self.where)


def open_images(
    source: str | Path,
    split: str = "train",
    *,
    classes: Sequence[str] | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> ImageSource:
    """Open one split of a data source: shards or an image folder as `sitlib.data.layout` describes them.

    Args:
        source: folder or shard pattern; a relative path is taken from the project's root.
        split: name of the split.
        classes: keep only these classes, labelled in this order; unlabelled images are left out. Default: all
            images, labelled by the sorted class names of all splits, or by the class numbers of the shards.
        cache_bytes: room for decoded images in memory; of a split above 5000 images none is kept.

    Raises:
        DataError: the source, the split or a class is missing, or no image can be used. The message says what
            was looked for, where, and what was found.
    """
    index, found = find_split(source, split)
    where = f"the split {split!r} of {source}"
    last = found[-1] if found else None  # of sorted names or numbers
    names = (
        [str(number) for number in range(last + 1)]
        if isinstance(last, int)
        else cast(list[str], found)
    )
    if classes is not None:
        if missing := [name for name in classes if name not in names]:
            raise DataError(f"There is no class {missing} in {where}; found the classes {names}.")
        names = list(classes)
    number_of = {name: number for number, name in enumerate(names)}
    labels = [-1 if value is None else number_of.get(str(value), -1) for value in index.class_of]
    labels = np.array(labels, np.int64)
    rows = np.arange(len(index))
    if classes is not None:
        rows = rows[labels >= 0]
        if empty := [name for name, number in number_of.items() if number not in labels]:
            present = [name for name, number in number_of.items() if number in labels]
            raise DataError(
                f"There is no image of class {empty} in {where}, only of {present}; other splits have some."
            )

    # An epoch of a large split would push every image out before it is needed again, in every worker process.
    store = _Store(index, cache_bytes if len(rows) <= CHECK_AT_MOST else 0)
    store.skipped += index.problems
    if len(rows) <= CHECK_AT_MOST:
        rows = _usable(store, rows)
    if store.skipped:
        for name, reason in store.skipped[:NAMED_WARNINGS]:
            warnings.warn(f"skipped {name}: {reason}", stacklevel=2)
        warnings.warn(
            f"{len(store.skipped)} of {len(index) + len(index.problems)} images of {where} were skipped; "
            "ImageSource.skipped lists them",
            stacklevel=2,
        )
    if not len(rows):
        raise DataError(
            f"None of the {len(index)} images of {where} can be used, for example: {store.skipped[:3]}."
        )
    return ImageSource(store, rows, torch.from_numpy(labels[rows]), names, where)


def unlabelled(index: Index, where: str) -> ImageSource:
    """The usable images of an index as a source without classes; `where` names it in messages. Warns of nothing: see `skipped`."""
    store = _Store(index, CACHE_BYTES if len(index) <= CHECK_AT_MOST else 0)
    rows = np.arange(len(index))
    if len(rows) <= CHECK_AT_MOST:
        rows = _usable(store, rows)
    return ImageSource(store, rows, torch.full((len(rows),), -1, dtype=torch.int64), [], where)


def _usable(store: _Store, rows: np.ndarray) -> np.ndarray:
    """Decode every image once, which also fills the cache; the rows that could be decoded."""

    def reason(row: int) -> str | None:
        try:
            store.decode(row)
        except ImageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reasons = list(pool.map(reason, rows.tolist()))
    for row, problem in zip(rows.tolist(), reasons, strict=True):
        if problem:
            store.reject(row, problem)
    return np.array(
        [row for row, problem in zip(rows, reasons, strict=True) if problem is None], np.int64
    )
