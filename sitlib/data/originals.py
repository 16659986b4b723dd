"""Images that are to be converted: from an image folder, from COCO's form, from Parquet files as Hugging Face writes them.

A set of originals knows where each image is; `read` gets the contents of those that go into one shard, in a process of its own.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sitlib.data.coco import coco_images
from sitlib.data.index import DataError, Index
from sitlib.data.layout import STAND_INS, find_split
from sitlib.paths import resolve


class Original(NamedTuple):
    """One image where it lies."""

    number: int  # in the source
    name: str  # of the image in the source
    path: Path
    group: int  # row group of a Parquet file
    row: int  # in its row group
    label: str | int | None = None
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Columns:
    """Which columns of Parquet files are used; None: none, but for a column `label` where there is one."""

    image: str = "image"
    label: str | None = None
    caption: str | None = None


class Content(NamedTuple):
    """An image as it was found."""

    original: Original  # with label and captions
    content: bytes | None
    problem: str  # why there is no content


class ImageFiles:
    """Files of a folder."""

    columns = None

    def __init__(self, index: Index, captions_of: dict[str, list[str]] | None = None):
        self._index = index
        self._captions_of = captions_of

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def names(self) -> list[str]:
        return self._index.keys

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the names, sizes, classes or captions of the images."""
        sizes = [self._index.files[file].stat().st_size for file in self._index.spans[:, 0]]
        return _digest([self.names, sizes, self._index.class_of, self._captions_of])

    def order(self) -> np.ndarray:
        """int64 [n]: all images in the order of the shards, mixed by a hash of their names."""
        return np.array(
            sorted(range(len(self)), key=lambda number: _place(self.names[number])), np.int64
        )

    def originals(self, numbers: Iterable[int]) -> list[Original]:
        captions_of = self._captions_of or {}
        found = []
        for number in map(int, numbers):
            file = self._index.spans[number, 0]
            name = self.names[number]
            found.append(
                Original(
                    number,
                    name,
                    self._index.files[file],
                    0,
                    0,
                    self._index.class_of[number],
                    tuple(captions_of.get(name, ())),
                )
            )
        return found


@dataclass
class ParquetRows:
    """Rows of Parquet files whose column `image` holds files of images, as bytes or as {bytes, path}."""

    files: list[Path]
    columns: Columns
    class_names: list[str] = field(
        default_factory=list
    )  # of the numbers in the label column, if known

    def __post_init__(self):
        parquet = _parquet()
        groups, shapes = [], []
        for number, file in enumerate(self.files):
            try:
                about = parquet.ParquetFile(file)
            except (OSError, ValueError) as error:
                raise DataError(f"{file} cannot be read as Parquet ({error}).") from None
            if number == 0:
                self._choose_columns(about.schema_arrow, file)
            rows = [
                about.metadata.row_group(group).num_rows for group in range(about.num_row_groups)
            ]
            groups += [(number, group, count) for group, count in enumerate(rows)]
            shapes.append([file.name, file.stat().st_size, rows])
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self.fingerprint = _digest(shapes)

    def _choose_columns(self, schema: Any, file: Path) -> None:
        label = self.columns.label or ("label" if "label" in schema.names else None)
        self.columns = Columns(self.columns.image, label, self.columns.caption)
        for option, name in (
            ("image", self.columns.image),
            ("label", label),
            ("caption", self.columns.caption),
        ):
            if name is not None and name not in schema.names:
                raise DataError(
                    f"{file} has no column {name!r}, only {', '.join(schema.names)}: name one by --{option}-column."
                )
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = about.get("info", {}).get("features", {}).get(label) or {}
        self.class_names = feature.get("names") or []

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def order(self) -> np.ndarray:
        """int64 [n]: all rows in the order of the shards. Row groups, which are read as a whole, are mixed by a hash, their rows stay."""
        names = [f"{self.files[file].name}:{group}" for file, group, _ in self._groups]
        chosen = sorted(range(len(names)), key=lambda group: _place(names[group]))
        parts = [np.arange(self._ends[g] - self._groups[g, 2], self._ends[g]) for g in chosen]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def originals(self, numbers: Iterable[int]) -> list[Original]:
        found = []
        for number in map(int, numbers):
            place = int(np.searchsorted(self._ends, number, side="right"))
            file, group, count = map(int, self._groups[place])
            row = number - (int(self._ends[place]) - count)
            path = self.files[file]
            found.append(
                Original(number, f"{path.name}: row {row} of row group {group}", path, group, row)
            )
        return found


def open_originals(
    source: str | Path,
    split: str,
    captions: str | Path | None = None,
    columns: Columns | None = None,
) -> ImageFiles | ParquetRows:
    """The images of one split of a source.

    Args:
        source: a folder of Parquet files named by split (`train-00000-of-00294.parquet`) or one such file; otherwise as for `open_images`.
        captions: a COCO captions file, as for `open_captioned`.
        columns: of Parquet files.

    Raises:
        DataError: source, split, captions or columns are missing.
    """
    if files := _parquet_files(source, split):
        if captions:
            raise DataError(
                "Captions of Parquet files are in one of their columns: name it by --caption-column."
            )
        return ParquetRows(files, columns or Columns())
    if columns and columns != Columns():
        raise DataError(f"{source} has no Parquet files, and so no columns that could be named.")
    if captions:
        found = coco_images(source, split, captions)
        return ImageFiles(found.index, found.captions_of)
    index, _ = find_split(source, split)
    if (index.spans[:, 2] >= 0).any():
        raise DataError(f"{source} consists of shards already.")
    return ImageFiles(index)


def _parquet_files(source: str | Path, split: str) -> list[Path]:
    path = resolve(source)
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    every = sorted(path.rglob("*.parquet")) if path.is_dir() else []
    for name in (split, *STAND_INS.get(split, ())):
        if chosen := [file for file in every if name in re.split(r"[-_.]", file.stem)]:
            return chosen
    if every:
        examples = ", ".join(file.name for file in every[:5])
        raise DataError(
            f"No Parquet file in {path} is named by the split {split!r}; found {examples}."
        )
    return []


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise DataError(
            "Reading Parquet files needs pyarrow: pip install -e '.[parquet]', or pip install pyarrow."
        ) from None
    return parquet


def read(originals: list[Original], columns: Columns | None) -> Iterator[Content]:
    """The contents of images, in the order in which they are given. `columns`: of Parquet files, None for other files."""
    if columns is not None:
        yield from _read_rows(originals, columns)
        return
    for original in originals:
        try:
            yield Content(original, original.path.read_bytes(), "")
        except OSError as error:
            yield Content(original, None, f"it cannot be read ({error.strerror or error})")


def _read_rows(originals: list[Original], columns: Columns) -> Iterator[Content]:
    """One pass over every row group; neighbours in the list are of one group, with rows that ascend."""
    parquet = _parquet()
    wanted = [name for name in (columns.image, columns.label, columns.caption) if name]
    begin = 0
    while begin < len(originals):
        where = originals[begin][2:4]
        end = begin
        while end < len(originals) and originals[end][2:4] == where:
            end += 1
        rows = {original.row: original for original in originals[begin:end]}
        file, first = parquet.ParquetFile(where[0]), 0
        for batch in file.iter_batches(batch_size=64, row_groups=[where[1]], columns=wanted):
            for row in range(first, first + len(batch)):
                if row in rows:
                    yield _content(
                        rows[row],
                        {name: batch[name][row - first].as_py() for name in wanted},
                        columns,
                    )
            first += len(batch)
            if first > max(rows):
                break
        begin = end


def _content(original: Original, row: dict[str, Any], columns: Columns) -> Content:
    image = row[columns.image]
    content = image.get("bytes") if isinstance(image, dict) else image
    label = row[columns.label] if columns.label else None
    if isinstance(label, int) and label < 0:  # how Hugging Face writes "unknown"
        label = None
    captions = row[columns.caption] if columns.caption else ()
    captions = [captions] if isinstance(captions, str) else captions or ()
    texts = tuple(
        " ".join(text.split()) for text in captions if isinstance(text, str) and text.strip()
    )
    original = original._replace(label=label, captions=texts)
    if not isinstance(content, bytes):
        return Content(
            original, None, f"its column {columns.image!r} holds no bytes of an image file"
        )
    return Content(original, content, "")


def _place(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
